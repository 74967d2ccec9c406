// The vocabulary of the kernels: Vec<S>, kPanel lanes of the compute type, with load, store, fma, activate.
// Every name has internal linkage in an ISA's own namespace, so that the linker can never give one ISA another's copy.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

#define CNNFAST_INLINE inline __attribute__((always_inline))
#define CNNFAST_INLINE_LAMBDA __attribute__((always_inline))

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <auto Value>
struct Constant {
  static constexpr auto value = Value;
  constexpr operator decltype(Value)() const { return Value; }
};

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <class To, class From>
CNNFAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Storage <-> compute, one scalar; rounding to nearest even.
CNNFAST_INLINE float widen(float x) { return x; }
CNNFAST_INLINE double widen(double x) { return x; }
CNNFAST_INLINE float widen(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
CNNFAST_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // Inf, NaN
  // 2^112 moves the exponent's bias from 15 to 127 and normalises subnormals on the way.
  const float magnitude = bit_cast<float>(rest << 13) * bit_cast<float>(0x77800000u);
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
}

template <class T>
T narrow(typename Compute<T>::type x);
template <>
CNNFAST_INLINE float narrow<float>(float x) {
  return x;
}
template <>
CNNFAST_INLINE double narrow<double>(double x) {
  return x;
}
template <>
CNNFAST_INLINE bf16 narrow<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
CNNFAST_INLINE f16 narrow<f16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), rest = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or more: Inf
  if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
    const float shifted = bit_cast<float>(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13))};
}

// Portable form: the compiler's vector extension, any element type.
template <class S>
struct Vec {
  typedef S Lanes __attribute__((vector_size(sizeof(S) * kPanel)));
  Lanes v;

  static CNNFAST_INLINE Vec zero() { return {Lanes{}}; }
  static CNNFAST_INLINE Vec set(S s) { return {Lanes{} + s}; }
};

template <class S>
CNNFAST_INLINE Vec<S> fma(Vec<S> a, Vec<S> b, Vec<S> c) {
  return {a.v * b.v + c.v};
}
template <class S>
CNNFAST_INLINE Vec<S> add(Vec<S> a, Vec<S> b) {
  return {a.v + b.v};
}
template <class S>
CNNFAST_INLINE Vec<S> mul(Vec<S> a, Vec<S> b) {
  return {a.v * b.v};
}
// A NaN in x stays: the comparison is false.
template <class S>
CNNFAST_INLINE Vec<S> clamp_low(Vec<S> x, Vec<S> lo) {
  return {x.v < lo.v ? lo.v : x.v};
}
template <class S>
CNNFAST_INLINE Vec<S> clamp_high(Vec<S> x, Vec<S> hi) {
  return {x.v > hi.v ? hi.v : x.v};
}

template <class S>
CNNFAST_INLINE Vec<S> sub(Vec<S> a, Vec<S> b) {
  return {a.v - b.v};
}
template <class S>
CNNFAST_INLINE Vec<S> divide(Vec<S> a, Vec<S> b) {
  return {a.v / b.v};
}
template <class S>
CNNFAST_INLINE Vec<S> square_root(Vec<S> x) {
  for (int i = 0; i < kPanel; ++i)
    x.v[i] = sizeof(S) == sizeof(double) ? __builtin_sqrt(x.v[i]) : __builtin_sqrtf(x.v[i]);
  return x;
}
template <class S>
CNNFAST_INLINE Vec<S> reciprocal(Vec<S> x) {
  return {Vec<S>::set(1).v / x.v};
}
// a b - product, where that is a b rounded. Exact: factors of 12 bits have exact products.
template <class S>
CNNFAST_INLINE Vec<S> product_error(Vec<S> a, Vec<S> b, Vec<S> product) {
  static_assert(sizeof(S) == sizeof(float));
  typedef int32_t Bits __attribute__((vector_size(sizeof(int32_t) * kPanel)));
  const auto upper = [](Vec<S> x) { return bit_cast<typename Vec<S>::Lanes>(bit_cast<Bits>(x.v) & ~0xfff); };
  const auto ah = upper(a), bh = upper(b), al = a.v - ah, bl = b.v - bh;
  return {((ah * bh - product.v) + ah * bl + al * bh) + al * bl};
}
// a < b ? x : y; where a or b is NaN, y.
template <class S>
CNNFAST_INLINE Vec<S> select_less(Vec<S> a, Vec<S> b, Vec<S> x, Vec<S> y) {
  return {a.v < b.v ? x.v : y.v};
}
// x is NaN ? a : b
template <class S>
CNNFAST_INLINE Vec<S> select_nan(Vec<S> x, Vec<S> a, Vec<S> b) {
  return {x.v != x.v ? a.v : b.v};
}
// lo < z < hi, or z is NaN ? x : 0
template <class S>
CNNFAST_INLINE Vec<S> select_between(Vec<S> lo, Vec<S> z, Vec<S> hi, Vec<S> x) {
  const Vec<S> zero = Vec<S>::zero();
  return select_nan(z, x, select_less(lo, z, select_less(z, hi, x, zero), zero));
}
// |x|
template <class S>
CNNFAST_INLINE Vec<S> absolute(Vec<S> x) {
  return {x.v < Vec<S>::zero().v ? -x.v : x.v};
}
// The nearest integer, for |x| < 2^22: beyond 2^23 a float has no fraction left.
template <class S>
CNNFAST_INLINE Vec<S> round_to_integer(Vec<S> x) {
  const Vec<S> shift = Vec<S>::set(S{12582912});
  return {(x.v + shift.v) - shift.v};
}
// x 2^n, for integers n in [-126, 127].
template <class S>
CNNFAST_INLINE Vec<S> scale_by_power(Vec<S> x, Vec<S> n) {
  static_assert(sizeof(S) == sizeof(float));
  typedef int32_t Integers __attribute__((vector_size(sizeof(int32_t) * kPanel)));
  const Integers bits = (__builtin_convertvector(n.v, Integers) + 127) << 23;
  return {x.v * bit_cast<typename Vec<S>::Lanes>(bits)};
}

