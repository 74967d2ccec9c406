// The operands of gradients' products on AMX: tiles of pixels turned on their side, and pairs of pixels in bfloat16.
//
// Layout   pairs: panels of kPanel channels, for each pair of pixels 16 channels x 2 (packing.h, with pixels for the
//          depth); columns: a row of pixels for each channel.
// Tile     16 channels of 32 pixels of bfloat16, or of 16 of floats: 16 registers, transposed in registers.
// Limits   What is rounded to bfloat16 is zero if it is subnormal.
#pragma once
#include "amx.h"
#include "transpose.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// Channels [channel, channel + kPanel) of pixels [first, first + 32); Whole: all of them are there.
template <bool Whole, class Activate>
CNNFAST_INLINE void operand_block(const OperandTile& t, int64_t first, int64_t channel, Activate activate) {
  constexpr int64_t kAhead = 2 * kTileRows;
  const int64_t count = Whole ? kPanel : larger(0, smaller(t.channels - channel, kPanel));
  const __mmask16 lanes = mask(count);
  const auto numbers = [&](const void* p, float otherwise) CNNFAST_INLINE_LAMBDA {
    return p ? _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(p) + channel) : _mm512_set1_ps(otherwise);
  };
  const __m512 scale = numbers(t.scale, 1), shift = numbers(t.shift, 0);
  const bf16* const x = static_cast<const bf16*>(t.x) + channel;
  const bf16* const residual = t.residual ? static_cast<const bf16*>(t.residual) + channel : nullptr;
  // Lines of the pixels to come, one a pair.
  const int64_t ahead = (first + kAhead) * t.x_pixel * 2 + channel * kTileRows * 4;
  const auto floats = [&](const bf16* p) CNNFAST_INLINE_LAMBDA {
    const __m256i bits =
        Whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(lanes, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  };
  const auto value = [&](int64_t pixel) CNNFAST_INLINE_LAMBDA {
    if (!Whole && pixel >= t.pixels) return _mm512_setzero_ps();
    __m512 v = _mm512_fmadd_ps(floats(x + pixel * t.x_pixel), scale, shift);
    if (residual) v = _mm512_add_ps(v, floats(residual + pixel * t.x_pixel));
    return activate(Vec<float>{v}).v;
  };
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kPairs);
  __m512i pairs[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t pixel = first + 2 * i;
    if (Whole) {
      _mm_prefetch(static_cast<const char*>(t.x) + ahead + i * 64, _MM_HINT_T0);
      if (residual) _mm_prefetch(static_cast<const char*>(t.residual) + ahead + i * 64, _MM_HINT_T0);
    }
    const __m512 v0 = value(pixel), v1 = value(pixel + 1);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
    if (t.rows) {
      bf16* const row = static_cast<bf16*>(t.rows) + pixel * t.row + channel;
      if (Whole || pixel < t.pixels) _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(both));
      if (Whole || pixel + 1 < t.pixels)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + t.row), _mm512_extracti64x4_epi64(both, 1));
    }
    pairs[i] = _mm512_permutexvar_epi16(order, both);
  }
  if (count == 0) return;
  if (t.panels) {
    bf16* const panel = static_cast<bf16*>(t.panels) + channel / kPanel * t.panel + first * kPanel;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + 2 * i * kPanel, pairs[i]);
  }
  if (t.columns) {
    transpose_words(pairs);
    bf16* const column = static_cast<bf16*>(t.columns) + channel * t.column + first;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (Whole || i < count) _mm512_storeu_si512(column + i * t.column, pairs[i]);
  }
}

// Pixels up to whole kPairDepth, and in rows channels, are zeros, or what an activation makes of zeros.
void operand_bf16(const OperandTile& t) {
  with_activation<float>(t.activation, [&](auto activate) {
    const int64_t channels = round_up(t.channels, t.rows ? kPairDepth : kPanel);
    for (int64_t first = 0; first < t.pixels; first += kPairDepth) {
      const int64_t whole = first + kPairDepth <= t.pixels ? t.channels / kPanel * kPanel : 0;
      for (int64_t channel = 0; channel < whole; channel += kPanel) operand_block<true>(t, first, channel, activate);
      for (int64_t channel = whole; channel < channels; channel += kPanel)
        operand_block<false>(t, first, channel, activate);
    }
  });
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
