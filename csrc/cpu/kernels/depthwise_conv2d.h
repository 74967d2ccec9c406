// Depthwise convolution, channels_last.
//
// Layout   x, y: pixels of contiguous channels; weight: taps of contiguous channels (packing.h).
// Tile     kPanel channels x a strip of 7 (or 4) outputs along the row, at stride 1 of two rows, in registers;
//          each x is loaded once an input row, passes the pre-activation once, and serves up to kernel_w outputs of each
//          row. AVX2, with half the registers of half the width: strips of 4, one row, 3 taps at a time, so that of 5
//          taps some x are loaded twice. 3x3 and 5x5 at stride 1 and 2, dilation 1, multiplier 1 are unrolled; anything
//          else, and everything in the generic kernels, runs one output at a time.
// Bytes    x is read kernel_h times (two rows: (kernel_h + 1) / 2) from L1/L2 and once from memory, y written once.
// Sums     the taps row by row, then the bias: the same bits whatever the strip.
// Padding  taps outside the image are skipped, not multiplied by zero: an infinite weight stays out of the border.
#pragma once
#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kStrip = 7, kStripRows = 2, kTaps = 5;
constexpr bool kHoldsRow = true;  // all x of a row, in registers
#elif defined(__AVX2__)
constexpr int kStrip = 4, kStripRows = 1, kTaps = 3;  // 8 accumulators, 6 of weights, 2 of x: a panel is two
constexpr bool kHoldsRow = false;
#else  // no strips: with 16 lanes in four registers they only swell the code
constexpr int kStrip = 0, kStripRows = 0, kTaps = 0;
constexpr bool kHoldsRow = false;
#endif

// `count` output channels from `channel` on, of a pixel with channels / multiplier input channels.
template <class S, class T>
CNNFAST_INLINE Vec<S> load_channels(const T* pixel, int64_t channel, int64_t count, int64_t multiplier) {
  if (multiplier == 1) return load<S>(pixel + channel, count);
  S lanes[kPanel] = {};
  for (int64_t i = 0; i < smaller(count, kPanel); ++i) lanes[i] = widen(pixel[(channel + i) / multiplier]);
  return load<S>(lanes);
}

// One output pixel, any window.
template <class S, class T>
CNNFAST_INLINE Vec<S> depthwise_pixel(const DepthwiseTile& t, int64_t oh, int64_t ow, int64_t channel) {
  const Window& win = t.window;
  const int64_t count = t.channels - channel;
  const T* x = static_cast<const T*>(t.x);
  const S* weight = static_cast<const S*>(t.weight) + channel;
  Vec<S> acc = Vec<S>::zero();
  for (int64_t i = 0; i < win.kernel_h; ++i) {
    const int64_t ih = oh * win.stride_h - win.pad_top + i * win.dilation_h;
    if (ih < 0 || ih >= t.height) continue;
    for (int64_t j = 0; j < win.kernel_w; ++j) {
      const int64_t iw = ow * win.stride_w - win.pad_left + j * win.dilation_w;
      if (iw < 0 || iw >= t.width) continue;
      const T* pixel = x + (ih - t.x_first_row) * t.x_row + iw * t.x_pixel;
      const Vec<S> w = load<S>(weight + (i * win.kernel_w + j) * t.weight_tap, count);
      acc = fma(activated(load_channels<S>(pixel, channel, count, t.multiplier), t.pre_activation), w, acc);
    }
  }
  return t.bias ? add(acc, load<S>(static_cast<const S*>(t.bias) + channel, count)) : acc;
}

constexpr int64_t kCached = 1'000'000;  // bytes: an image that may be in L2 from the op before

// What happens to each x on its way in.
enum class Pre { identity, relu, clamp };

template <Pre P, class S>
CNNFAST_INLINE Vec<S> pre_activate(Vec<S> x, const Clamp<S>& clamp) {
  if constexpr (P == Pre::identity) return x;
  if constexpr (P == Pre::relu) return clamp_low(x, clamp.lo);  // one instruction: x are most of what is to be done
  return clamp(x);
}

