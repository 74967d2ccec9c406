// bfloat16 GEMM on AMX: the inside of pointwise_conv2d, of conv2d (a row of a is a window of the image, read where it lies:
// GemmTile's lines and taps) and of the products in separable_conv2d and inverted_residual where x and the packing are
// bfloat16. The rest of an AMX machine's table is AVX-512's.
//
// Layout   a: rows of pixels, channels contiguous, readable and finite up to a depth of whole tiles; b: panels of kPanel
//          output channels, in a panel for each pair of the depth 16 columns x 2 (packing.h): a tile of b is 1 KiB.
// Tile     two runs of rows x 2 panels: four accumulators, two tiles of a and two of b, 32 of the depth at a time. A run
//          is up to 16 rows of a line (of all rows, in a plain product): a line is cut into equal ones, 56 into 4 of 14;
//          where they are more than the line the last takes some rows of the one before: the same sums again, which
//          are stored once.
// Loops    panels outside, rows inside: two panels (depth * 64 bytes) stay in L1 while the rows stream past, read with the
//          hint that they need not stay there, unless they are windows, whose next tap reads most of them again; the next
//          two panels, used once a call and so far away, are fetched into L2 meanwhile.
// Sums     pairs of the depth are added in order, in float32; the sum is multiplied by its column's scale and the bias
//          added, in one rounding; then the residual. An output's bits depend on its row of a and its column of b alone.
// Rate     4 tile products of 16 cycles for 32 x 32 x 32: 8192 multiply-adds in 16 cycles, where FMA does 512.
// Limits   The unit, and AVX-512's rounding to bfloat16, take subnormals as zero and flush results below 2^-126.
#pragma once
#include "amx.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// Lines [begin, end) of the 2 KiB that a pair of panels has for each kPairDepth of the depth.
struct Lines {
  int64_t begin, end;
};
constexpr int64_t kStepBytes = 2 * kPairDepth * kPanel * 2, kStepLines = kStepBytes / 64;

// What a tile that is loaded is to do in L1.
enum class In : uint8_t { stay, pass };
// The intrinsics want the tile's number as a literal.
template <In L1>
CNNFAST_INLINE void load_a0(const char* p, int64_t row) {
  if constexpr (L1 == In::stay)
    _tile_loadd(4, p, row);
  else
    _tile_stream_loadd(4, p, row);
}
template <In L1>
CNNFAST_INLINE void load_a1(const char* p, int64_t row) {
  if constexpr (L1 == In::stay)
    _tile_loadd(5, p, row);
  else
    _tile_stream_loadd(5, p, row);
}
template <In L1>
CNNFAST_INLINE void load_b0(const char* p) {
  if constexpr (L1 == In::stay)
    _tile_loadd(6, p, kPairBytes);
  else
    _tile_stream_loadd(6, p, kPairBytes);
}
template <In L1>
CNNFAST_INLINE void load_b1(const char* p) {
  if constexpr (L1 == In::stay)
    _tile_loadd(7, p, kPairBytes);
  else
    _tile_stream_loadd(7, p, kPairBytes);
}

// sums[16 R][32] of the runs that begin at a0 and a1, panels [panel, panel + P); lines `ahead` of the next pair into L2.
template <int R, int P, In A, In B>
CNNFAST_INLINE void multiply(const GemmTile& t, const char* a0, const char* a1, int64_t panel, Lines ahead,
                             float* sums) {
  const int64_t a_bytes = t.a_row * 2;
  const char* b0 = static_cast<const char*>(t.b) + panel * t.b_panel * 2;
  const char* b1 = b0 + (P > 1 ? t.b_panel * 2 : 0);
  const char* next = b0 + 2 * t.b_panel * 2;
  zero_sums<R, P>();
  const int64_t together = t.taps ? t.tap_depth : t.depth;
  for (int64_t tap = 0, done = 0; done < t.depth; ++tap, done += together) {
    const char* at0 = a0 + tap_bytes(t, tap);
    const char* at1 = a1 + tap_bytes(t, tap);
    for (int64_t k = 0; k < together; k += kPairDepth) {
      for (int64_t line = ahead.begin; line < ahead.end; ++line) _mm_prefetch(next + line * 64, _MM_HINT_T1);
      load_a0<A>(at0, a_bytes);
      load_b0<B>(b0);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (P > 1) {
        load_b1<B>(b1);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R > 1) {
        load_a1<A>(at1, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (P > 1) _tile_dpbf16ps(3, 5, 7);
      }
      next += kStepBytes;
      at0 += kPairDepth * 2;
      at1 += kPairDepth * 2;
      b0 += kPairDepth * kPanel * 2;
      b1 += kPairDepth * kPanel * 2;
    }
  }
  store_sums<R, P>(sums);
}

// Runs [run, run + 2), or the last one, of panels [panel, panel + P).
template <int P, In A, In B>
CNNFAST_INLINE void block(const GemmTile& t, const Runs& runs, int64_t run, int64_t panel, Lines ahead) {
  alignas(64) float sums[2 * kTileRows * 2 * kPanel];
  const auto done = [&](int64_t r, float* from) {
    const int64_t shared = runs.shared(r);
    finish<P>(t, runs.first(r) + shared, runs.rows - shared, panel, from + shared * 2 * kPanel);
  };
  const char* const a = runs.begin(t, run);
  if (run + 1 == runs.count) {
    multiply<1, P, A, B>(t, a, a, panel, ahead, sums);
  } else {
    multiply<2, P, A, B>(t, a, runs.begin(t, run + 1), panel, ahead, sums);
    done(run + 1, sums + kTileRows * 2 * kPanel);
  }
  done(run, sums);
}

// Columns of panels [panel, panel + P).
template <int P, In A>
void rows_of_panels(const GemmTile& t, const Runs& runs, int64_t panel, bool another_pair) {
  const int64_t blocks = (runs.count + 1) / 2;
  for (int64_t i = 0; i < blocks; ++i) {
    const Lines ahead = another_pair ? Lines{kStepLines * i / blocks, kStepLines * (i + 1) / blocks} : Lines{0, 0};
    block<P, A, In::stay>(t, runs, 2 * i, panel, ahead);
  }
}

template <In A>
void panels_outside(const GemmTile& t, const Runs& runs) {
  const int64_t count = (t.cols + kPanel - 1) / kPanel;
  int64_t panel = 0;
  for (; panel + 1 < count; panel += 2) rows_of_panels<2, A>(t, runs, panel, panel + 3 < count);
  if (panel < count) rows_of_panels<1, A>(t, runs, panel, false);
}

void rows_outside(const GemmTile& t, const Runs& runs) {
  const int64_t count = (t.cols + kPanel - 1) / kPanel;
  for (int64_t run = 0; run < runs.count; run += 2) {
    int64_t panel = 0;
    for (; panel + 1 < count; panel += 2) block<2, In::stay, In::pass>(t, runs, run, panel, {0, 0});
    if (panel < count) block<1, In::stay, In::pass>(t, runs, run, panel, {0, 0});
  }
}

void gemm_bf16(const GemmTile& t) {
  if (t.rows == 0) return;  // a configuration of tiles without rows faults
  const Runs runs(t);
  const Tiles tiles(runs.rows);
  if (t.b_stays)
    rows_outside(t, runs);
  else
    t.taps ? panels_outside<In::stay>(t, runs) : panels_outside<In::pass>(t, runs);
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