// The larger; a NaN in either is the result.
template <class S>
CNNFAST_INLINE Vec<S> maximum(Vec<S> a, Vec<S> b) {
  return {(b.v > a.v || b.v != b.v) ? b.v : a.v};
}

template <class S, class T>
CNNFAST_INLINE Vec<S> load(const T* p, int64_t count = kPanel) {
  alignas(64) S lanes[kPanel] = {};
  if (count >= kPanel)
    for (int i = 0; i < kPanel; ++i) lanes[i] = widen(p[i]);
  else
    for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i]);
  Vec<S> x;
  std::memcpy(&x.v, lanes, sizeof(lanes));
  return x;
}

template <class S, class T>
CNNFAST_INLINE void store(T* p, Vec<S> x, int64_t count = kPanel) {
  alignas(64) S lanes[kPanel];
  std::memcpy(lanes, &x.v, sizeof(lanes));
  if (count >= kPanel)
    for (int i = 0; i < kPanel; ++i) p[i] = narrow<T>(lanes[i]);
  else
    for (int64_t i = 0; i < count; ++i) p[i] = narrow<T>(lanes[i]);
}

// The same, of two.
template <class S, class T>
CNNFAST_INLINE void store_two(T* p, Vec<S> x, T* q, Vec<S> y, int64_t count = kPanel) {
  store(p, x, count);
  store(q, y, count);
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#endif

namespace cnnfast::CNNFAST_ISA {
namespace {

// f(channel, panels) for groups of P panels of `channels`, then for each that is left; panels is a constant.
template <int P, class F>
CNNFAST_INLINE void each_panels(int64_t channels, F f) {
  int64_t channel = 0;
  for (; channel + P * kPanel <= channels; channel += P * kPanel) f(channel, Constant<P>{});
  for (; channel < channels; channel += kPanel) f(channel, Constant<1>{});
}

// f(channel, count) for each panel of `channels`; count is a constant where the panel is whole, so that loads and stores
// need no mask.
template <class F>
CNNFAST_INLINE void each_panel(int64_t channels, F f) {
  int64_t channel = 0;
  for (; channel + kPanel <= channels; channel += kPanel) f(channel, Constant<kPanel>{});
  if (channel < channels) f(channel, channels - channel);
}

// The storage that is known at run time only; element `index` of p.
template <class S>
CNNFAST_INLINE Vec<S> load_storage(const void* p, int64_t index, int64_t count, Storage storage) {
  if constexpr (sizeof(S) == sizeof(double)) {
    return load<S>(static_cast<const S*>(p) + index, count);
  } else {
    if (storage == Storage::bf16) return load<S>(static_cast<const bf16*>(p) + index, count);
    if (storage == Storage::f16) return load<S>(static_cast<const f16*>(p) + index, count);
    return load<S>(static_cast<const float*>(p) + index, count);
  }
}

template <class S>
CNNFAST_INLINE void store_storage(void* p, int64_t index, Vec<S> x, int64_t count, Storage storage) {
  if constexpr (sizeof(S) == sizeof(double)) {
    store(static_cast<S*>(p) + index, x, count);
  } else {
    if (storage == Storage::bf16) return store(static_cast<bf16*>(p) + index, x, count);
    if (storage == Storage::f16) return store(static_cast<f16*>(p) + index, x, count);
    store(static_cast<float*>(p) + index, x, count);
  }
}

template <class S>
CNNFAST_INLINE void store_two_storage(void* p, int64_t index, Vec<S> x, int64_t other, Vec<S> y, int64_t count,
                                      Storage storage) {
  if constexpr (sizeof(S) == sizeof(float))
    if (storage == Storage::bf16)
      return store_two(static_cast<bf16*>(p) + index, x, static_cast<bf16*>(p) + other, y, count);
  store_storage(p, index, x, count, storage);
  store_storage(p, other, y, count, storage);
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
