// A task of depthwise backward, row by row: kernels/depthwise_conv2d_backward.h has the arithmetic.
#include <cstring>

#include "depthwise_backward.h"

namespace cnnfast::cpu {

namespace {

// Which whole panels of rows are used where they lie: of grad as g, of x and dx as a and da.
struct InPlace {
  bool grad, x;
};
InPlace in_place(const DepthwiseBackward& op) {
  const bool grad = op.multiplier == 1 && !op.around.add && op.around.activation == 0 && !op.wants(2);
  const bool x = !op.around.scale && op.around.pre_activation == 0;
  if (op.storage == compute_storage(op.storage)) return {grad, x};
  const bool both =
      grad && x && op.table.depthwise_taps[static_cast<int>(op.storage)] && depthwise_taps_at_once(op.conv.window);
  return {both, both};
}

// Channels of a task; it owns rows in scratch, panel after panel.
class Walk {
 public:
  Walk(const DepthwiseBackward& op, int64_t share, int64_t channel, int64_t channels);
  void run();

 private:
  void image(int64_t n);
  void output_row(int64_t n, int64_t row, bool counts);
  void input_row(int64_t n, int64_t row);
  const char* gradient_row(int64_t n, int64_t row, int64_t plane) const {
    if (g_in_place_) return grad_ + output_at(n, row);
    return ring_row(row, plane);
  }
  char* ring_row(int64_t row, int64_t plane) const {
    return g_ + (row % op_.ring * op_.multiplier + plane) * op_.conv.out_w * padded_ * op_.scalar;
  }
  // Where its channels of a row begin in an image like y.
  int64_t output_at(int64_t n, int64_t row) const {
    return ((n * op_.conv.out_h + row) * op_.conv.out_w * op_.out_channels + channel_ * op_.multiplier) * op_.item;
  }
  // Its own sums, of all channels.
  char* sums(Sum which) const { return share_bytes_ + op_.first[which] * op_.scalar; }
  const char* channels_of(const Maybe& t, int64_t channel) const {
    return t ? bytes_of(*t) + channel * op_.scalar : nullptr;
  }

