// Activations on panels of lanes: clamps (identity, relu, relu6) in one or two instructions; sigmoid, SiLU, GELU and tanh
// by polynomials in float32, by the C library in float64, where they check the algorithms.
//
// Errors   float32, against the exact function of the float32 argument, for every ISA (tests/cpu_host/test_activations.py):
//          y in units of 2^-24 |y|: sigmoid 3, silu 4, gelu 10, tanh 3 (measured over all floats from 2^-13 to 128: 2.5,
//          3.4, 9.8, 2.4). Where sigmoid would be below 2^-126 (x < -87.3), and Phi in GELU below 1e-37 (x < -12.7), it
//          is 0. y', for gradients, in units of 2^-24: sigmoid 2, silu 5, gelu 6, tanh 3.
// Special  as PyTorch's: a NaN stays; SiLU and GELU of -Inf are NaN (-Inf * 0), of +Inf +Inf.
// Method   exp by Cody and Waite's reduction and a polynomial on [-ln 2 / 2, ln 2 / 2]; sigmoid from exp; tanh odd
//          polynomial up to 0.625, from exp beyond; Phi(x) = erfc(-x / sqrt 2) / 2 by erfc(z) = exp(-z^2) P(1 / (1 + q z))
//          (the form of Abramowitz and Stegun 7.1.26). Coefficients are minimax by Remez's algorithm.
#pragma once
#include "vec.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// c[0] + x (c[1] + x (c[2] + ...))
template <int N>
CNNFAST_INLINE Vec<float> polynomial(Vec<float> x, const float (&c)[N]) {
  Vec<float> sum = Vec<float>::set(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, Vec<float>::set(c[i]));
  return sum;
}

CNNFAST_INLINE Vec<float> constant(float value) { return Vec<float>::set(value); }

constexpr float kExpLimit = 87.3f;  // exp stays a normal number
constexpr float kPhiLimit = 12.7f;

// |x| <= kExpLimit
CNNFAST_INLINE Vec<float> exponential(Vec<float> x) {
  constexpr float kCoefficients[] = {0.499999934125f, 0.166665201081f, 0.0416683942383f, 0.00836878039100f,
                                     0.00138144651719f};
  const Vec<float> n = round_to_integer(mul(x, constant(1.44269504f)));
  // x - n ln 2: of ln 2, 17 bits, whose product with n is exact, and the rest.
  const Vec<float> r = fma(n, constant(-0x1.7f7d1cp-20f), fma(n, constant(-0x1.62e4p-1f), x));
  const Vec<float> y = add(constant(1), fma(mul(r, r), polynomial(r, kCoefficients), r));
  return scale_by_power(y, n);
}

// 1 / (1 + exp(-x)), and what is left to 1: a difference would lose its digits.
template <class S>
struct Logistic {
  Vec<S> value, rest;
};
CNNFAST_INLINE Logistic<float> logistic(Vec<float> x) {
  const Vec<float> limit = constant(kExpLimit), least = constant(-kExpLimit), zero = Vec<float>::zero();
  const Vec<float> e = exponential(clamp_high(clamp_low(sub(zero, x), least), limit));
  const Vec<float> y = reciprocal(add(constant(1), e));
  return {select_less(x, least, zero, y), select_less(limit, x, zero, mul(e, y))};
}

CNNFAST_INLINE Vec<float> hyperbolic_tangent(Vec<float> x) {
  constexpr float kCoefficients[] = {-0.333332839251f, 0.133314912841f, -0.0537434979228f, 0.0206505869717f,
                                     -0.00571704484008f};
  const Vec<float> square = mul(x, x), magnitude = absolute(x);
  const Vec<float> small = mul(x, fma(square, polynomial(square, kCoefficients), constant(1)));  // -0 stays
  const Vec<float> e = exponential(clamp_high(add(magnitude, magnitude), constant(kExpLimit)));
  const Vec<float> large = fma(constant(-2), reciprocal(add(constant(1), e)), constant(1));
  const Vec<float> signed_large = select_less(x, Vec<float>::zero(), sub(Vec<float>::zero(), large), large);
  return select_less(magnitude, constant(0.625f), small, signed_large);
}

