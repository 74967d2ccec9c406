// Where a sequence's images lie. The program tells beforehand how large they are and from which step to which they live, so
// that they take hardly more memory than those that live at once. Placed as the steps come, small images break up what
// large ones leave behind: ResNet-50 took twice as much.
//
// Order: the largest first, each into the smallest gap between those that live at some of its steps.
#include "image_plan.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "ops.h"
#include "program.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kNone = -1;
constexpr int64_t kLine = 64;  // of the cache: images begin with one

// Memory of an image: of one value, of the parts of a concatenation, or of values written over one another.
struct Block {
  int64_t bytes;
  int64_t first, last;  // steps of its life
  int64_t live = 0;     // values in it
  int64_t begin = kNone;
};

struct Value {
  ImageSize size;
  int64_t block;
};

// A program walked through by sizes alone.
class Walk {
 public:
  Walk(const Tensor& x, const Tensor& program) : words_(program), itemsize_(static_cast<int64_t>(x.element_size())) {
    values_.push_back({size_of(x), kNone});
    const int64_t steps = words_.read<int64_t>();
    for (step_ = 0; step_ < steps; ++step_) walk(step_ + 1 == steps);
    for (Block& block : blocks)
      if (block.live > 0) block.last = steps;
  }

  std::vector<Block> blocks;
  std::vector<int64_t> written;  // by each step: a block, or kNone

 private:
  void walk(bool last) {
    const int64_t code = words_.read<int64_t>();
    const Ints place = words_.read<Ints>();
    const int64_t from = code == kConcatenate ? kNone : words_.read<int64_t>();
    const ImageSize size = code == kConcatenate ? concatenated() : made(code, at(from).size);
    int64_t block = code == kChannelsLast ? at(from).block : kNone;  // an image in NCHW lies elsewhere
    written.push_back(kNone);
    const bool over = place.size() == 1 && place[0] != from && may_be_written_over(place[0], size);
    if (code != kChannelsLast && code != kMean) block = over ? at(place[0]).block : block_for(place, size, last);
    if (code != kChannelsLast) written.back() = block;
    values_.push_back({size, block});
    if (block != kNone) ++blocks[block].live;
    const Ints dropped = words_.read<Ints>();
    STD_TORCH_CHECK(!over || std::find(dropped.begin(), dropped.end(), place[0]) != dropped.end(),
                    "program writes over a value that it reads again");
    for (const int64_t value : dropped) drop(value);
  }

  const Value& at(int64_t value) const {
    STD_TORCH_CHECK(value != kNone, "program has a step without an x");
    STD_TORCH_CHECK(value >= 0 && value < static_cast<int64_t>(values_.size()),
                    "program reads a value that is not there");
    return values_[value];
  }

  void drop(int64_t value) {
    STD_TORCH_CHECK(value >= 0 && value < static_cast<int64_t>(values_.size()), "program drops no value");
    if (values_[value].block == kNone) return;
    Block& block = blocks[values_[value].block];
    --block.live;
    block.last = step_;
  }

  bool may_be_written_over(int64_t value, const ImageSize& size) const {
    const Value& v = at(value);
    return v.block != kNone && v.size == size && blocks[v.block].live == 1;
  }

  int64_t block_for(const Ints& place, const ImageSize& size, bool last) {
    const bool part = place.size() == 3;
    const auto joined = joined_.find(part ? place[0] : static_cast<int64_t>(values_.size()));
    if (joined != joined_.end()) return joined->second;
    if (last) return kNone;  // the caller's
    const ImageSize whole = part ? ImageSize{size.n, place[2], size.h, size.w} : size;
    blocks.push_back({whole.count() * itemsize_, step_, step_});
    const int64_t block = static_cast<int64_t>(blocks.size()) - 1;
    if (part) joined_[place[0]] = block;
    return block;
  }

  // What an op makes, by its arguments, of which tensors are mere numbers here.
  template <class T>
  using Argument = std::conditional_t<std::is_same_v<T, Maybe>, int64_t, T>;
  template <class... A>
  std::tuple<Argument<A>...> arguments(Tensor (*)(Tensor, Tensor, A...)) {
    return std::tuple<Argument<A>...>{words_.read<Argument<A>>()...};
  }
  template <class... A>
  std::tuple<A...> arguments(Tensor (*)(Tensor, A...)) {
    return std::tuple<A...>{words_.read<A>()...};
  }

