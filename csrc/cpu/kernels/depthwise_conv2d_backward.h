// Depthwise convolution's gradients, a row of the input at a time, for a block of channels.
//
// A task (csrc/cpu/depthwise_conv2d_backward.cpp) walks down an image's rows once, for both gradients:
//   g  = (grad + add + y times) activation'(z)   rows of the output side, a ring of those that the window spans
//   a  = pre_activation(x scale + shift)         the row of the input
//   da = sum over taps of g weight, dweight += sum over the row of g a: each g and each a is loaded once for both
//   dx = da pre_activation'(x scale + shift) scale, and the sums that are the gradients of scale and shift
//
// Layout   grad, y, x, dx: pixels of contiguous channels, in their storage; g, a, da: in scratch, of the compute type, panel
//          after panel, so that a row of one is read in order. Where a is x and da is dx, or g is grad, those are used
//          where they lie.
// Tile     kPanel channels x a strip of 5 (stride 2: 6) pixels of x's row, for up to 3 rows of the window: 18 registers of
//          weights and their gradients, which stay for the whole row, 3 of da, 3 of a, 1 of g. 3 and 5 taps side by side
//          at stride 1 and 2, dilation 1, are unrolled (5, and AVX2: one row of the window at once); the ends of a row go
//          pixel by pixel (7 and 14 wide: with strips of 7). Anything else, and all of the generic kernels', goes tap by tap.
// Grid     a block of channels, mostly all, of an image; rows of it in L2, the next row asked for meanwhile.
// Bytes    grad (and y) and x are read once from memory, dx written once: 3 (4) vectors for 18 FMAs of 3 x 3, so that
//          memory is the limit, not arithmetic; from L1 a vector of g, a and da for 6 to 18 FMAs.
// Sums     of a row along the row, then added to those of the rows before: short chains, the same bits whatever the
//          threads, and whichever gradients are asked for.
// Padding  taps outside the image are skipped, not multiplied by zero.
// Limits   broken panels pass through scratch; bfloat16 and float16, too, unless nothing is to be done on the way in or out.
#pragma once
#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

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
    S* g = static_cast<S*>(t.g) + q * t.g_plane + channel / kPanel * t.g_panel;
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
__attribute__((noinline)) void curve_and_slope(S* values, S* slopes, int64_t pixels, int64_t pixel, int64_t code) {
  with_curve(code, [&](auto a) {
    for (int64_t i = 0; i < pixels; ++i) {
      const Vec<S> z = load<S>(values + i * pixel);
      store(values + i * pixel, a.value(z));
      store(slopes + i * pixel, a.slope(z));
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
    S* a = static_cast<S*>(t.a) + channel / kPanel * t.a_panel;
    const Ahead<T> x_ahead(t.x, t.ahead, channel, pixels);
    for (int64_t i = 0; i < pixels; ++i, x += x_pixel, a += a_pixel) {
      x_ahead(i);
      store(a, clamp(affine(load<S>(x, count))));  // a curve's bounds are infinite
    }
  });
  if (!is_clamp(t.activation))
    for (int64_t channel = 0; channel < t.channels; channel += kPanel) {
      const int64_t from = channel / kPanel * t.a_panel;
      curve_and_slope(static_cast<S*>(t.a) + from, static_cast<S*>(t.slope) + from, pixels, a_pixel, t.activation.code);
    }
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
    const S* da = static_cast<const S*>(t.da) + channel / kPanel * t.a_panel;
    const S* slope = static_cast<const S*>(t.slope) + channel / kPanel * t.a_panel;
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

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