// exp(-x^2 / 2) for |x| <= kPhiLimit; the rounding of the square is made good, which would be magnified.
CNNFAST_INLINE Vec<float> gaussian(Vec<float> x) {
  const Vec<float> half = mul(x, constant(-0.5f)), q = mul(x, half), e = exponential(q);
  return fma(e, product_error(x, half, q), e);
}

// The normal distribution's integral up to x.
CNNFAST_INLINE Vec<float> normal_integral(Vec<float> x) {
  constexpr float kCoefficients[] = {-1.76341237e-05f, 0.18537797f,  0.178212062f, 0.216598019f, -0.00193677237f,
                                     0.496332616f,     -0.44678518f, 0.518088579f, -0.145869717f};
  constexpr float kQ = 0.3275911f * 0.70710678f;
  const Vec<float> magnitude = clamp_high(absolute(x), constant(kPhiLimit));
  const Vec<float> t = reciprocal(fma(magnitude, constant(kQ), constant(1)));
  const Vec<float> tail = mul(mul(gaussian(magnitude), constant(0.5f)), polynomial(t, kCoefficients));
  const Vec<float> y = select_less(x, Vec<float>::zero(), tail, sub(constant(1), tail));
  return select_less(x, constant(-kPhiLimit), Vec<float>::zero(), y);
}

// f(x) lane by lane: float64.
template <class F>
CNNFAST_INLINE Vec<double> each_lane(Vec<double> x, F f) {
  alignas(64) double lanes[kPanel];
  store(lanes, x);
  for (int i = 0; i < kPanel; ++i) lanes[i] = f(lanes[i]);
  return load<double>(lanes);
}
CNNFAST_INLINE Logistic<double> logistic(Vec<double> x) {
  return {each_lane(x, [](double z) { return 1 / (1 + __builtin_exp(-z)); }),
          each_lane(x, [](double z) { return 1 / (1 + __builtin_exp(z)); })};
}
CNNFAST_INLINE Vec<double> hyperbolic_tangent(Vec<double> x) {
  return each_lane(x, [](double z) { return __builtin_tanh(z); });
}
CNNFAST_INLINE Vec<double> normal_integral(Vec<double> x) {
  return each_lane(x, [](double z) { return 0.5 * __builtin_erfc(-z * 0.70710678118654752440); });
}
CNNFAST_INLINE Vec<double> gaussian(Vec<double> x) {
  return each_lane(x, [](double z) { return __builtin_exp(-0.5 * z * z); });
}

// y and y' of the curved activations.
struct Sigmoid {
  template <class S>
  static CNNFAST_INLINE Vec<S> value(Vec<S> x) {
    return logistic(x).value;
  }
  template <class S>
  static CNNFAST_INLINE Vec<S> slope(Vec<S> x) {
    const Logistic<S> y = logistic(x);
    return mul(y.value, y.rest);
  }
};
struct Silu {
  template <class S>
  static CNNFAST_INLINE Vec<S> value(Vec<S> x) {
    return mul(x, logistic(x).value);
  }
  template <class S>
  static CNNFAST_INLINE Vec<S> slope(Vec<S> x) {
    const Logistic<S> y = logistic(x);
    return mul(y.value, fma(x, y.rest, Vec<S>::set(1)));
  }
};
struct Gelu {
  template <class S>
  static CNNFAST_INLINE Vec<S> value(Vec<S> x) {
    return mul(x, normal_integral(x));
  }
  template <class S>
  static CNNFAST_INLINE Vec<S> slope(Vec<S> x) {
    const Vec<S> limit = Vec<S>::set(kPhiLimit), zero = Vec<S>::zero(), magnitude = absolute(x);
    const Vec<S> density = mul(gaussian(clamp_high(magnitude, limit)), Vec<S>::set(0.39894228040143267794));
    return fma(x, select_less(limit, magnitude, zero, density), normal_integral(x));
  }
};
struct Tanh {
  template <class S>
  static CNNFAST_INLINE Vec<S> value(Vec<S> x) {
    return hyperbolic_tangent(x);
  }
  template <class S>
  static CNNFAST_INLINE Vec<S> slope(Vec<S> x) {
    const Vec<S> y = hyperbolic_tangent(x);
    return fma(sub(Vec<S>::zero(), y), y, Vec<S>::set(1));
  }
};