// Where a block's rows lie, and the bounds of clamps, of any channel.
template <class T, int K, int Stride, int Rows>
struct BlockRows {
  BlockRows(const DepthwiseTile& t, int64_t oh, int64_t ow)
      : before(t.pre_activation),
        after(t.activation),
        y((oh - t.row_begin) * t.y_row + ow * t.y_pixel),
        prefetched(t.height * t.x_row * static_cast<int64_t>(sizeof(T)) > kCached) {
    const int64_t first = oh * Stride - t.window.pad_top, column = ow * Stride - t.window.pad_left;
    for (int i = 0; i < kCount; ++i) x[i] = first + i < 0 || first + i >= t.height ? nullptr : at(t, first + i, column);
    next = at(t, first + kCount, column + K / 2);
  }
  static const T* at(const DepthwiseTile& t, int64_t ih, int64_t iw) {
    return static_cast<const T*>(t.x) + (ih - t.x_first_row) * t.x_row + iw * t.x_pixel;
  }

  static constexpr int kCount = Rows + K - 1;
  Clamp<typename Compute<T>::type> before, after;
  const T* x[kCount];  // null: outside the image
  const T* next;       // the first that the rows below will read
  int64_t y;
  bool prefetched;
};

// Rows x Strip outputs, from row oh and column ow on. Edge: columns may lie outside the image (a bit of `inside` each),
// outputs past out_width. Full: a whole panel of channels.
template <class S, class T, int K, int Stride, int Rows, int Strip, Pre P, bool Edge, bool Full>
CNNFAST_INLINE void depthwise_block(const DepthwiseTile& t, const BlockRows<T, K, Stride, Rows>& rows, int64_t ow,
                                    int64_t channel, uint32_t inside) {
  static_assert(Rows == 1 || (Rows == 2 && Stride == 1));
  const int64_t count = Full ? kPanel : t.channels - channel;
  const int64_t x_pixel = t.x_pixel, y_pixel = t.y_pixel, weight_tap = t.weight_tap;
  // The loops over registers must unroll, or the accumulators live on the stack.
  Vec<S> acc[Rows * Strip];
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Strip; ++i) acc[i] = Vec<S>::zero();

  // Rows that the blocks below will add are asked for now: the hardware follows fewer streams than this reads.
  if (rows.prefetched && channel * sizeof(T) % 64 == 0) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows * Stride; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < Strip * Stride; ++c)
        __builtin_prefetch(rows.next + channel + r * t.x_row + c * x_pixel, 0, 2);
  }

  // Row i of those that the block reads, for output rows First to Last.
  const auto add_row = [&]<int First, int Last>(int i) {
    if (!rows.x[i]) return;
    const T* row = rows.x[i] + channel;
    const auto weight = [&](int r, int j) {
      return load<S>(static_cast<const S*>(t.weight) + ((i - r) * K + j) * weight_tap + channel, count);
    };
    const auto input = [&](int c) { return pre_activate<P>(load<S>(row + c * x_pixel, count), rows.before); };
    if constexpr (kHoldsRow && !Edge) {
      // A tap after the other: Rows * Strip products before one waits for another's sum.
      constexpr int kColumns = (Strip - 1) * Stride + K;
      Vec<S> x[kColumns];
#pragma GCC unroll 24
      for (int c = 0; c < kColumns; ++c) x[c] = input(c);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) {
        Vec<S> w[Rows];
#pragma GCC unroll 8
        for (int r = First; r <= Last; ++r) w[r] = weight(r, j);
#pragma GCC unroll 8
        for (int o = 0; o < Strip; ++o) {
          if (Edge && !(inside >> (o * Stride + j) & 1)) continue;
#pragma GCC unroll 8
          for (int r = First; r <= Last; ++r) acc[r * Strip + o] = fma(x[o * Stride + j], w[r], acc[r * Strip + o]);
        }
      }
      return;
    }
    // Taps [tap, end) at a time: as many as have registers.
