// A sequence of packed ops in one call: a network is some twenty, of a tenth of a millisecond each, and through Python and
// the dispatcher every call costs a tenth of that again, with the caches swept by the kernels in between.
//
// program: how many steps; for each its code, where its arguments are (as many as the op takes: a tensor is the number of a value, x
// being 0 and step i's output i + 1, or -1 for none; a list its length, then its elements), and then the values that
// no later step reads: how many, which. Written by cnnfast/nn/recording.py.
#include "channels.h"
#include "ops.h"

namespace cnnfast::cpu {

namespace {

// The codes of packing.h's PackedOp are the ops' steps; these are the others.
constexpr int64_t kChannelsLast = 0, kMean = 100;

struct Machine {
  const std::vector<Tensor>& packed;
  const int64_t* at;
  const int64_t* end;
  std::vector<Maybe> values{};
  size_t next_packed = 0;

  template <class T>
  T read() {
    if constexpr (std::is_same_v<T, Ints>) {
      const int64_t count = read<int64_t>();
      STD_TORCH_CHECK(count >= 0 && count <= end - at, "program ends within a list");
      at += count;
      return Ints(at - count, at);
    } else if constexpr (std::is_same_v<T, Maybe>) {
      const int64_t value = read<int64_t>();
      if (value == -1) return std::nullopt;
      STD_TORCH_CHECK(value >= 0 && value < static_cast<int64_t>(values.size()) && values[value],
                      "program reads a value that is not there");
      return values[value];
    } else {
      STD_TORCH_CHECK(at != end, "program ends within a step");
      return static_cast<T>(*at++);
    }
  }

  Tensor image() {
    const Maybe x = read<Maybe>();
    STD_TORCH_CHECK(x, "program has a step without an x");
    return *x;
  }

  template <class... A>
  Tensor run(Tensor (*op)(Tensor, Tensor, A...)) {
    const Tensor x = image();
    STD_TORCH_CHECK(next_packed < packed.size(), "program has more packed ops than there are packings");
    std::tuple<A...> arguments{read<A>()...};  // in this order, which a call's arguments have not
    return std::apply([&](A&... a) { return op(x, packed[next_packed++], std::move(a)...); }, arguments);
  }

  Tensor step(int64_t code) {
    switch (code) {
      case kChannelsLast: return channels_last(image());
      case kMean: {
        BandSums sums(channels_last(image()), false);
        for_each(sums.count(), [&](int64_t band) { sums.add(band); });
        return sums.means();
      }
      case static_cast<int64_t>(PackedOp::conv2d): return run(&conv2d_packed);
      case static_cast<int64_t>(PackedOp::depthwise_conv2d): return run(&depthwise_conv2d_packed);
      case static_cast<int64_t>(PackedOp::pointwise_conv2d): return run(&pointwise_conv2d_packed);
      case static_cast<int64_t>(PackedOp::separable_conv2d): return run(&separable_conv2d_packed);
      case static_cast<int64_t>(PackedOp::inverted_residual): return run(&inverted_residual_packed);
      case static_cast<int64_t>(PackedOp::squeeze_excite): return run(&squeeze_excite_packed);
      default: STD_TORCH_CHECK(false, "program has a step ", code, " that is none"); throw;
    }
  }
};

Tensor packed_sequence(Tensor x, std::vector<Tensor> packed, Tensor program) {
  STD_TORCH_CHECK(program.scalar_type() == ScalarType::Long && program.dim() == 1 && program.is_contiguous(),
                  "program must be a contiguous tensor of int64");
  const auto* const begin = static_cast<const int64_t*>(program.const_data_ptr());
  Machine machine{packed, begin, begin + program.numel()};
  machine.values.emplace_back(x);
  ImageArena& arena = ImageArena::open();
  struct Closed {
    ImageArena& arena;
    ~Closed() { arena.close(); }
  } const closed{arena};
  for (int64_t left = machine.read<int64_t>(); left > 0; --left) {
    arena.take(left > 1);  // what the last step makes is the caller's
    machine.values.emplace_back(machine.step(machine.read<int64_t>()));
    for (const int64_t value : machine.read<Ints>()) {
      STD_TORCH_CHECK(value >= 0 && value < static_cast<int64_t>(machine.values.size()), "program drops no value");
      machine.values[value].reset();
    }
    std::vector<const void*> live;
    for (const Maybe& value : machine.values)
      if (value) live.push_back(value->const_data_ptr());
    arena.keep(live);
  }
  STD_TORCH_CHECK(machine.at == machine.end, "program goes on after its last step");
  const Maybe& last = machine.values.back();
  STD_TORCH_CHECK(last, "program drops its result");
  return arena.holds(last->const_data_ptr()) ? torch::stable::clone(*last) : *last;
}

}  // namespace

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) { m.impl("packed_sequence", TORCH_BOX(&cnnfast::cpu::packed_sequence)); }
