// Depthwise convolution's gradients, a row of the input at a time, for a block of channels.
//
// A task (csrc/cpu/depthwise_conv2d_backward.cpp) walks down an image's rows once, for both gradients:
//   g  = (grad + add + y times) activation'(z)   rows of the output side, a ring of those that the window spans
//   a  = pre_activation(x scale + shift)         the row of the input
//   da = sum over taps of g weight, dweight += sum over the row of g a: each g and each a is loaded once for both
//   dx = da pre_activation'(x scale + shift) scale, and the sums that are the gradients of scale and shift
//
// Layout   grad, y, x, dx: pixels of contiguous channels, in their storage; g, a, da: the same in scratch, of the compute
//          type, whole panels. Where a is x and da is dx, those are used where they lie.
// Tile     kPanel channels x a strip of 7 (stride 2: 8) pixels of x's row, for up to 3 rows of the window: 18 registers of
//          weights and their gradients, which stay for the whole row, 3 of da, 3 of a, 1 of g. 3 and 5 taps side by side
//          at stride 1 and 2, dilation 1, are unrolled (5 and AVX2: one row of the window at once); anything else, and
//          everything in the generic kernels, goes tap by tap over the row.
// Bytes    grad (and y) and x are read once from memory, dx written once; from L1 a vector of g, a and da for 6 to 18 FMAs.
// Sums     of a row along the row, then added to those of the rows before: short chains, the same bits whatever the
//          threads, and whichever gradients are asked for.
// Padding  taps outside the image are skipped, not multiplied by zero.
#pragma once
#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTapStrip = 7, kTapRows = 3;
#elif defined(__AVX2__)
constexpr int kTapStrip = 4, kTapRows = 1;
#else
constexpr int kTapStrip = 0, kTapRows = 0;
#endif

// f(channel, count) for each panel of `channels`; count is a constant where the panel is whole, so that loads and stores
// need no mask.
template <class F>
CNNFAST_INLINE void each_panel(int64_t channels, F f) {
  int64_t channel = 0;
  for (; channel + kPanel <= channels; channel += kPanel) f(channel, Constant<kPanel>{});
  if (channel < channels) f(channel, channels - channel);
}

// Of `count` channels, S or T, `step` scalars apart.
template <class S, class T, class Count>
CNNFAST_INLINE Vec<S> load_every(const T* p, int64_t step, Count count) {
  if (step == 1) return load<S>(p, count);
  S lanes[kPanel] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i * step]);
  return load<S>(lanes);
}

// Asks for the row that comes next, a panel at each step of the row that is passed panel by panel: in the order of the
// addresses, which prefetchers follow, as they don't follow the panel's.
template <class T>
struct Ahead {
  const T* next;
  int64_t step;
  CNNFAST_INLINE Ahead(const void* row, int64_t ahead, int64_t channel, int64_t pixels)
      : next(static_cast<const T*>(row) + (ahead ? ahead + channel * pixels : 0)), step(ahead ? kPanel : 0) {}
  CNNFAST_INLINE void operator()(int64_t pixel) const { __builtin_prefetch(next + pixel * step, 0, 2); }
};

