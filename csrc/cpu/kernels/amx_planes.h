// float32 GEMM on AMX: each operand the sum of three bfloat16, x = x1 + x2 + x3 exactly (three times 8 bits of its 24, the
// first two rounded to nearest), and of the nine products the six that count:
//   a b = a1 b1 + a1 b2 + a2 b1 + a2 b2 + a1 b3 + a3 b1 (+ a2 b3 + a3 b2 + a3 b3: below 2^-24 |a b|, left out)
//
// Layout   a: rows of pixels or windows (GemmTile's lines and taps, of whole kPairDepth), in three planes a_plane apart,
//          zeros up to a whole kPairDepth; b: one or two panels, in each for each kPairDepth of the depth three planes of
//          1 KiB, in pairs of the depth (packing.h).
// Tile     as gemm_bf16's: two runs of up to 16 rows x 2 panels, 32 of the depth at a time, 24 tile products for 14 tiles
//          that are loaded: from one of the six to the next either a's tiles change or b's.
// Loops    rows of a stream past a pair of panels; meanwhile, between tile products, the next pair's floats are split.
// Sums     a tile product adds pairs of the depth in order, in float32. Half of the error of a chain of fused
//          multiply-adds, as measured. An output's bits depend on its row of a and its column of b alone.
// Rate     at best 24 products of 16 cycles for 32 x 32 x 32: 2.7 times FMA's.
// Limits   The unit takes subnormals as zero. What may become one, or overflow when it is rounded, is odd: rows are told by
//          split_rows, panels by split_panels and gemm_planes; the caller leaves those to FMA.
#pragma once
#include "amx.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

constexpr int64_t kPlaneBytes = kPairDepth * kPanel * 2;
// The magnitudes that are split, as bits: from 2^-90, whose third part is still normal, to where rounding overflows.
constexpr uint32_t kLeast = (127 - 90) << 23, kBeyond = 0x7f7f8000;

// 16 floats in three parts, each in the high halves of its lanes; the low ones are zeros.
struct Parts {
  __m512i of[kPlanes];

  CNNFAST_INLINE explicit Parts(__m512 x) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000)), half = _mm512_set1_epi32(0x8000);
    for (int p = 0; p < kPlanes - 1; ++p) {
      of[p] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), high);
      x = _mm512_sub_ps(x, _mm512_castsi512_ps(of[p]));
    }
    of[kPlanes - 1] = _mm512_castps_si512(x);
  }
};

// Collects whether anything was no such sum. Zeros are; smaller magnitudes than kLeast wrap around beyond the largest.
class Odd {
 public:
  CNNFAST_INLINE void see(__m512 x) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    const __m512i above = _mm512_sub_epi32(magnitude, _mm512_set1_epi32(kLeast));
    lanes_ |= _mm512_mask_cmpge_epu32_mask(_mm512_test_epi32_mask(magnitude, magnitude), above,
                                           _mm512_set1_epi32(kBeyond - kLeast));
  }
  bool any() const { return lanes_ != 0; }

 private:
  __mmask16 lanes_ = 0;
};

// Panels of floats to planes, a bit at a time.
struct PanelSplitter {
  static constexpr int64_t kUnits = kPairDepth / 2;  // of a panel, of each kPairDepth

  CNNFAST_INLINE explicit PanelSplitter(const PanelsTile& t) : t(t) {}

  // Unit `unit` of each panel, of the kPairDepth that begins at k: two of the depth.
  CNNFAST_INLINE void split(int64_t k, int64_t unit) {
    const int64_t at = k + 2 * unit;
    for (int64_t p = 0; p < t.count; ++p) {
      const float* const b = static_cast<const float*>(t.from) + p * t.from_panel + at * kPanel;
      char* const to = static_cast<char*>(t.to) + p * t.to_panel + k * kPlanesOfDepth + unit * kPairBytes;
      _mm_prefetch(reinterpret_cast<const char*>(b) + kAhead, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(b) + kAhead + 64, _MM_HINT_T0);
      const __m512 b0 = at < t.depth ? _mm512_loadu_ps(b) : _mm512_setzero_ps(),
                   b1 = at + 1 < t.depth ? _mm512_loadu_ps(b + kPanel) : _mm512_setzero_ps();
      odd.see(b0);
      odd.see(b1);
      const Parts p0(b0), p1(b1);
      for (int plane = 0; plane < kPlanes; ++plane)
        _mm512_store_si512(to + plane * kPlaneBytes,
                           _mm512_or_si512(_mm512_srli_epi32(p0.of[plane], 16), p1.of[plane]));
    }
  }

  static constexpr int64_t kAhead = 2048;
  const PanelsTile t;
  Odd odd;
};

