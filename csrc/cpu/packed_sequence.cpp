// A sequence of packed ops in one call: a network is some twenty, of a tenth of a millisecond each, and through Python and
// the dispatcher every call costs a tenth of that again, with the caches swept by the kernels in between.
// What a program is made of: program.h. Where its images lie: image_plan.h.
#include <cstring>
#include <map>

#include "channels.h"
#include "image_plan.h"
#include "ops.h"
#include "program.h"

namespace cnnfast::cpu {

namespace {

// x to channels [first, first + its own) of y, unless that is where it lies.
void copy_channels(const Tensor& x, const Tensor& y, int64_t first) {
  const int64_t itemsize = static_cast<int64_t>(x.element_size()), w = x.size(3);
  char* const to = mutable_bytes_of(y) + first * itemsize;
  if (x.const_data_ptr() == to || x.numel() == 0) return;
  const Tensor xs = channels_last(x);
  const int64_t x_pixel = x.size(1) * itemsize, y_pixel = pixel_of(y) * itemsize;
  for_each(x.size(0) * x.size(2), [&](int64_t row) {
    for (int64_t pixel = row * w; pixel < (row + 1) * w; ++pixel)
      std::memcpy(to + pixel * y_pixel, bytes_of(xs) + pixel * x_pixel, x_pixel);
  });
}

struct Machine {
  const std::vector<Tensor>& packed;
  Words words;
  std::vector<Maybe> values{};
  std::map<int64_t, Maybe> joined{};  // by concatenation, images that some of its parts have been written to
  size_t next_packed = 0;

  template <class T>
  T read() {
    if constexpr (std::is_same_v<T, Maybe>) {
      const int64_t value = words.read<int64_t>();
      return value == -1 ? std::nullopt : Maybe(at_number(value));
    } else {
      return words.read<T>();
    }
  }

  const Tensor& at_number(int64_t value) const {
    STD_TORCH_CHECK(value >= 0 && value < static_cast<int64_t>(values.size()) && values[value],
                    "program reads a value that is not there");
    return *values[value];
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

  template <class... A>
  Tensor run_unpacked(Tensor (*op)(Tensor, A...)) {
    const Tensor x = image();
    std::tuple<A...> arguments{read<A>()...};
    return std::apply([&](A&... a) { return op(x, std::move(a)...); }, arguments);
  }

  // What the next step's image is to be part of.
  std::optional<Part> part() {
    const Ints place = read<Ints>();
    if (place.size() < 2) return std::nullopt;
    STD_TORCH_CHECK(place.size() == 3, "program has a part without its place");
    return Part{&joined[place[0]], place[1], place[2]};
  }

  // Images side by side; parts that could not be written there are copied.
  Tensor concatenate() {
    std::vector<Tensor> parts;
    for (const int64_t value : read<Ints>()) parts.push_back(at_number(value));
    STD_TORCH_CHECK(!parts.empty(), "program concatenates nothing");
    const Tensor& x = parts[0];
    int64_t channels = 0;
    for (const Tensor& part : parts) {
      STD_TORCH_CHECK(part.dim() == 4 && part.size(0) == x.size(0) && part.size(2) == x.size(2) &&
                          part.size(3) == x.size(3) && part.scalar_type() == x.scalar_type(),
                      "program joins images that don't fit");
      channels += part.size(1);
    }
    Maybe& written = joined[static_cast<int64_t>(values.size())];
    const Tensor y =
        written ? *written : empty_channels_last(x, x.size(0), channels, x.size(2), x.size(3), x.scalar_type());
    STD_TORCH_CHECK(y.size(1) == channels, "program joins images that don't fit");
    written.reset();
    int64_t first = 0;
    for (const Tensor& part : parts) {
      copy_channels(part, y, first);
      first += part.size(1);
    }
    return y;
  }

  Tensor step(int64_t code) {
    switch (code) {
      case kChannelsLast: return channels_last(image());
      case kMean: {
        const Tensor x = channels_last(image());
        return channel_sums(x, std::nullopt, 1.0 / static_cast<double>(x.size(2) * x.size(3)));
      }
      case kConcatenate: return concatenate();
      case kMaxPool: return run_unpacked(&max_pool2d);
      case kAvgPool: return run_unpacked(&avg_pool2d);
      case kLocalResponseNorm: return run_unpacked(&local_response_norm);
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
  const ImagePlan plan = plan_images(x, program);
  Machine machine{packed, Words(program)};
  machine.values.emplace_back(x);
  ImageArena& arena = ImageArena::open(plan.bytes);
  struct Closed {
    ImageArena& arena;
    ~Closed() { arena.close(); }
  } const closed{arena};
  machine.read<int64_t>();  // how many steps
  for (const Place& place : plan.places) {
    arena.take(place.bytes ? std::optional(place) : std::nullopt);
    const int64_t code = machine.read<int64_t>();
    arena.write_to(machine.part());
    machine.values.emplace_back(machine.step(code));
    for (const int64_t value : machine.read<Ints>()) machine.values[value].reset();
  }
  STD_TORCH_CHECK(machine.words.ended(), "program goes on after its last step");
  const Maybe& last = machine.values.back();
  STD_TORCH_CHECK(last, "program drops its result");
  return arena.holds(last->const_data_ptr()) ? torch::stable::clone(*last) : *last;
}

}  // namespace

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) { m.impl("packed_sequence", TORCH_BOX(&cnnfast::cpu::packed_sequence)); }