template <class T>
void depthwise_output_gradient(const DepthwiseOutputGradientTile& t) {
  using S = typename Compute<T>::type;
  const int64_t m = t.multiplier, pixels = t.pixels, pixel = t.pixel, g_pixel = t.g_pixel;
  const auto panel = [&](int64_t q, int64_t channel, auto count, auto step) {
    const int64_t k = channel * m + q;
    const auto of_channels = [&](const void* p) {
      return p ? load_every<S>(static_cast<const S*>(p) + k, step, count) : Vec<S>::zero();
    };
    const Vec<S> plus = of_channels(t.add), times = of_channels(t.times);
    const T* grad = static_cast<const T*>(t.grad) + k;
    const T* y = static_cast<const T*>(t.y) + (t.y ? k : 0);
    const S* z = static_cast<const S*>(t.z) + k;
    S* g = static_cast<S*>(t.g) + q * t.g_plane + channel;
    Vec<S> sum = Vec<S>::zero();
    const auto row = [&](auto value) {
      for (int64_t i = 0; i < pixels; ++i, g += g_pixel) {
        const Vec<S> v = value(i);
        store(g, v);
        sum = add(sum, v);
      }
    };
    const Ahead<T> grad_ahead(t.grad, t.ahead, channel, pixels), y_ahead(t.y, t.y ? t.ahead : 0, channel, pixels);
    const auto grad_at = [&](int64_t i) {
      grad_ahead(i);
      return load_every<S>(grad + i * pixel, step, count);
    };
    const auto y_at = [&](int64_t i) {
      y_ahead(i);
      return load_every<S>(y + i * pixel, step, count);
    };
    if (t.activation.code)
      row([&](int64_t i) {
        return activation_gradient(add(grad_at(i), plus), load_every<S>(z + i * t.z_pixel, step, count), t.activation);
      });
    else if (y)
      row([&](int64_t i) { return add(fma(y_at(i), times, plus), grad_at(i)); });
    else if (t.add)
      row([&](int64_t i) { return add(grad_at(i), plus); });
    else
      row([&](int64_t i) { return grad_at(i); });
    if (!t.sums) return;
    S* sums = static_cast<S*>(t.sums) + q * t.sums_plane + channel;
    store(sums, add(load<S>(sums), sum));
  };
  if (m == 1)
    return each_panel(t.channels, [&](int64_t channel, auto count) { panel(0, channel, count, Constant<1>{}); });
  for (int64_t q = 0; q < m; ++q)
    for (int64_t channel = 0; channel < t.channels; channel += kPanel)
      panel(q, channel, smaller(t.channels - channel, kPanel), m);
}

// values to y(values), and their slopes: one copy of the polynomials.
template <class S>
__attribute__((noinline)) void curve_and_slope(S* values, S* slopes, int64_t panels, int64_t code) {
  with_curve(code, [&](auto a) {
    for (int64_t i = 0; i < panels; ++i) {
      const Vec<S> z = load<S>(values + i * kPanel);
      store(values + i * kPanel, a.value(z));
      store(slopes + i * kPanel, a.slope(z));
    }
  });
}

// z = x scale + shift, of a panel of channels.
template <class S>
struct Affine {
  bool scaled;
  Vec<S> scale, shift;
  template <class Count>
  CNNFAST_INLINE Affine(const DepthwiseInputTile& t, int64_t channel, Count count)
      : scaled(t.scale),
        scale(t.scale ? load<S>(static_cast<const S*>(t.scale) + channel, count) : Vec<S>::set(1)),
        shift(t.shift ? load<S>(static_cast<const S*>(t.shift) + channel, count) : Vec<S>::zero()) {}
  CNNFAST_INLINE Vec<S> operator()(Vec<S> x) const { return scaled ? fma(x, scale, shift) : x; }
};

template <class T>
void depthwise_input(const DepthwiseInputTile& t) {
  using S = typename Compute<T>::type;
  const Clamp<S> clamp(t.activation);
  const int64_t pixels = t.pixels, x_pixel = t.x_pixel, a_pixel = t.a_pixel;
  each_panel(t.channels, [&](int64_t channel, auto count) {
    const Affine<S> affine(t, channel, count);
    const T* x = static_cast<const T*>(t.x) + channel;
    S* a = static_cast<S*>(t.a) + channel;
    const Ahead<T> x_ahead(t.x, t.ahead, channel, pixels);
    for (int64_t i = 0; i < pixels; ++i, x += x_pixel, a += a_pixel) {
      x_ahead(i);
      store(a, clamp(affine(load<S>(x, count))));  // a curve's bounds are infinite
    }
  });
  if (!is_clamp(t.activation))
    curve_and_slope(static_cast<S*>(t.a), static_cast<S*>(t.slope), pixels * a_pixel / kPanel, t.activation.code);
}

