// Matrices of 32-bit words turned on their side: weights to panels, pixels to rows of a product.
#pragma once
#include "vec.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

#if defined(__AVX512F__)
// 16 x 16 words.
CNNFAST_INLINE void transpose_words(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

void transpose(const TransposeTile& t) {
  for (int64_t row = 0; row < t.rows; row += 16) {
    const __mmask16 rows = mask(t.rows - row);
    for (int64_t column = 0; column < t.columns; column += 16) {
      const int64_t columns = smaller(t.columns - column, 16);
      const uint32_t* const from = static_cast<const uint32_t*>(t.from) + row * t.from_row + column;
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = rows >> i & 1 ? _mm512_maskz_loadu_epi32(mask(columns), from + i * t.from_row) : _mm512_setzero_si512();
      transpose_words(r);
      uint32_t* const to = static_cast<uint32_t*>(t.to) + column * t.to_row + row;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < columns) _mm512_mask_storeu_epi32(to + i * t.to_row, rows, r[i]);
    }
  }
}
#else
void transpose(const TransposeTile& t) {
  const uint32_t* const from = static_cast<const uint32_t*>(t.from);
  uint32_t* const to = static_cast<uint32_t*>(t.to);
  for (int64_t column = 0; column < t.columns; ++column)
    for (int64_t row = 0; row < t.rows; ++row) to[column * t.to_row + row] = from[row * t.from_row + column];
}
#endif

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
