// The vocabulary of the kernels: Vec<S>, kPanel lanes of the compute type, with load, store, fma, activate.
// Every name has internal linkage in an ISA's own namespace, so that the linker can never give one ISA another's copy.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

#define CNNFAST_INLINE inline __attribute__((always_inline))

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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

#if defined(__AVX512F__)

template <>
struct Vec<float> {
  __m512 v;

  static CNNFAST_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static CNNFAST_INLINE Vec set(float s) { return {_mm512_set1_ps(s)}; }
};

template <>
CNNFAST_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
template <>
CNNFAST_INLINE Vec<float> add(Vec<float> a, Vec<float> b) {
  return {_mm512_add_ps(a.v, b.v)};
}
template <>
CNNFAST_INLINE Vec<float> mul(Vec<float> a, Vec<float> b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
// vmaxps and vminps return their second operand where either is NaN.
template <>
CNNFAST_INLINE Vec<float> clamp_low(Vec<float> x, Vec<float> lo) {
  return {_mm512_max_ps(lo.v, x.v)};
}
template <>
CNNFAST_INLINE Vec<float> clamp_high(Vec<float> x, Vec<float> hi) {
  return {_mm512_min_ps(hi.v, x.v)};
}

template <>
CNNFAST_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
  return {_mm512_mask_max_ps(a.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v, b.v)};
}

CNNFAST_INLINE __mmask16 mask(int64_t count) {
  return count >= kPanel ? __mmask16{0xffff} : static_cast<__mmask16>((1u << count) - 1);
}

template <>
CNNFAST_INLINE Vec<float> load<float, float>(const float* p, int64_t count) {
  if (__builtin_constant_p(count) && count >= kPanel) return {_mm512_loadu_ps(p)};
  return {_mm512_maskz_loadu_ps(mask(count), p)};
}
template <>
CNNFAST_INLINE Vec<float> load<float, bf16>(const bf16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask(count), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
template <>
CNNFAST_INLINE Vec<float> load<float, f16>(const f16* p, int64_t count) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(count), p))};
}
template <>
CNNFAST_INLINE void store<float, float>(float* p, Vec<float> x, int64_t count) {
  if (__builtin_constant_p(count) && count >= kPanel) return _mm512_storeu_ps(p, x.v);
  _mm512_mask_storeu_ps(p, mask(count), x.v);
}
template <>
CNNFAST_INLINE void store<float, bf16>(bf16* p, Vec<float> x, int64_t count) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i word = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(p, mask(count), _mm512_cvtepi32_epi16(word));
}
template <>
CNNFAST_INLINE void store<float, f16>(f16* p, Vec<float> x, int64_t count) {
  _mm256_mask_storeu_epi16(p, mask(count), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#endif

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

// Identity's bounds are infinite, so one pair of instructions serves every activation there is so far.
template <class S>
struct Clamp {
  Vec<S> lo, hi;
  explicit CNNFAST_INLINE Clamp(const Activation& a)
      : lo(Vec<S>::set(static_cast<S>(a.lo))), hi(Vec<S>::set(static_cast<S>(a.hi))) {}
  CNNFAST_INLINE Vec<S> operator()(Vec<S> x) const { return clamp_high(clamp_low(x, lo), hi); }
};

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
