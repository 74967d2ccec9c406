// Gradients of depthwise_conv2d, with its squeeze or its statistics, on the CPU; the arithmetic and its rows:
// kernels/depthwise_conv2d_backward.h.
// Tiling: a task is a block of channels, whose rows in scratch fit the L1 cache, of an image (of small ones, some; of large
// ones that are few, a band of rows). Tasks follow from the shape alone, and so do the bits: each one's share of the
// parameters' gradients is kept, and shares are added in order.
#include <array>
#include <cstring>

#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

// What else is in the gradient of the convolution's result, and what x passes on its way in.
struct Around {
  Maybe add, y, times;  // grad + add + y times; add (C) or (N, C, 1, 1), times (C), of the compute type
  Maybe scale, shift;   // (C), of the compute type
  int64_t pre_activation, activation;
};

// The gradients that are sums over pixels; of a share, a row of channels each, of the weight one a tap.
enum Sum { kWeight, kBias, kScale, kShift, kSums };

// How the work is cut into tasks.
struct Parts {
  int64_t block, blocks;   // channels of the input, whole panels
  int64_t images, groups;  // of the batch
  int64_t rows, bands;     // of the input

  int64_t shares() const { return groups * bands; }
};

struct DepthwiseBackward {
  // wanted: bits for x, weight, bias, scale and shift.
  DepthwiseBackward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Maybe& bias, const Conv& conv,
                    const Around& around, int64_t wanted);

  bool wants(int bit) const { return wanted >> bit & 1; }
  bool wants_input() const { return wanted & 0b11001; }
  // The gradient of the weight, (C * multiplier, 1, kernel_h, kernel_w), or of one number a channel.
  Tensor sum(Sum which) const;

  const Storage storage;
  const KernelTable& table;
  const Conv conv;
  const Around around;
  const int64_t wanted, multiplier, out_channels, taps, padded, scalar, item;  // padded: x's channels in whole panels
  const int64_t ring;  // rows of the output that meet one of the input, at most
  const Tensor grad, x, packed;
  const DepthwiseWeights weights;
  const Parts parts;
  const std::array<int64_t, kSums + 1> first;  // where each sum begins in a share
  Tensor planes;                               // the weight as (multiplier, taps, padded)
  Tensor dx, shares;

 private:
  Parts cut() const;
  void lay_out_weights();
  void add_shares();
};

// A task: it owns rows in scratch, a pixel's `block` channels side by side.
class Walk {
 public:
  Walk(const DepthwiseBackward& op, int64_t task);
  void run();

