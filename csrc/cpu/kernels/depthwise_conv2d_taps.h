// The sums over the window of depthwise_conv2d_backward.h, a row of the input at a time.
#pragma once
#include <type_traits>

#include "depthwise_conv2d_backward.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTapStrip = 5, kTapRows = 3;  // rows of 28, 56 and so on, less their two ends, are mostly fives
#elif defined(__AVX2__)
constexpr int kTapStrip = 4, kTapRows = 1;
#else
constexpr int kTapStrip = 0, kTapRows = 0;
#endif

// Bits [begin, end) of a mask, as far as there are.
CNNFAST_INLINE uint32_t bits(int64_t begin, int64_t end) {
  const auto below = [](int64_t n) { return (uint64_t{1} << smaller(larger(n, 0), 32)) - 1; };
  return static_cast<uint32_t>(below(end) & ~below(begin));
}

// The window's taps j whose output is column c of a strip for its pixel o: o = Stride (c - kBefore) + j.
template <int K, int Stride, int Strip>
struct Columns {
  static constexpr int kBefore = (K - 1) / Stride, kCount = kBefore + (Strip - 1) / Stride + 1;
  static constexpr int pixel(int c, int j) { return Stride * (c - kBefore) + j; }
  static constexpr int first(int o) {
    return kBefore + (o - (K - 1) + (K - 1) * Stride + Stride - 1) / Stride - (K - 1);
  }
  static constexpr int last(int o) { return kBefore + o / Stride; }
};

// What stays the same along a row; copies, which stores can't change.
template <class T, int R>
struct TapsRow {
  const T* grad[R];
  const T* a;
  T* dx;
  int64_t grad_pixel, pixel;
  bool added;
  Ahead<T> grad_ahead, a_ahead, dx_ahead;
};

// R rows of the window over a strip, from pixel iw and output ow on. Edge: a bit for each output column and each pixel
// that is there.
template <class S, class T, int K, int Stride, int R, int Strip, bool Dx, bool Dw, bool Edge>
CNNFAST_INLINE void depthwise_taps_strip(const TapsRow<T, R>& row, int64_t ow, int64_t iw, const Vec<S> (&w)[R * K],
                                         Vec<S> (&dw)[R * K], uint32_t outputs, uint32_t inputs) {
  using C = Columns<K, Stride, Strip>;
  const T* a = row.a + iw * row.pixel;
  T* dx = Dx ? row.dx + iw * row.pixel : nullptr;
  Vec<S> x[Strip], sum[Strip];
#pragma GCC unroll 16
  for (int o = 0; o < Strip; ++o) {
    row.grad_ahead(iw + o);
    row.a_ahead(iw + o);
    if constexpr (Dx) row.dx_ahead(iw + o);
  }
#pragma GCC unroll 16
  for (int c = 0; c < C::kCount; ++c) {
#pragma GCC unroll 16
    for (int o = 0; o < Strip; ++o) {
      if (C::first(o) != c || (Edge && !(inputs >> o & 1))) continue;
      if constexpr (Dw) x[o] = load<S>(a + o * row.pixel);
      if constexpr (Dx) sum[o] = row.added ? load<S>(dx + o * row.pixel) : Vec<S>::zero();
    }
    if (!Edge || outputs >> c & 1) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<S> g = load<S>(row.grad[r] + (ow + c) * row.grad_pixel);
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) {
          const int o = C::pixel(c, j);
          if (o < 0 || o >= Strip || (Edge && !(inputs >> o & 1))) continue;
          if constexpr (Dx) sum[o] = fma(g, w[r * K + j], sum[o]);
          if constexpr (Dw) dw[r * K + j] = fma(g, x[o], dw[r * K + j]);
        }
      }
    }
    if constexpr (Dx) {
#pragma GCC unroll 16
      for (int o = 0; o < Strip; ++o)
        if (C::last(o) == c && (!Edge || inputs >> o & 1)) store(dx + o * row.pixel, sum[o]);
    }
  }
}