// Codes as in cnnfast/ops/activations.py; up to this one clamps.
constexpr int64_t kLastClamp = 2;
constexpr bool is_clamp(const Activation& a) { return a.code <= kLastClamp; }

template <class F>
CNNFAST_INLINE void with_curve(int64_t code, F f) {
  switch (code) {
    case 3: return f(Sigmoid{});
    case 4: return f(Silu{});
    case 5: return f(Gelu{});
    case 6: return f(Tanh{});
  }
}

// values[panels][kPanel] = y(values): one copy of the polynomials for all kernels, which hand over whole register tiles.
template <class S>
__attribute__((noinline)) void curve(S* values, int64_t panels, int64_t code) {
  with_curve(code, [&](auto a) {
    for (int64_t i = 0; i < panels; ++i) store(values + i * kPanel, a.value(load<S>(values + i * kPanel)));
  });
}

// Identity's bounds are infinite, so one pair of instructions serves every clamp.
template <class S>
struct Clamp {
  Vec<S> lo, hi;
  explicit CNNFAST_INLINE Clamp(const Activation& a)
      : lo(Vec<S>::set(static_cast<S>(a.lo))), hi(Vec<S>::set(static_cast<S>(a.hi))) {}
  CNNFAST_INLINE Vec<S> operator()(Vec<S> x) const { return clamp_high(clamp_low(x, lo), hi); }
};

// An activation that a loop is compiled for: y of a panel, and grad * y'(z).
template <class S>
struct Unchanged {
  CNNFAST_INLINE Vec<S> operator()(Vec<S> x) const { return x; }
  CNNFAST_INLINE Vec<S> gradient(Vec<S> grad, Vec<S>) const { return grad; }
};
// Passes the gradient inside its bounds, as PyTorch's relu and hardtanh do: not on them, and where z is NaN.
template <class S>
struct Clamped : Clamp<S> {
  using Clamp<S>::Clamp;
  CNNFAST_INLINE Vec<S> gradient(Vec<S> grad, Vec<S> z) const { return select_between(this->lo, z, this->hi, grad); }
};
template <class S, class Curve>
struct Curved {
  CNNFAST_INLINE Vec<S> operator()(Vec<S> x) const { return Curve::value(x); }
  CNNFAST_INLINE Vec<S> gradient(Vec<S> grad, Vec<S> z) const { return mul(grad, Curve::slope(z)); }
};

// f(the activation as one of those): clamps as one, curves each.
template <class S, class F>
CNNFAST_INLINE void with_activation(const Activation& a, F f) {
  if (a.code == 0) return f(Unchanged<S>{});
  if (is_clamp(a)) return f(Clamped<S>(a));
  with_curve(a.code, [&](auto curve) { f(Curved<S, decltype(curve)>{}); });
}

// A register tile through the activation, whose bounds are `clamp`.
template <class S, int N>
CNNFAST_INLINE void activate(Vec<S> (&tile)[N], const Activation& a, const Clamp<S>& clamp) {
  if (a.code == 0) return;
  if (is_clamp(a)) {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) tile[i] = clamp(tile[i]);
    return;
  }
  alignas(64) S values[N * kPanel];
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) store(values + i * kPanel, tile[i]);
  curve(values, N, a.code);
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) tile[i] = load<S>(values + i * kPanel);
}
template <class S, int N>
CNNFAST_INLINE void activate(Vec<S> (&tile)[N], const Activation& a) {
  activate(tile, a, Clamp<S>(a));
}

// One panel, for slow paths.
template <class S>
CNNFAST_INLINE Vec<S> activated(Vec<S> x, const Activation& a) {
  Vec<S> tile[1] = {x};
  activate(tile, a);
  return tile[0];
}

// grad * y'(z) of one panel, for slow paths.
template <class S>
CNNFAST_INLINE Vec<S> activation_gradient(Vec<S> grad, Vec<S> z, const Activation& a) {
  Vec<S> y = grad;
  with_activation<S>(a, [&](const auto& form) CNNFAST_INLINE_LAMBDA { y = form.gradient(grad, z); });
  return y;
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
