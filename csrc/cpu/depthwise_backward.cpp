// Depthwise backward's tasks and the sums that they leave.
// Tiling: a task is a block of channels, whose rows in scratch stay in L2, of an image (of small or many ones, some; of
// large ones that are few, a band of rows). Tasks follow from the shape alone, and so do the bits: each one's share of the
// parameters' gradients is kept, and shares are added in order.
#include "depthwise_backward.h"

#include <cstring>

namespace cnnfast::cpu {

// Enough tasks for a team of threads, and few enough shares; pixels of a task that has several images, rows of a band,
// channels of a block.
constexpr int64_t kTasks = 16, kShares = 64, kTaskPixels = 196, kBandRows = 32, kLeastBlock = 64;

DepthwiseBackward::DepthwiseBackward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Maybe& bias,
                                     const Conv& conv, const Around& around, int64_t wanted, const Maybe& into)
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
  if (wants(0)) dx = into ? *into : empty_channels_last(x, conv.n, conv.c, conv.h, conv.w, x.scalar_type());
  // Of no image too, there is one share: of zeros.
  const Ints size{std::max<int64_t>(1, parts.shares()), first[kSums]};
  shares = torch::stable::empty(size, dtype, std::nullopt, x.device());
  lay_out_weights();
  if (parts.shares() == 0) torch::stable::zero_(shares);
  for_each(parts.shares() * parts.blocks, [&](int64_t i) { walk(*this, i); });
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
  const int64_t small = std::min(kTaskPixels / image, n * p.blocks / kTasks);
  p.images = std::clamp<int64_t>(std::max(small, ceil_div(n, kShares)), 1, n);
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
  // Few scalars are added sooner than a thread wakes up.
  constexpr int64_t kAlone = 100'000;
  const int64_t count = parts.shares(), all = first[kSums], chunk = count * all > kAlone ? 32 * kPanel : all;
  if (count <= 1 || all == 0) return;
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

}  // namespace cnnfast::cpu