template <class T>
void depthwise_input_gradient(const DepthwiseInputTile& t) {
  using S = typename Compute<T>::type;
  const int64_t pixels = t.pixels, x_pixel = t.x_pixel, a_pixel = t.a_pixel;
  const Activation clamp = t.activation;
  each_panel(t.channels, [&](int64_t channel, auto count) {
    const Affine<S> affine(t, channel, count);
    const T* x = static_cast<const T*>(t.x) + channel;
    T* dx = static_cast<T*>(t.dx) + (t.dx ? channel : 0);
    const S* da = static_cast<const S*>(t.da) + channel;
    const S* slope = static_cast<const S*>(t.slope) + channel;
    Vec<S> products = Vec<S>::zero(), sum = Vec<S>::zero();
    const Ahead<T> dx_ahead(t.dx, dx ? t.ahead : 0, channel, pixels);
    const auto row = [&](auto gradient) {
      for (int64_t i = 0; i < pixels; ++i) {
        const Vec<S> v = load<S>(x + i * x_pixel, count), dz = gradient(i, v);
        products = fma(dz, v, products);
        sum = add(sum, dz);
        if (!dx) continue;
        dx_ahead(i);
        store(dx + i * x_pixel, affine.scaled ? mul(dz, affine.scale) : dz, count);
      }
    };
    const auto da_at = [&](int64_t i) { return load<S>(da + i * a_pixel); };
    if (clamp.code == 0)
      row([&](int64_t i, Vec<S>) { return da_at(i); });
    else if (is_clamp(clamp))
      row([&](int64_t i, Vec<S> v) { return activation_gradient(da_at(i), affine(v), clamp); });
    else
      row([&](int64_t i, Vec<S>) { return mul(da_at(i), load<S>(slope + i * a_pixel)); });
    const auto add_to = [&](void* sums, Vec<S> of_row) {
      S* const p = static_cast<S*>(sums) + (sums ? channel : 0);
      if (sums) store(p, add(load<S>(p), of_row));
    };
    add_to(t.scale_sums, products);
    add_to(t.shift_sums, sum);
  });
}

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
template <class S, int R>
struct TapsRow {
  const S* grad[R];
  const S* a;
  S* dx;
  int64_t grad_pixel, a_pixel, dx_pixel;
  bool added;
  Ahead<S> grad_ahead, a_ahead, dx_ahead;
};

// R rows of the window over a strip, from pixel iw and output ow on. Edge: a bit for each output column and each pixel
// that is there.
template <class S, int K, int Stride, int R, int Strip, bool Dx, bool Dw, bool Edge>
CNNFAST_INLINE void depthwise_taps_strip(const TapsRow<S, R>& row, int64_t ow, int64_t iw, const Vec<S> (&w)[R * K],
                                         Vec<S> (&dw)[R * K], uint32_t outputs, uint32_t inputs) {
  using C = Columns<K, Stride, Strip>;
  const S* a = row.a + iw * row.a_pixel;
  S* dx = Dx ? row.dx + iw * row.dx_pixel : nullptr;
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
      if constexpr (Dw) x[o] = load<S>(a + o * row.a_pixel);
      if constexpr (Dx) sum[o] = row.added ? load<S>(dx + o * row.dx_pixel) : Vec<S>::zero();
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
        if (C::last(o) == c && (!Edge || inputs >> o & 1)) store(dx + o * row.dx_pixel, sum[o]);
    }
  }
}