 private:
  // Whether rows of the compute type can be used where they lie.
  bool whole(const DepthwiseBackward& op) const {
    return op.storage == compute_storage(op.storage) && channels_ % kPanel == 0;
  }
  void image(int64_t n);
  void output_row(int64_t n, int64_t row, bool counts);
  void input_row(int64_t n, int64_t row);
  const char* gradient_row(int64_t n, int64_t row, int64_t plane) const {
    if (g_in_place_) return grad_ + output_at(n, row);
    return ring_row(row, plane);
  }
  char* ring_row(int64_t row, int64_t plane) const {
    return g_ + (row % op_.ring * op_.multiplier + plane) * op_.conv.out_w * block_ * op_.scalar;
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
  const int64_t block_, channel_, channels_, share_, band_;
  int64_t first_image_, last_image_;
  const bool dense_;                    // all channels
  const bool g_in_place_, x_in_place_;  // g is grad; a is x, and da is dx
  char *g_, *z_, *a_, *slope_, *da_;
  std::vector<DepthwiseTaps> taps_;
};

// Enough tasks for a team of threads; pixels of one that has several images, rows of a band, channels of a block.
constexpr int64_t kTasks = 16, kTaskPixels = 196, kBandRows = 32, kLeastBlock = 64;

DepthwiseBackward::DepthwiseBackward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Maybe& bias,
                                     const Conv& conv, const Around& around, int64_t wanted)
    : storage(storage_of(x, "x")),
      table(kernels(storage)),
      conv(conv),
      around(around),
      wanted(wanted),
      multiplier(weight.size(0) / conv.c),
      out_channels(weight.size(0)),
      taps(weight.size(2) * weight.size(3)),
      padded(round_up(conv.c, kPanel)),
      scalar(compute_size(storage)),
      item(storage_size(storage)),
      ring((conv.window.kernel_h - 1) * conv.window.dilation_h / conv.window.stride_h + 1),
      grad(channels_last(to_dtype(grad, x.scalar_type()))),
      x(channels_last(x)),
      packed(pack_depthwise_conv2d(weight, bias)),
      weights(PackedReader(packed, PackedOp::depthwise_conv2d, x, -1, out_channels, weight.size(2), weight.size(3))
                  .depthwise(out_channels)),
      parts(cut()),
      first([&] {
        std::array<int64_t, kSums + 1> begin{};
        const int64_t rows[] = {wants(1) ? multiplier * taps : 0, wants(2) ? multiplier : 0, wants(3), wants(4)};
        for (int i = 0; i < kSums; ++i) begin[i + 1] = begin[i] + rows[i] * padded;
        return begin;
      }()) {
  const ScalarType dtype = compute_dtype(storage);
  if (wants(0)) dx = empty_channels_last(x, conv.n, conv.c, conv.h, conv.w, x.scalar_type());
  // Of no image too, there is one share: of zeros.
  const Ints size{std::max<int64_t>(1, parts.shares()), first[kSums]};
  shares = torch::stable::empty(size, dtype, std::nullopt, x.device());
  lay_out_weights();
  if (parts.shares() == 0) torch::stable::zero_(shares);
  for_each(parts.shares() * parts.blocks, [&](int64_t i) { Walk(*this, i).run(); });
  add_shares();
}

Parts DepthwiseBackward::cut() const {
  const int64_t pixels = ring * multiplier * conv.out_w + 2 * conv.w;
  Parts p{};
  const int64_t n = std::max<int64_t>(1, conv.n), image = std::max<int64_t>(1, conv.h * conv.w);
  const int64_t bands = std::clamp<int64_t>(ceil_div(kTasks, n), 1, ceil_div(conv.h, kBandRows));
  p.rows = ceil_div(conv.h, bands);
  p.bands = ceil_div(conv.h, p.rows);
  const int64_t fitting = std::max(2 * kTileBytes / (pixels * scalar), kLeastBlock);
  const int64_t wanted = std::min(ceil_div(kTasks, n * p.bands), ceil_div(padded, kLeastBlock));
  p.block = round_up(ceil_div(padded, std::max(ceil_div(padded, fitting), wanted)), kPanel);
  p.blocks = ceil_div(padded, p.block);
  p.images = std::clamp<int64_t>(std::min(kTaskPixels / image, n * p.blocks / kTasks), 1, n);
  p.groups = ceil_div(conv.n, p.images);
  return p;
}

void DepthwiseBackward::lay_out_weights() {
  if (multiplier == 1) return;
  const Ints size{multiplier, taps, padded * scalar};
  planes = torch::stable::empty(size, ScalarType::Byte, std::nullopt, x.device());
  torch::stable::zero_(planes);
  char* to = mutable_bytes_of(planes);
  for (int64_t q = 0; q < multiplier; ++q)
    for (int64_t tap = 0; tap < taps; ++tap, to += padded * scalar)
      for (int64_t c = 0; c < conv.c; ++c)
        std::memcpy(to + c * scalar, weights.taps + (tap * weights.padded + c * multiplier + q) * scalar, scalar);
}

void DepthwiseBackward::add_shares() {
  const int64_t count = parts.shares(), all = first[kSums], chunk = 32 * kPanel;
  if (count <= 1) return;
  for_each(ceil_div(all, chunk), [&](int64_t i) {
    ChannelSumsTile t{};
    t.x_pixel = all;
    t.channels = std::min(chunk, all - i * chunk);
    t.pixels = count;
    t.run = 1;
    t.factor = 1;
    t.x = t.sums = mutable_bytes_of(shares) + i * chunk * scalar;  // the first of them
    table.channel_sums[static_cast<int>(compute_storage(storage))](t);
  });
}