#pragma GCC unroll 2
    for (int tap = 0; tap < K; tap += kTaps) {
      const int end = tap + kTaps < K ? tap + kTaps : K;
      Vec<S> w[Rows][K];
#pragma GCC unroll 8
      for (int r = First; r <= Last; ++r)
#pragma GCC unroll 8
        for (int j = tap; j < end; ++j) w[r][j] = weight(r, j);
#pragma GCC unroll 24
      for (int c = tap; c < (Strip - 1) * Stride + end; ++c) {
        if (Edge && !(inside >> c & 1)) continue;
        const Vec<S> x = input(c);
#pragma GCC unroll 8
        for (int r = First; r <= Last; ++r)
#pragma GCC unroll 8
          for (int o = 0; o < Strip; ++o) {
            const int j = c - o * Stride;
            if (j >= tap && j < end) acc[r * Strip + o] = fma(x, w[r][j], acc[r * Strip + o]);
          }
      }
    }
  };
  if constexpr (Rows == 1) {
    for (int i = 0; i < K; ++i) add_row.template operator()<0, 0>(i);
  } else {
    add_row.template operator()<0, 0>(0);
    for (int i = 1; i < K; ++i) add_row.template operator()<0, 1>(i);
    add_row.template operator()<1, 1>(K);
  }

  if (t.bias) {
    const Vec<S> bias = load<S>(static_cast<const S*>(t.bias) + channel, count);
#pragma GCC unroll 16
    for (int i = 0; i < Rows * Strip; ++i) acc[i] = add(acc[i], bias);
  }
  activate(acc, t.activation, rows.after);
  // Which storage is asked once, not at every store.
  const auto store_as = [&](Storage storage) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const int64_t y = rows.y + r * t.y_row + channel;
#pragma GCC unroll 8
      for (int o = 0; o < Strip; o += 2) {
        const int64_t at = y + o * y_pixel;
        if (o + 1 < Strip && (!Edge || ow + o + 1 < t.out_width))
          store_two_storage(t.y, at, acc[r * Strip + o], at + y_pixel, acc[r * Strip + o + 1], count, storage);
        else if (!Edge || ow + o < t.out_width)
          store_storage(t.y, at, acc[r * Strip + o], count, storage);
      }
    }
  };
  if (t.y_storage == Storage::f32)
    store_as(Storage::f32);
  else if (t.y_storage == Storage::bf16)
    store_as(Storage::bf16);
  else
    store_as(t.y_storage);
}

// All channels of Rows x Strip outputs: each pixel is read from its first channel to its last, as prefetchers like it.
template <class S, class T, int K, int Stride, int Rows, int Strip, Pre P>
void depthwise_channels(const DepthwiseTile& t, int64_t oh, int64_t ow) {
  const int64_t iw0 = ow * Stride - t.window.pad_left;
  const bool edge = iw0 < 0 || iw0 + (Strip - 1) * Stride + K > t.width || ow + Strip > t.out_width;
  uint32_t inside = 0;
  for (int64_t c = 0; c < (Strip - 1) * Stride + K; ++c) inside |= uint32_t{iw0 + c >= 0 && iw0 + c < t.width} << c;
  const BlockRows<T, K, Stride, Rows> rows(t, oh, ow);
  int64_t channel = 0;
  if (edge) {
    for (; channel + kPanel <= t.channels; channel += kPanel)
      depthwise_block<S, T, K, Stride, Rows, Strip, P, true, true>(t, rows, ow, channel, inside);
  } else {
    for (; channel + kPanel <= t.channels; channel += kPanel)
      depthwise_block<S, T, K, Stride, Rows, Strip, P, false, true>(t, rows, ow, channel, inside);
  }
  if (channel < t.channels) depthwise_block<S, T, K, Stride, Rows, Strip, P, true, false>(t, rows, ow, channel, inside);
}