template <class T, int K, int Stride, int R, bool Dx, bool Dw>
void depthwise_taps_rows(const DepthwiseTapsTile& t, const DepthwiseTaps* taps, bool added) {
  using S = typename Compute<T>::type;
  constexpr int kStrip = (kTapStrip + Stride - 1) / Stride * Stride;
  const int64_t pad = t.window.pad_left, width = t.width, out_width = t.out_width;
  const int64_t sevens = pad == 1 && width == out_width && width % 7 == 0 ? width / 7 : 0;
  for (int64_t channel = 0; channel < t.channels; channel += kPanel) {
    const int64_t panel = channel / kPanel * t.panel;
    TapsRow<T, R> row{{},
                      static_cast<const T*>(t.a) + panel,
                      Dx ? static_cast<T*>(t.dx) + panel : nullptr,
                      t.grad_pixel,
                      t.pixel,
                      added,
                      {taps[0].grad, t.grad_ahead, channel, width},
                      {t.a, t.ahead, channel, width},
                      {t.dx, Dx ? t.ahead : 0, channel, width}};
    Vec<S> w[R * K], dw[R * K];
#pragma GCC unroll 16
    for (int i = 0; i < R * K; ++i) {
      row.grad[i / K] = static_cast<const T*>(taps[i / K].grad) + channel / kPanel * t.grad_panel;
      if constexpr (Dx) w[i] = load<S>(static_cast<const S*>(taps[i / K].weight) + i % K * t.weight_tap + channel);
      dw[i] = Vec<S>::zero();
    }
    const auto strip = [&]<int Strip, bool Edge>(int64_t iw) CNNFAST_INLINE_LAMBDA {
      using C = Columns<K, Stride, Strip>;
      const int64_t ow = (iw + pad) / Stride - C::kBefore;
      depthwise_taps_strip<S, T, K, Stride, R, Strip, Dx, Dw, Edge>(
          row, ow, iw, w, dw, Edge ? bits(-ow, out_width - ow) : 0, Edge ? bits(-iw, width - iw) : 0);
    };
    const auto strips = [&]() CNNFAST_INLINE_LAMBDA {
      using Inner = Columns<K, Stride, kStrip>;
      int64_t iw = -(pad % Stride);
      for (; iw < width && (iw < 0 || (iw + pad) / Stride < Inner::kBefore); iw += Stride)
        strip.template operator()<Stride, true>(iw);
      const int64_t last = smaller(width - kStrip, (out_width - Inner::kCount + Inner::kBefore) * Stride - pad);
      for (; iw <= last; iw += kStrip) strip.template operator()<kStrip, false>(iw);
      for (; iw < width; iw += Stride) strip.template operator()<Stride, true>(iw);
    };
    // Of these, mostly small and many, the edges are known beforehand.
    const auto seven = [&](int64_t iw, uint32_t outputs) CNNFAST_INLINE_LAMBDA {
      depthwise_taps_strip<S, T, K, Stride, R, 7, Dx, Dw, true>(row, iw - 1, iw, w, dw, outputs, 0b1111111);
    };
    if constexpr (K == 3 && Stride == 1 && R > 1) {
      if (sevens == 1) {
        seven(0, 0b011111110);
      } else if (sevens == 2) {
        seven(0, 0b111111110);
        seven(7, 0b011111111);
      } else {
        strips();
      }
    } else {
      strips();
    }
    if constexpr (Dw) {
#pragma GCC unroll 16
      for (int i = 0; i < R * K; ++i) {
        S* const to = static_cast<S*>(taps[i / K].dweight) + i % K * t.weight_tap + channel;
        store(to, add(load<S>(to), dw[i]));
      }
    }
  }
}