  ImageSize made(int64_t code, const ImageSize& x) {
    const auto convolved = [&](int64_t channels, const Ints& kernel, const Ints& stride, const Ints& padding,
                               const Ints& dilation) {
      STD_TORCH_CHECK(kernel.size() == 2, "kernel_size must have 2 elements");
      const Conv conv = conv_of(x, kernel[0], kernel[1], stride, padding, dilation);
      return ImageSize{x.n, channels, conv.out_h, conv.out_w};
    };
    switch (code) {
      case kChannelsLast: return x;
      case kMean: return {x.n, x.c, 1, 1};
      case kMaxPool: {
        const auto [kernel, stride, padding, ceil_mode] = arguments(&max_pool2d);
        return pooled_size(x, kernel, stride, padding, ceil_mode);
      }
      case kAvgPool: {
        const auto [kernel, stride, padding, ceil_mode, count_include_pad] = arguments(&avg_pool2d);
        return pooled_size(x, kernel, stride, padding, ceil_mode);
      }
      case kLocalResponseNorm: arguments(&local_response_norm); return x;
      case static_cast<int64_t>(PackedOp::conv2d): {
        const auto [residual, channels, kernel, stride, padding, dilation, activation, backend] =
            arguments(&conv2d_packed);
        return convolved(channels, kernel, stride, padding, dilation);
      }
      case static_cast<int64_t>(PackedOp::depthwise_conv2d): {
        const auto [channels, kernel, stride, padding, dilation, before, activation, backend] =
            arguments(&depthwise_conv2d_packed);
        return convolved(channels, kernel, stride, padding, dilation);
      }
      case static_cast<int64_t>(PackedOp::pointwise_conv2d): {
        const auto [gate, residual, channels, stride, activation, backend] = arguments(&pointwise_conv2d_packed);
        return convolved(channels, {1, 1}, stride, {0, 0, 0, 0}, {1, 1});
      }
      case static_cast<int64_t>(PackedOp::separable_conv2d): {
        const auto [residual, channels, kernel, stride, padding, dilation, order, before, between, activation, max_pool,
                    backend] = arguments(&separable_conv2d_packed);
        const ImageSize y = convolved(channels, kernel, stride, padding, dilation);
        return max_pool.size() == 3 ? max_pooled_size(y, max_pool) : y;
      }
      case static_cast<int64_t>(PackedOp::inverted_residual): {
        const auto [residual, expanded, channels, kernel, stride, padding, dilation, activation, se, gate, backend] =
            arguments(&inverted_residual_packed);
        return convolved(channels, kernel, stride, padding, dilation);
      }
      case static_cast<int64_t>(PackedOp::squeeze_excite): arguments(&squeeze_excite_packed); return x;
      default: STD_TORCH_CHECK(false, "program has a step ", code, " that is none"); throw;
    }
  }

  ImageSize concatenated() {
    const Ints parts = words_.read<Ints>();
    STD_TORCH_CHECK(!parts.empty(), "program concatenates nothing");
    ImageSize y = at(parts[0]).size;
    y.c = 0;
    for (const int64_t part : parts) {
      const ImageSize& x = at(part).size;
      STD_TORCH_CHECK(x.n == y.n && x.h == y.h && x.w == y.w, "program joins images that don't fit");
      y.c += x.c;
    }
    return y;
  }

  Words words_;
  int64_t itemsize_, step_ = 0;
  std::vector<Value> values_;
  std::map<int64_t, int64_t> joined_;  // by concatenation, the block of its image
};

// Gives every block its place; how many bytes there are of all.
int64_t place(std::vector<Block>& blocks) {
  std::vector<size_t> order(blocks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return blocks[a].bytes > blocks[b].bytes; });
  std::vector<const Block*> placed;  // by where they begin
  int64_t all = 0;
  for (const size_t i : order) {
    Block& block = blocks[i];
    const int64_t bytes = round_up(block.bytes, kLine);
    int64_t end = 0, best = kNone, least = 0;
    for (const Block* const other : placed) {
      if (other->last < block.first || block.last < other->first) continue;
      const int64_t gap = other->begin - end;
      if (gap >= bytes && (best == kNone || gap < least)) {
        best = end;
        least = gap;
      }
      end = std::max(end, other->begin + round_up(other->bytes, kLine));
    }
    block.begin = best == kNone ? end : best;
    all = std::max(all, block.begin + bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), &block,
                                   [](const Block* a, const Block* b) { return a->begin < b->begin; }),
                  &block);
  }
  return all;
}

}  // namespace

ImagePlan plan_images(const Tensor& x, const Tensor& program) {
  Walk walk(x, program);
  ImagePlan plan{place(walk.blocks), {}};
  for (const int64_t block : walk.written)
    plan.places.push_back(block == kNone ? Place{0, 0} : Place{walk.blocks[block].begin, walk.blocks[block].bytes});
  return plan;
}

}  // namespace cnnfast::cpu