template <class S, class T, int K, int Stride, int Rows, Pre P>
void depthwise_rows(const DepthwiseTile& t, int64_t oh) {
  for (int64_t ow = 0; ow < t.out_width;) {
    if (t.out_width - ow > 4) {
      depthwise_channels<S, T, K, Stride, Rows, kStrip, P>(t, oh, ow);
      ow += kStrip;
    } else {
      depthwise_channels<S, T, K, Stride, Rows, 4, P>(t, oh, ow);
      ow += 4;
    }
  }
}

template <class S, class T, int K, int Stride, Pre P>
void depthwise_strips(const DepthwiseTile& t) {
  int64_t oh = t.row_begin;
  if constexpr (kStripRows == 2 && Stride == 1 && P != Pre::clamp)  // which no network has: not worth the code
    for (; oh + 1 < t.row_end; oh += 2) depthwise_rows<S, T, K, 1, 2, P>(t, oh);
  for (; oh < t.row_end; ++oh) depthwise_rows<S, T, K, Stride, 1, P>(t, oh);
}

template <class S, class T, int K, int Stride>
void depthwise_strips(const DepthwiseTile& t) {
  if (t.pre_activation.code == 0) return depthwise_strips<S, T, K, Stride, Pre::identity>(t);
  if (t.pre_activation.code == 1) return depthwise_strips<S, T, K, Stride, Pre::relu>(t);
  depthwise_strips<S, T, K, Stride, Pre::clamp>(t);
}

template <class S, class T>
void depthwise_any(const DepthwiseTile& t) {
  for (int64_t oh = t.row_begin; oh < t.row_end; ++oh)
    for (int64_t ow = 0; ow < t.out_width; ++ow)
      for (int64_t channel = 0; channel < t.channels; channel += kPanel) {
        const int64_t count = t.channels - channel;
        const int64_t y = (oh - t.row_begin) * t.y_row + ow * t.y_pixel + channel;
        const Vec<S> sum = depthwise_pixel<S, T>(t, oh, ow, channel);
        store_storage(t.y, y, activated(sum, t.activation), count, t.y_storage);
      }
}

// x in T.
template <class T>
void depthwise(const DepthwiseTile& t) {
  using S = typename Compute<T>::type;
  const Window& w = t.window;
  const bool square = w.kernel_h == w.kernel_w && w.stride_h == w.stride_w && w.dilation_h == 1 && w.dilation_w == 1;
  if constexpr (kStrip > 0) {
    if (square && t.multiplier == 1 && w.stride_h <= 2 && is_clamp(t.pre_activation)) {
      const bool two = w.stride_h == 2;
      if (w.kernel_h == 3) return two ? depthwise_strips<S, T, 3, 2>(t) : depthwise_strips<S, T, 3, 1>(t);
      if (w.kernel_h == 5) return two ? depthwise_strips<S, T, 5, 2>(t) : depthwise_strips<S, T, 5, 1>(t);
    }
  }
  depthwise_any<S, T>(t);
}

template <class S>
void activation_grad(const ActivationGradTile& t) {
  S* grad = static_cast<S*>(t.grad);
  const S* z = static_cast<const S*>(t.z);
  for (int64_t i = 0; i < t.count; i += kPanel) {
    const int64_t count = t.count - i;
    const Vec<S> y = activation_gradient(load<S>(grad + i, count), load<S>(z + i, count), t.activation);
    store(grad + i, y, count);
  }
}

template <class T>
void widen_all(const void* from, void* to, int64_t count) {
  using S = typename Compute<T>::type;
  const T* x = static_cast<const T*>(from);
  S* y = static_cast<S*>(to);
  for (int64_t i = 0; i < count; i += kPanel) store(y + i, load<S>(x + i, count - i), count - i);
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