// Rows of the window, as many at once as have registers.
template <class T, int K, int Stride, bool Dx, bool Dw>
void depthwise_taps_rows(const DepthwiseTapsTile& t) {
  constexpr int kMost = K == 3 ? smaller(kTapRows, Stride == 1 ? 3 : 2) : 1;
  int64_t row = 0;
  if constexpr (kMost >= 3)
    for (; row + 3 <= t.rows; row += 3) depthwise_taps_rows<T, K, Stride, 3, Dx, Dw>(t, t.taps + row, row > 0);
  if constexpr (kMost >= 2)
    for (; row + 2 <= t.rows; row += 2) depthwise_taps_rows<T, K, Stride, 2, Dx, Dw>(t, t.taps + row, row > 0);
  for (; row < t.rows; ++row) depthwise_taps_rows<T, K, Stride, 1, Dx, Dw>(t, t.taps + row, row > 0);
}

template <class T, int K, int Stride>
void depthwise_taps_rows(const DepthwiseTapsTile& t) {
  const bool dweight = t.taps[0].dweight;
  if (t.dx && dweight) return depthwise_taps_rows<T, K, Stride, true, true>(t);
  if (t.dx) return depthwise_taps_rows<T, K, Stride, true, false>(t);
  if (dweight) depthwise_taps_rows<T, K, Stride, false, true>(t);
}

// One tap of any window over the row.
template <class S>
CNNFAST_INLINE void depthwise_tap(const DepthwiseTapsTile& t, const DepthwiseTaps& taps, int64_t j, int64_t channel) {
  const Window& win = t.window;
  const S* w = static_cast<const S*>(taps.weight) + j * t.weight_tap + channel;
  const Vec<S> weight = t.dx ? load<S>(w) : Vec<S>::zero();
  const int64_t panel = channel / kPanel * t.panel;
  Vec<S> sum = Vec<S>::zero();
  for (int64_t ow = 0; ow < t.out_width; ++ow) {
    const int64_t iw = ow * win.stride_w - win.pad_left + j * win.dilation_w;
    if (iw < 0 || iw >= t.width) continue;
    const Vec<S> g = load<S>(static_cast<const S*>(taps.grad) + ow * t.grad_pixel + channel / kPanel * t.grad_panel);
    if (taps.dweight) sum = fma(g, load<S>(static_cast<const S*>(t.a) + iw * t.pixel + panel), sum);
    if (t.dx) {
      S* dx = static_cast<S*>(t.dx) + iw * t.pixel + panel;
      store(dx, fma(g, weight, load<S>(dx)));
    }
  }
  if (!taps.dweight) return;
  S* const to = static_cast<S*>(taps.dweight) + j * t.weight_tap + channel;
  store(to, add(load<S>(to), sum));
}

template <class T>
void depthwise_taps(const DepthwiseTapsTile& t) {
  using S = typename Compute<T>::type;
  const Window& win = t.window;
  if constexpr (kTapStrip > 0) {
    if (t.rows > 0 && win.dilation_w == 1 && win.stride_w <= 2) {
      const bool two = win.stride_w == 2;
      if (win.kernel_w == 3) return two ? depthwise_taps_rows<T, 3, 2>(t) : depthwise_taps_rows<T, 3, 1>(t);
      if constexpr (std::is_same_v<T, S>)
        if (win.kernel_w == 5) return two ? depthwise_taps_rows<T, 5, 2>(t) : depthwise_taps_rows<T, 5, 1>(t);
    }
  }
  for (int64_t channel = 0; channel < t.channels; channel += kPanel) {
    for (int64_t iw = 0; t.dx && iw < t.width; ++iw)
      store(static_cast<T*>(t.dx) + iw * t.pixel + channel / kPanel * t.panel, Vec<S>::zero());
    if constexpr (std::is_same_v<T, S>)
      for (int64_t row = 0; row < t.rows; ++row)
        for (int64_t j = 0; j < win.kernel_w; ++j) depthwise_tap<S>(t, t.taps[row], j, channel);
  }
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
