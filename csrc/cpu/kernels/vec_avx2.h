// Vec<float> on AVX2 and FMA: two registers. Included by vec.h, after the portable form.
#pragma once
#include <immintrin.h>

#include "vec.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

template <>
struct Vec<float> {
  __m256 low, high;

  static CNNFAST_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static CNNFAST_INLINE Vec set(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
};

template <>
CNNFAST_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
template <>
CNNFAST_INLINE Vec<float> add(Vec<float> a, Vec<float> b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
template <>
CNNFAST_INLINE Vec<float> sub(Vec<float> a, Vec<float> b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
template <>
CNNFAST_INLINE Vec<float> mul(Vec<float> a, Vec<float> b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
template <>
CNNFAST_INLINE Vec<float> product_error(Vec<float> a, Vec<float> b, Vec<float> product) {
  return {_mm256_fmsub_ps(a.low, b.low, product.low), _mm256_fmsub_ps(a.high, b.high, product.high)};
}
template <>
CNNFAST_INLINE Vec<float> divide(Vec<float> a, Vec<float> b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
template <>
CNNFAST_INLINE Vec<float> square_root(Vec<float> x) {
  return {_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)};
}
template <>
CNNFAST_INLINE Vec<float> reciprocal(Vec<float> x) {
  const __m256 one = _mm256_set1_ps(1);
  return {_mm256_div_ps(one, x.low), _mm256_div_ps(one, x.high)};
}
// vmaxps and vminps return their second operand where either is NaN.
template <>
CNNFAST_INLINE Vec<float> clamp_low(Vec<float> x, Vec<float> lo) {
  return {_mm256_max_ps(lo.low, x.low), _mm256_max_ps(lo.high, x.high)};
}
template <>
CNNFAST_INLINE Vec<float> clamp_high(Vec<float> x, Vec<float> hi) {
  return {_mm256_min_ps(hi.low, x.low), _mm256_min_ps(hi.high, x.high)};
}
CNNFAST_INLINE __m256 select_less(__m256 a, __m256 b, __m256 x, __m256 y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
template <>
CNNFAST_INLINE Vec<float> select_less(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {select_less(a.low, b.low, x.low, y.low), select_less(a.high, b.high, x.high, y.high)};
}
CNNFAST_INLINE __m256 select_nan(__m256 x, __m256 a, __m256 b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
template <>
CNNFAST_INLINE Vec<float> select_nan(Vec<float> x, Vec<float> a, Vec<float> b) {
  return {select_nan(x.low, a.low, b.low), select_nan(x.high, a.high, b.high)};
}
template <>
CNNFAST_INLINE Vec<float> absolute(Vec<float> x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
template <>
CNNFAST_INLINE Vec<float> round_to_integer(Vec<float> x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
CNNFAST_INLINE __m256 power_of_two(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
template <>
CNNFAST_INLINE Vec<float> scale_by_power(Vec<float> x, Vec<float> n) {
  return {_mm256_mul_ps(x.low, power_of_two(n.low)), _mm256_mul_ps(x.high, power_of_two(n.high))};
}
CNNFAST_INLINE __m256 maximum(__m256 a, __m256 b) { return select_nan(a, a, _mm256_max_ps(a, b)); }
template <>
CNNFAST_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
  return {maximum(a.low, b.low), maximum(a.high, b.high)};
}

// The first `count` of 16 elements of T in a buffer of zeros: what masked loads of 16 bits would be.
template <class T>
struct Part {
  alignas(32) T lanes[kPanel] = {};
  CNNFAST_INLINE Part() {}
  CNNFAST_INLINE Part(const T* p, int64_t count) {
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  }
  CNNFAST_INLINE void copy_to(T* p, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
  }
};

CNNFAST_INLINE __m256i mask(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
}

template <>
CNNFAST_INLINE Vec<float> load<float, float>(const float* p, int64_t count) {
  if (count >= kPanel) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  return {_mm256_maskload_ps(p, mask(count)), _mm256_maskload_ps(p + 8, mask(count - 8))};
}
CNNFAST_INLINE __m256 widen_bf16(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
template <>
CNNFAST_INLINE Vec<float> load<float, bf16>(const bf16* p, int64_t count) {
  if (count >= kPanel) return {widen_bf16(p), widen_bf16(p + 8)};
  const Part<bf16> part(p, count);
  return {widen_bf16(part.lanes), widen_bf16(part.lanes + 8)};
}
CNNFAST_INLINE __m256 widen_f16(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <>
CNNFAST_INLINE Vec<float> load<float, f16>(const f16* p, int64_t count) {
  if (count >= kPanel) return {widen_f16(p), widen_f16(p + 8)};
  const Part<f16> part(p, count);
  return {widen_f16(part.lanes), widen_f16(part.lanes + 8)};
}
template <>
CNNFAST_INLINE void store<float, float>(float* p, Vec<float> x, int64_t count) {
  if (count >= kPanel) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
    return;
  }
  _mm256_maskstore_ps(p, mask(count), x.low);
  _mm256_maskstore_ps(p + 8, mask(count - 8), x.high);
}
CNNFAST_INLINE __m256i narrow_bf16(__m256 x) {  // in the low halves of eight words
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
template <>
CNNFAST_INLINE void store<float, bf16>(bf16* p, Vec<float> x, int64_t count) {
  // packus interleaves the halves of its operands; the permutation sets the quarters right.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow_bf16(x.low), narrow_bf16(x.high)), 0xd8);
  if (count >= kPanel) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
  Part<bf16> part;
  _mm256_store_si256(reinterpret_cast<__m256i*>(part.lanes), words);
  part.copy_to(p, count);
}
template <>
CNNFAST_INLINE void store<float, f16>(f16* p, Vec<float> x, int64_t count) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  Part<f16> part;
  __m128i* to = reinterpret_cast<__m128i*>(count >= kPanel ? p : part.lanes);
  _mm_storeu_si128(to, _mm256_cvtps_ph(x.low, kNearest));
  _mm_storeu_si128(to + 1, _mm256_cvtps_ph(x.high, kNearest));
  if (count < kPanel) part.copy_to(p, count);
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