  const DepthwiseBackward& op_;
  const char *const x_, *const grad_, *const y_, *const weights_;
  char *const dx_, *const share_bytes_;
  const int64_t channel_, channels_, padded_, band_, first_image_, last_image_;
  const bool dense_;                    // hardly any other channels in the images
  const bool g_in_place_, x_in_place_;  // g is grad; a is x, and da is dx
  char *g_, *z_, *a_, *slope_, *da_;
  std::vector<DepthwiseTaps> taps_;
};

Walk::Walk(const DepthwiseBackward& op, int64_t share, int64_t channel, int64_t channels)
    : op_(op),
      x_(bytes_of(op.x)),
      grad_(bytes_of(op.grad)),
      y_(op.around.y ? bytes_of(*op.around.y) : nullptr),
      weights_(op.multiplier == 1 ? op.weights.taps : bytes_of(op.planes)),
      dx_(op.wants(0) ? mutable_bytes_of(op.dx) : nullptr),
      share_bytes_(mutable_bytes_of(op.shares) + share * op.first[kSums] * op.scalar),
      channel_(channel),
      channels_(channels),
      padded_(round_up(channels, kPanel)),
      band_(share % op.parts.bands),
      first_image_(share / op.parts.bands * op.parts.images),
      last_image_(std::min(first_image_ + op.parts.images, op.conv.n)),
      dense_(op.conv.c - channels < kPanel && op.multiplier == 1),
      g_in_place_(in_place(op).grad && channels % kPanel == 0),
      x_in_place_(in_place(op).x && channels % kPanel == 0) {
  const int64_t pixel = padded_ * op.scalar, width = op.conv.w * pixel, out = op.conv.out_w * pixel * op.multiplier;
  g_ = scratch(Slot::depthwise, op.ring * out + out + 3 * width);
  z_ = g_ + op.ring * out;
  a_ = z_ + out;
  slope_ = a_ + width;
  da_ = slope_ + width;
}

void Walk::run() {
  const auto clear = [&](Sum which) {
    const int64_t row = op_.padded * op_.scalar, rows = (op_.first[which + 1] - op_.first[which]) / op_.padded;
    for (int64_t i = 0; i < rows; ++i)
      std::memset(sums(which) + i * row + channel_ * op_.scalar, 0, padded_ * op_.scalar);
  };
  for (Sum which : {kWeight, kBias, kScale, kShift}) clear(which);
  for (int64_t n = first_image_; n < last_image_; ++n) image(n);
}

void Walk::image(int64_t n) {
  const Conv& conv = op_.conv;
  const Window& w = conv.window;
  const int64_t begin = band_ * op_.parts.rows, end = std::min(begin + op_.parts.rows, conv.h);
  // The band's own rows of the output, whose sum is its share of the bias's gradient.
  const int64_t own_begin = band_ * conv.out_h / op_.parts.bands, own_end = (band_ + 1) * conv.out_h / op_.parts.bands;
  const int64_t reach = begin + w.pad_top - (w.kernel_h - 1) * w.dilation_h;
  int64_t next = reach <= 0 ? 0 : ceil_div(reach, w.stride_h);
  if (g_in_place_) next = conv.out_h;
  if (op_.wants(2)) next = std::min(next, own_begin);
  const auto up_to = [&](int64_t last) {
    for (; next < last; ++next) output_row(n, next, op_.wants(2) && own_begin <= next && next < own_end);
  };
  if (op_.wants_input() || op_.wants(1)) {
    for (int64_t row = begin; row < end; ++row) {
      up_to(std::min((row + w.pad_top) / w.stride_h + 1, conv.out_h));
      input_row(n, row);
    }
  }
  if (op_.wants(2)) up_to(own_end);
}

void Walk::output_row(int64_t n, int64_t row, bool counts) {
  const Conv& conv = op_.conv;
  const int64_t channel = channel_ * op_.multiplier, channels = channels_ * op_.multiplier;
  if (op_.around.activation != 0) {  // what went into it, once more
    DepthwiseTile t = depthwise_tile(conv, op_.weights, compute_storage(op_.storage), op_.around.pre_activation, 0);
    t.x = x_ + (n * conv.h * conv.w * conv.c + channel_) * op_.item;
    t.x_pixel = conv.c;
    t.x_row = conv.w * conv.c;
    t.weight = op_.weights.taps + channel * op_.scalar;
    t.bias = op_.weights.bias + channel * op_.scalar;
    t.y = z_;
    t.y_pixel = padded_ * op_.multiplier;
    t.y_row = conv.out_w * t.y_pixel;
    t.row_begin = row;
    t.row_end = row + 1;
    t.channels = channels;
    t.multiplier = op_.multiplier;
    op_.table.depthwise[static_cast<int>(op_.storage)](t);
  }
  const int64_t from = output_at(n, row);
  const Around& around = op_.around;
  DepthwiseOutputGradientTile t{};
  t.grad = grad_ + from;
  t.y = y_ ? y_ + from : nullptr;
  t.pixel = op_.out_channels;
  t.ahead = dense_ ? conv.out_w * op_.out_channels : 0;
  t.add = channels_of(around.add, channel + (around.add && around.add->dim() == 4 ? n * op_.out_channels : 0));
  t.times = channels_of(around.times, channel);
  t.z = z_;
  t.z_pixel = padded_ * op_.multiplier;
  t.g = ring_row(row, 0);
  t.g_pixel = kPanel;
  t.g_panel = conv.out_w * kPanel;
  t.g_plane = conv.out_w * padded_;
  t.sums = counts ? sums(kBias) + channel_ * op_.scalar : nullptr;
  t.sums_plane = op_.padded;
  t.pixels = conv.out_w;
  t.channels = channels_;
  t.multiplier = op_.multiplier;
  t.activation = activation(around.activation);
  op_.table.depthwise_output_gradient[static_cast<int>(op_.storage)](t);
}

void Walk::input_row(int64_t n, int64_t row) {
  const Conv& conv = op_.conv;
  const Window& w = conv.window;
  const int64_t from = ((n * conv.h + row) * conv.w * conv.c + channel_) * op_.item, at = channel_ * op_.scalar;
  DepthwiseInputTile t{};
  t.x = x_ + from;
  t.dx = op_.wants(0) ? dx_ + from : nullptr;
  t.x_pixel = conv.c;
  t.ahead = dense_ ? conv.w * conv.c : 0;
  t.scale = channels_of(op_.around.scale, channel_);
  t.shift = channels_of(op_.around.shift, channel_);
  t.a = a_;
  t.slope = slope_;
  t.da = da_;
  t.a_pixel = kPanel;
  t.a_panel = conv.w * kPanel;
  t.scale_sums = op_.wants(3) ? sums(kScale) + at : nullptr;
  t.shift_sums = op_.wants(4) ? sums(kShift) + at : nullptr;
  t.pixels = conv.w;
  t.channels = channels_;
  t.activation = activation(op_.around.pre_activation);
  if (!x_in_place_) op_.table.depthwise_input[static_cast<int>(op_.storage)](t);

  taps_.clear();
  for (int64_t i = 0; i < w.kernel_h; ++i) {
    const int64_t shifted = row + w.pad_top - i * w.dilation_h;
    if (shifted < 0 || shifted % w.stride_h != 0 || shifted / w.stride_h >= conv.out_h) continue;
    for (int64_t q = 0; q < op_.multiplier; ++q) {
      const int64_t tap = (q * op_.taps + i * w.kernel_w) * op_.padded * op_.scalar + at;
      taps_.push_back(
          {gradient_row(n, shifted / w.stride_h, q), weights_ + tap, op_.wants(1) ? sums(kWeight) + tap : nullptr});
    }
  }
  DepthwiseTapsTile taps{};
  taps.taps = taps_.data();
  taps.rows = static_cast<int64_t>(taps_.size());
  taps.weight_tap = op_.padded;
  taps.grad_pixel = g_in_place_ ? op_.out_channels : kPanel;
  taps.grad_panel = g_in_place_ ? kPanel : conv.out_w * kPanel;
  taps.out_width = conv.out_w;
  taps.a = x_in_place_ ? t.x : a_;
  taps.pixel = x_in_place_ ? conv.c : kPanel;
  taps.panel = x_in_place_ ? kPanel : conv.w * kPanel;
  taps.dx = !op_.wants_input() ? nullptr : x_in_place_ ? t.dx : da_;
  taps.width = conv.w;
  taps.grad_ahead = g_in_place_ && dense_ ? conv.out_w * op_.out_channels : 0;
  taps.ahead = x_in_place_ ? t.ahead : 0;
  taps.channels = padded_;
  taps.window = w;
  op_.table.depthwise_taps[static_cast<int>(x_in_place_ ? op_.storage : compute_storage(op_.storage))](taps);
  if (!x_in_place_ && op_.wants_input()) op_.table.depthwise_input_gradient[static_cast<int>(op_.storage)](t);
}

}  // namespace

void walk(const DepthwiseBackward& op, int64_t task) {
  const int64_t share = task / op.parts.blocks, begin = task % op.parts.blocks * op.parts.block;
  const int64_t channels = std::min(op.parts.block, op.conv.c - begin);
  // A broken panel keeps the others from being used where they lie, so it goes by itself.
  const int64_t broken = in_place(op).grad || in_place(op).x ? channels % kPanel : 0;
  if (channels > broken) Walk(op, share, begin, channels - broken).run();
  if (broken) Walk(op, share, begin + channels - broken, broken).run();
}

}  // namespace cnnfast::cpu