Tensor DepthwiseBackward::sum(Sum which) const {
  const bool of_output = which == kWeight || which == kBias;
  const int64_t planes = of_output ? multiplier : 1, per_channel = which == kWeight ? taps : 1;
  const Ints size = which == kWeight ? Ints{out_channels, 1, conv.window.kernel_h, conv.window.kernel_w}
                                     : Ints{of_output ? out_channels : conv.c};
  const Tensor gradient = torch::stable::empty(size, compute_dtype(storage), std::nullopt, x.device());
  char* to = mutable_bytes_of(gradient);
  const char* const from = bytes_of(shares) + first[which] * scalar;
  const auto copy = [&](auto s) {
    using S = decltype(s);
    for (int64_t c = 0; c < conv.c; ++c)
      for (int64_t q = 0; q < planes; ++q)
        for (int64_t tap = 0; tap < per_channel; ++tap)
          reinterpret_cast<S*>(to)[(c * planes + q) * per_channel + tap] =
              reinterpret_cast<const S*>(from)[(q * per_channel + tap) * padded + c];
  };
  if (storage == Storage::f64)
    copy(double{});
  else
    copy(float{});
  return gradient;
}

Walk::Walk(const DepthwiseBackward& op, int64_t task)
    : op_(op),
      x_(bytes_of(op.x)),
      grad_(bytes_of(op.grad)),
      y_(op.around.y ? bytes_of(*op.around.y) : nullptr),
      weights_(op.multiplier == 1 ? op.weights.taps : bytes_of(op.planes)),
      dx_(op.wants(0) ? mutable_bytes_of(op.dx) : nullptr),
      share_bytes_(mutable_bytes_of(op.shares) + task / op.parts.blocks * op.first[kSums] * op.scalar),
      block_(op.parts.block),
      channel_(task % op.parts.blocks * block_),
      channels_(std::min(block_, op.conv.c - channel_)),
      share_(task / op.parts.blocks),
      band_(share_ % op.parts.bands),
      first_image_(share_ / op.parts.bands * op.parts.images),
      last_image_(std::min(first_image_ + op.parts.images, op.conv.n)),
      dense_(op.parts.blocks == 1 && op.multiplier == 1),
      g_in_place_(whole(op) && op.multiplier == 1 && !op.around.add && op.around.activation == 0 && !op.wants(2)),
      x_in_place_(whole(op) && !op.around.scale && op.around.pre_activation == 0) {
  const int64_t pixel = block_ * op.scalar, width = op.conv.w * pixel, out = op.conv.out_w * pixel * op.multiplier;
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
      std::memset(sums(which) + i * row + channel_ * op_.scalar, 0, round_up(channels_, kPanel) * op_.scalar);
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
    t.y_pixel = block_ * op_.multiplier;
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
  t.z_pixel = block_ * op_.multiplier;
  t.g = ring_row(row, 0);
  t.g_pixel = block_;
  t.g_plane = conv.out_w * block_;
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
  t.a_pixel = block_;
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
  taps.grad_pixel = g_in_place_ ? op_.out_channels : block_;
  taps.out_width = conv.out_w;
  taps.a = x_in_place_ ? t.x : a_;
  taps.a_pixel = taps.dx_pixel = x_in_place_ ? conv.c : block_;
  taps.dx = !op_.wants_input() ? nullptr : x_in_place_ ? t.dx : da_;
  taps.width = conv.w;
  taps.grad_ahead = g_in_place_ && dense_ ? conv.out_w * op_.out_channels : 0;
  taps.ahead = x_in_place_ ? t.ahead : 0;
  taps.channels = round_up(channels_, kPanel);
  taps.window = w;
  op_.table.depthwise_taps[compute_index(op_.storage)](taps);
  if (!x_in_place_ && op_.wants_input()) op_.table.depthwise_input_gradient[static_cast<int>(op_.storage)](t);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_backward(const Tensor& grad, const Tensor& x,
                                                                      const Tensor& weight, const Maybe& bias,
                                                                      const Ints& stride, const Ints& padding,
                                                                      const Ints& dilation, const Around& around,
                                                                      int64_t output_mask) {
  const Conv conv = conv_of(x, weight.size(2), weight.size(3), stride, padding, dilation);
  STD_TORCH_CHECK(conv.c > 0 && weight.size(0) % conv.c == 0, "weight must have a multiple of x's channels ", conv.c);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == conv.n && grad.size(1) == weight.size(0) &&
                      grad.size(2) == conv.out_h && grad.size(3) == conv.out_w,
                  "grad must have the output's shape");
  const int64_t given = 3 | (bias ? 4 : 0) | (around.scale ? 8 : 0) | (around.shift ? 16 : 0);
  const DepthwiseBackward op(grad, x, weight, bias, conv, around, output_mask & given);
  const auto of = [&](Sum which, int bit, const Maybe& parameter) {
    const Tensor& like = parameter ? *parameter : x;
    return op.wants(bit) ? weight_gradient(like, op.sum(which)) : no_gradient(like);
  };
  return {op.wants(0) ? in_format_of(x, op.dx) : no_gradient(x), of(kWeight, 1, weight), of(kBias, 2, bias),
          of(kScale, 3, around.scale), of(kShift, 4, around.shift)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                             Ints stride, Ints padding, Ints dilation,
                                                             int64_t pre_activation, int64_t activation_code,
                                                             int64_t output_mask, int64_t backend) {
  check_backend(backend);
  Around around{};
  around.pre_activation = pre_activation;
  around.activation = activation_code;
  const auto [dx, dweight, dbias, dscale, dshift] =
      depthwise_backward(grad, x, weight, bias, stride, padding, dilation, around, output_mask);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_squeeze_backward(Tensor grad, Tensor grad_squeezed, Tensor x,
                                                                     Tensor weight, Maybe bias, Ints stride,
                                                                     Ints padding, Ints dilation,
                                                                     int64_t pre_activation, int64_t activation_code,
                                                                     int64_t output_mask, int64_t backend) {
  check_backend(backend);
  check_residual(grad_squeezed, grad_squeezed, grad.size(0), grad.size(1), 1, 1);
  Around around{};
  // A mean hands the same share of its gradient to each pixel.
  around.add = channel_sums(channels_last(to_dtype(grad_squeezed, compute_dtype(storage_of(x, "x")))), std::nullopt,
                            1.0 / static_cast<double>(grad.size(2) * grad.size(3)));
  around.pre_activation = pre_activation;
  around.activation = activation_code;
  const auto [dx, dweight, dbias, dscale, dshift] =
      depthwise_backward(grad, x, weight, bias, stride, padding, dilation, around, output_mask);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_conv2d_stats_backward(
    Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
    Tensor y, Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t output_mask, int64_t backend) {
  check_backend(backend);
  check_scale_shift(scale, shift, x);
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const auto dense = [&](const Tensor& t) { return torch::stable::contiguous(to_dtype(t, dtype)); };
  const auto maybe_dense = [&](const Maybe& t) { return t ? Maybe(dense(*t)) : std::nullopt; };
  const Maybe squares = per_channel(dense(grad_squares));
  const Around around{.add = dense(grad_sum),
                      .y = channels_last(y),
                      .times = scaled_channels(*squares, std::nullopt, std::nullopt, squares, 0),
                      .scale = maybe_dense(scale),
                      .shift = maybe_dense(shift),
                      .pre_activation = pre_activation,
                      .activation = 0};
  return depthwise_backward(grad, x, weight, bias, stride, padding, dilation, around, output_mask);
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_backward));
  m.impl("depthwise_conv2d_squeeze_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_squeeze_backward));
  m.impl("depthwise_conv2d_stats_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_stats_backward));
}