// sums[16 R][32] of the runs that begin at a0 and a1; units [begin, end) of the next panels, of each kPairDepth.
template <int R, int P>
CNNFAST_INLINE void multiply_planes(const GemmTile& t, const char* a0, const char* a1, PanelSplitter& next,
                                    int64_t begin, int64_t end, float* sums) {
  const int64_t a_bytes = t.a_row * 2, a_plane = t.a_plane * 2;
  const char* b0 = static_cast<const char*>(t.b);
  const char* b1 = b0 + (P > 1 ? t.b_panel * 2 : 0);
  const char *at0, *at1;
  const auto load_a = [&](int64_t plane) {
    _tile_loadd(4, at0 + plane * a_plane, a_bytes);
    if constexpr (R > 1) _tile_loadd(5, at1 + plane * a_plane, a_bytes);
  };
  const auto load_b = [&](int64_t plane) {
    _tile_loadd(6, b0 + plane * kPlaneBytes, kPairBytes);
    if constexpr (P > 1) _tile_loadd(7, b1 + plane * kPlaneBytes, kPairBytes);
  };
  zero_sums<R, P>();
  const int64_t together = t.taps ? t.tap_depth : t.depth;
  for (int64_t k = 0; k < t.depth; k += kPairDepth) {
    if (k % together == 0) {
      at0 = a0 + tap_bytes(t, k / together);
      at1 = a1 + tap_bytes(t, k / together);
    }
    load_a(0);
    load_b(2);
    tile_products<R, P>();
    load_b(1);
    tile_products<R, P>();
    load_a(1);
    tile_products<R, P>();
    load_b(0);
    tile_products<R, P>();
    load_a(2);
    tile_products<R, P>();
    load_a(0);
    tile_products<R, P>();
    at0 += kPairBytes;
    at1 += kPairBytes;
    b0 += kPlanes * kPlaneBytes;
    b1 += kPlanes * kPlaneBytes;
    for (int64_t unit = begin; unit < end; ++unit) next.split(k, unit);
  }
  store_sums<R, P>(sums);
}

// finish of a run's rows, but of those that are odd: FMA's, after these.
template <int P>
CNNFAST_INLINE void finish_even(const GemmTile& t, const Runs& runs, int64_t run, float* sums) {
  const int64_t first = runs.first(run);
  for (int64_t row = runs.shared(run); row < runs.rows; ++row) {
    const int64_t begin = row;
    while (row < runs.rows && !t.odd[first + row]) ++row;
    finish<P>(t, first + begin, row - begin, 0, sums + begin * 2 * kPanel);
  }
}

template <int P>
void rows_of_planes(const GemmTile& t, PanelSplitter& next) {
  alignas(64) float sums[2 * kTileRows * 2 * kPanel];
  const Runs runs(t);
  const Tiles tiles(runs.rows);
  const int64_t blocks = (runs.count + 1) / 2, units = next.t.count ? PanelSplitter::kUnits : 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t run = 2 * i, begin = units * i / blocks, end = units * (i + 1) / blocks;
    const char* const a = runs.begin(t, run);
    if (run + 1 == runs.count) {
      multiply_planes<1, P>(t, a, a, next, begin, end, sums);
    } else {
      multiply_planes<2, P>(t, a, runs.begin(t, run + 1), next, begin, end, sums);
      finish_even<P>(t, runs, run + 1, sums + kTileRows * 2 * kPanel);
    }
    finish_even<P>(t, runs, run, sums);
  }
}

bool gemm_planes(const GemmTile& t, const PanelsTile& next) {
  PanelSplitter splitter(next);
  if (t.cols > kPanel)
    rows_of_planes<2>(t, splitter);
  else
    rows_of_planes<1>(t, splitter);
  return !splitter.odd.any();
}

bool split_panels(const PanelsTile& t) {
  PanelSplitter splitter(t);
  for (int64_t k = 0; k < t.depth; k += kPairDepth)
    for (int64_t unit = 0; unit < PanelSplitter::kUnits; ++unit) splitter.split(k, unit);
  return !splitter.odd.any();
}

void split_rows(const RowsTile& t) {
  alignas(64) uint16_t odd_words[2 * kPanel];  // the high halves of two vectors, side by side
  for (int i = 0; i < 2 * kPanel; ++i) odd_words[i] = static_cast<uint16_t>(2 * i + 1);
  const __m512i halves = _mm512_load_si512(odd_words);
  const int64_t whole = t.depth / kPairDepth * kPairDepth;
  const uint32_t lanes = (uint32_t{1} << (t.depth - whole)) - 1;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* const x = static_cast<const float*>(t.from) + r * t.from_row;
    uint16_t* const to = static_cast<uint16_t*>(t.to) + r * t.to_row;
    Odd odd;
    const auto step = [&](int64_t k, __m512 x0, __m512 x1) {
      odd.see(x0);
      odd.see(x1);
      const Parts p0(x0), p1(x1);
      for (int p = 0; p < kPlanes; ++p)
        _mm512_storeu_si512(to + p * t.to_plane + k, _mm512_permutex2var_epi16(p0.of[p], halves, p1.of[p]));
    };
    for (int64_t k = 0; k < whole; k += kPairDepth) step(k, _mm512_loadu_ps(x + k), _mm512_loadu_ps(x + k + kPanel));
    if (lanes)
      step(whole, _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), x + whole),
           _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> kPanel), x + whole + kPanel));
    t.odd[r] = odd.any();
  }
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
