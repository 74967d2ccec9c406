// Vec<float> on AVX-512: one register. Included by vec.h, after the portable form.
#pragma once
#include <immintrin.h>

#include "vec.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

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
CNNFAST_INLINE Vec<float> sub(Vec<float> a, Vec<float> b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
template <>
CNNFAST_INLINE Vec<float> product_error(Vec<float> a, Vec<float> b, Vec<float> product) {
  return {_mm512_fmsub_ps(a.v, b.v, product.v)};
}
template <>
CNNFAST_INLINE Vec<float> divide(Vec<float> a, Vec<float> b) {
  return {_mm512_div_ps(a.v, b.v)};
}
template <>
CNNFAST_INLINE Vec<float> square_root(Vec<float> x) {
  return {_mm512_sqrt_ps(x.v)};
}
// 14 bits, then a Newton step: a division takes five times as long.
template <>
CNNFAST_INLINE Vec<float> reciprocal(Vec<float> x) {
  const __m512 r = _mm512_rcp14_ps(x.v);
  return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(x.v, r, _mm512_set1_ps(1)), r)};
}
template <>
CNNFAST_INLINE Vec<float> select_less(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
template <>
CNNFAST_INLINE Vec<float> select_nan(Vec<float> x, Vec<float> a, Vec<float> b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), b.v, a.v)};
}
template <>
CNNFAST_INLINE Vec<float> select_between(Vec<float> lo, Vec<float> z, Vec<float> hi, Vec<float> x) {
  const __mmask16 above = _mm512_cmp_ps_mask(z.v, lo.v, _CMP_NLE_UQ);
  return {_mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, z.v, hi.v, _CMP_NGE_UQ), x.v)};
}
template <>
CNNFAST_INLINE Vec<float> absolute(Vec<float> x) {
  return {_mm512_abs_ps(x.v)};
}
template <>
CNNFAST_INLINE Vec<float> round_to_integer(Vec<float> x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
template <>
CNNFAST_INLINE Vec<float> scale_by_power(Vec<float> x, Vec<float> n) {
  return {_mm512_scalef_ps(x.v, n.v)};
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
  const __m256i bits = __builtin_constant_p(count) && count >= kPanel
                           ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                           : _mm256_maskz_loadu_epi16(mask(count), p);
  // Words to the upper halves of lanes: one instruction where widening and shifting are two.
  const __m512i to_upper = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4,
                                            0, 3, 0, 2, 0, 1, 0, 0, 0);
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, to_upper, _mm512_zextsi256_si512(bits)))};
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
#if defined(__AVX512BF16__)  // subnormals become zero
  const __m256i words = (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
  if (__builtin_constant_p(count) && count >= kPanel)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
  else
    _mm256_mask_storeu_epi16(p, mask(count), words);
}
#if defined(__AVX512BF16__)
// One instruction rounds both, in the time that it takes for one.
template <>
CNNFAST_INLINE void store_two<float, bf16>(bf16* p, Vec<float> x, bf16* q, Vec<float> y, int64_t count) {
  if (!__builtin_constant_p(count) || count < kPanel) {
    store(p, x, count);
    store(q, y, count);
    return;
  }
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_extracti64x4_epi64(both, 1));
}
#endif
template <>
CNNFAST_INLINE void store<float, f16>(f16* p, Vec<float> x, int64_t count) {
  _mm256_mask_storeu_epi16(p, mask(count), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