template <class S, int K, int Stride, int R, bool Dx, bool Dw>
void depthwise_taps_rows(const DepthwiseTapsTile& t, const DepthwiseTaps* taps, bool added) {
  constexpr int kStrip = (kTapStrip + Stride - 1) / Stride * Stride;
  const int64_t pad = t.window.pad_left, width = t.width, out_width = t.out_width;
  for (int64_t channel = 0; channel < t.channels; channel += kPanel) {
    TapsRow<S, R> row{{},
                      static_cast<const S*>(t.a) + channel,
                      Dx ? static_cast<S*>(t.dx) + channel : nullptr,
                      t.grad_pixel,
                      t.a_pixel,
                      t.dx_pixel,
                      added,
                      {taps[0].grad, t.grad_ahead, channel, width},
                      {t.a, t.ahead, channel, width},
                      {t.dx, Dx ? t.ahead : 0, channel, width}};
    Vec<S> w[R * K], dw[R * K];
#pragma GCC unroll 16
    for (int i = 0; i < R * K; ++i) {
      row.grad[i / K] = static_cast<const S*>(taps[i / K].grad) + channel;
      if constexpr (Dx) w[i] = load<S>(static_cast<const S*>(taps[i / K].weight) + i % K * t.weight_tap + channel);
      dw[i] = Vec<S>::zero();
    }
    const auto strip = [&]<int Strip, bool Edge>(int64_t iw) {
      using C = Columns<K, Stride, Strip>;
      const int64_t ow = (iw + pad) / Stride - C::kBefore;
      depthwise_taps_strip<S, K, Stride, R, Strip, Dx, Dw, Edge>(
          row, ow, iw, w, dw, Edge ? bits(-ow, out_width - ow) : 0, Edge ? bits(-iw, width - iw) : 0);
    };
    using Inner = Columns<K, Stride, kStrip>;
    int64_t iw = -(pad % Stride);
    for (; iw < width && (iw < 0 || (iw + pad) / Stride < Inner::kBefore); iw += Stride)
      strip.template operator()<Stride, true>(iw);
    const int64_t last = smaller(width - kStrip, (out_width - Inner::kCount + Inner::kBefore) * Stride - pad);
    for (; iw <= last; iw += kStrip) strip.template operator()<kStrip, false>(iw);
    for (; iw < width; iw += Stride) strip.template operator()<Stride, true>(iw);
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
template <class S, int K, int Stride, bool Dx, bool Dw>
void depthwise_taps_rows(const DepthwiseTapsTile& t) {
  constexpr int kMost = K == 3 ? smaller(kTapRows, Stride == 1 ? 3 : 2) : 1;
  int64_t row = 0;
  if constexpr (kMost >= 3)
    for (; row + 3 <= t.rows; row += 3) depthwise_taps_rows<S, K, Stride, 3, Dx, Dw>(t, t.taps + row, row > 0);
  if constexpr (kMost >= 2)
    for (; row + 2 <= t.rows; row += 2) depthwise_taps_rows<S, K, Stride, 2, Dx, Dw>(t, t.taps + row, row > 0);
  for (; row < t.rows; ++row) depthwise_taps_rows<S, K, Stride, 1, Dx, Dw>(t, t.taps + row, row > 0);
}

template <class S, int K, int Stride>
void depthwise_taps_rows(const DepthwiseTapsTile& t) {
  const bool dweight = t.taps[0].dweight;
  if (t.dx && dweight) return depthwise_taps_rows<S, K, Stride, true, true>(t);
  if (t.dx) return depthwise_taps_rows<S, K, Stride, true, false>(t);
  if (dweight) depthwise_taps_rows<S, K, Stride, false, true>(t);
}

// One tap of any window over the row.
template <class S>
CNNFAST_INLINE void depthwise_tap(const DepthwiseTapsTile& t, const DepthwiseTaps& taps, int64_t j, int64_t channel) {
  const Window& win = t.window;
  const S* w = static_cast<const S*>(taps.weight) + j * t.weight_tap + channel;
  const Vec<S> weight = t.dx ? load<S>(w) : Vec<S>::zero();
  Vec<S> sum = Vec<S>::zero();
  for (int64_t ow = 0; ow < t.out_width; ++ow) {
    const int64_t iw = ow * win.stride_w - win.pad_left + j * win.dilation_w;
    if (iw < 0 || iw >= t.width) continue;
    const Vec<S> g = load<S>(static_cast<const S*>(taps.grad) + ow * t.grad_pixel + channel);
    if (taps.dweight) sum = fma(g, load<S>(static_cast<const S*>(t.a) + iw * t.a_pixel + channel), sum);
    if (t.dx) {
      S* dx = static_cast<S*>(t.dx) + iw * t.dx_pixel + channel;
      store(dx, fma(g, weight, load<S>(dx)));
    }
  }
  if (!taps.dweight) return;
  S* const to = static_cast<S*>(taps.dweight) + j * t.weight_tap + channel;
  store(to, add(load<S>(to), sum));
}

template <class S>
void depthwise_taps(const DepthwiseTapsTile& t) {
  const Window& win = t.window;
  if constexpr (kTapStrip > 0) {
    if (t.rows > 0 && win.dilation_w == 1 && win.stride_w <= 2) {
      const bool two = win.stride_w == 2;
      if (win.kernel_w == 3) return two ? depthwise_taps_rows<S, 3, 2>(t) : depthwise_taps_rows<S, 3, 1>(t);
      if (win.kernel_w == 5) return two ? depthwise_taps_rows<S, 5, 2>(t) : depthwise_taps_rows<S, 5, 1>(t);
    }
  }
  for (int64_t channel = 0; channel < t.channels; channel += kPanel) {
    for (int64_t iw = 0; t.dx && iw < t.width; ++iw)
      store(static_cast<S*>(t.dx) + iw * t.dx_pixel + channel, Vec<S>::zero());
    for (int64_t row = 0; row < t.rows; ++row)
      for (int64_t j = 0; j < win.kernel_w; ++j) depthwise_tap<S>(t, t.taps[row], j, channel);
  }
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
