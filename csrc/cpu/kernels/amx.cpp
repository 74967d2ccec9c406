// bfloat16 GEMM on AMX: the inside of pointwise_conv2d, of conv2d (a row of a is a window of the image, read where it lies:
// GemmTile's lines and taps) and of the products in separable_conv2d and inverted_residual where x and the packing are
// bfloat16. The rest of an AMX machine's table is AVX-512's.
//
// Layout   a: rows of pixels, channels contiguous, readable and finite up to a depth of whole tiles; b: panels of kPanel
//          output channels, in a panel for each pair of the depth 16 columns x 2 (packing.h): a tile of b is 1 KiB.
// Tile     two runs of rows x 2 panels: four accumulators, two tiles of a and two of b, 32 of the depth at a time. A run
//          is up to 16 rows of a line (of all rows, in a plain product): a line is cut into equal ones, 56 into 4 of 14;
//          where they are more than the line the last takes some rows of the one before: the same sums again.
// Loops    panels outside, rows inside: two panels (depth * 64 bytes) stay in L1 while the rows stream past, read with the
//          hint that they need not stay there, unless they are windows, whose next tap reads most of them again; the next
//          two panels, used once a call and so far away, are fetched into L2 meanwhile.
// Sums     pairs of the depth are added in order, in float32; the sum is multiplied by its column's scale and the bias
//          added, in one rounding; then the residual. An output's bits depend on its row of a and its column of b alone.
// Rate     4 tile products of 16 cycles for 32 x 32 x 32: 8192 multiply-adds in 16 cycles, where FMA does 512.
// Limits   The unit, and AVX-512's rounding to bfloat16, take subnormals as zero and flush results below 2^-126.
#include <immintrin.h>

#include <type_traits>

#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

constexpr int64_t kTileRows = 16, kPairBytes = 64;

// GCC's tile intrinsics don't say which memory they read: what they are to see must be written before.
CNNFAST_INLINE void written(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Tiles of `rows` x 64 bytes (accumulators 0 to 3, a 4 and 5) and 16 x 64 bytes (b 6 and 7), while it lives.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    struct alignas(64) Configuration {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } ours{};
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) {
      ours.bytes[i] = kPairBytes;
      ours.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kTileRows);
    }
    written(&ours);
    _tile_loadconfig(&ours);
  }
  ~Tiles() { _tile_release(); }
};

// Lines [begin, end) of the 2 KiB that a pair of panels has for each kPairDepth of the depth.
struct Lines {
  int64_t begin, end;
};
constexpr int64_t kStepBytes = 2 * kPairDepth * kPanel * 2, kStepLines = kStepBytes / 64;

// Where the scalars of the depth lie that begin at `tap` taps, beyond a row's first.
CNNFAST_INLINE int64_t tap_bytes(const GemmTile& t, int64_t tap) {
  return t.taps ? (tap / t.taps * t.a_tap_line + tap % t.taps * t.a_tap) * 2 : 0;
}

// sums[16 R][32] of the runs that begin at a0 and a1, panels [panel, panel + P); lines `ahead` of the next pair into L2.
template <int R, int P, bool Windows>
CNNFAST_INLINE void multiply(const GemmTile& t, const char* a0, const char* a1, int64_t panel, Lines ahead,
                             float* sums) {
  const int64_t a_bytes = t.a_row * 2;
  const char* b0 = static_cast<const char*>(t.b) + panel * t.b_panel * 2;
  const char* b1 = b0 + (P > 1 ? t.b_panel * 2 : 0);
  const char* next = b0 + 2 * t.b_panel * 2;
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && P > 1) _tile_zero(3);
  const int64_t together = t.taps ? t.tap_depth : t.depth;
  for (int64_t tap = 0, done = 0; done < t.depth; ++tap, done += together) {
    const char* at0 = a0 + tap_bytes(t, tap);
    const char* at1 = a1 + tap_bytes(t, tap);
    for (int64_t k = 0; k < together; k += kPairDepth) {
      for (int64_t line = ahead.begin; line < ahead.end; ++line) _mm_prefetch(next + line * 64, _MM_HINT_T1);
      if constexpr (Windows)
        _tile_loadd(4, at0, a_bytes);
      else
        _tile_stream_loadd(4, at0, a_bytes);
      _tile_loadd(6, b0, kPairBytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (P > 1) {
        _tile_loadd(7, b1, kPairBytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R > 1) {
        if constexpr (Windows)
          _tile_loadd(5, at1, a_bytes);
        else
          _tile_stream_loadd(5, at1, a_bytes);
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
  constexpr int kPitch = 2 * kPanel * sizeof(float);
  _tile_stored(0, sums, kPitch);
  if constexpr (P > 1) _tile_stored(1, sums + kPanel, kPitch);
  if constexpr (R > 1) _tile_stored(2, sums + kTileRows * 2 * kPanel, kPitch);
  if constexpr (R > 1 && P > 1) _tile_stored(3, sums + kTileRows * 2 * kPanel + kPanel, kPitch);
  written(sums);
}

// sums to y: scale, bias, residual, activation, storage T.
template <int P, class T>
CNNFAST_INLINE void finish(const GemmTile& t, int64_t row, int64_t rows, int64_t panel, float* sums) {
  const int64_t column = panel * kPanel, left = smaller(t.cols - column, kPanel),
                right = P > 1 ? smaller(t.cols - column - kPanel, kPanel) : 0;
  const float* scale = static_cast<const float*>(t.scale) + column;
  const float* bias = static_cast<const float*>(t.bias) + column;
  const Vec<float> scale0 = load<float>(scale), scale1 = P > 1 ? load<float>(scale + kPanel) : scale0;
  const Vec<float> bias0 = load<float>(bias), bias1 = P > 1 ? load<float>(bias + kPanel) : bias0;
  // then(row, its columns, those of the second panel: without one the first again) for each row.
  const auto each_row = [&](auto then) {
    const T* residual = t.residual ? static_cast<const T*>(t.residual) + row * t.residual_row + column : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const float* const at = sums + 2 * r * kPanel;
      Vec<float> v0 = fma(load<float>(at), scale0, bias0);
      Vec<float> v1 = P > 1 ? fma(load<float>(at + kPanel), scale1, bias1) : v0;
      if (residual) {
        v0 = add(v0, load<float>(residual, left));
        if (P > 1) v1 = add(v1, load<float>(residual + kPanel, right));
        residual += t.residual_row;
      }
      then(r, v0, v1);
    }
  };
  const __mmask32 kept = static_cast<__mmask32>((uint64_t{1} << (left + right)) - 1);
  T* const first = static_cast<T*>(t.y) + row * t.y_row + column;
  const auto store_row = [&](int64_t r, Vec<float> v0, Vec<float> v1) {
    T* const y = first + r * t.y_row;
    if constexpr (std::is_same_v<T, bf16>) {
      _mm512_mask_storeu_epi16(y, kept, (__m512i)_mm512_cvtne2ps_pbh(v1.v, v0.v));
    } else {
      store(y, v0, left);
      if (P > 1) store(y + kPanel, v1, right);
    }
  };
  if (is_clamp(t.activation)) {
    const Clamp<float> clamp(t.activation);
    each_row([&](int64_t r, Vec<float> v0, Vec<float> v1) { store_row(r, clamp(v0), clamp(v1)); });
    return;
  }
  each_row([&](int64_t r, Vec<float> v0, Vec<float> v1) {
    store(sums + 2 * r * kPanel, v0);
    store(sums + 2 * r * kPanel + kPanel, v1);
  });
  curve(sums, 2 * rows, t.activation.code);
  for (int64_t r = 0; r < rows; ++r)
    store_row(r, load<float>(sums + 2 * r * kPanel), load<float>(sums + 2 * r * kPanel + kPanel));
}

// Rows of a, a line of them cut into equal runs of up to a tile.
struct Runs {
  explicit Runs(const GemmTile& t)
      : line(t.line ? t.line : t.rows),
        per_line((line + kTileRows - 1) / kTileRows),
        rows((line + per_line - 1) / per_line),
        count(t.rows / line * per_line) {}
  int64_t line, per_line, rows, count;

  int64_t first_in_line(int64_t i) const { return smaller(i % per_line * rows, line - rows); }
  int64_t first(int64_t i) const { return i / per_line * line + first_in_line(i); }
  const char* begin(const GemmTile& t, int64_t i) const {
    return static_cast<const char*>(t.a) + (i / per_line * t.a_line + first_in_line(i) * t.a_row) * 2;
  }
};

// Columns of panels [panel, panel + P).
template <int P, bool Windows>
void panels(const GemmTile& t, const Runs& runs, int64_t panel, bool another_pair) {
  alignas(64) float sums[2 * kTileRows * 2 * kPanel];
  const auto done = [&](int64_t run, float* from) {
    const int64_t row = runs.first(run);
    if (t.y_storage == Storage::bf16)
      finish<P, bf16>(t, row, runs.rows, panel, from);
    else if (t.y_storage == Storage::f16)
      finish<P, f16>(t, row, runs.rows, panel, from);
    else
      finish<P, float>(t, row, runs.rows, panel, from);
  };
  const int64_t blocks = (runs.count + 1) / 2;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t run = 2 * i;
    const Lines ahead = another_pair ? Lines{kStepLines * i / blocks, kStepLines * (i + 1) / blocks} : Lines{0, 0};
    const char* const a = runs.begin(t, run);
    if (run + 1 == runs.count) {
      multiply<1, P, Windows>(t, a, a, panel, ahead, sums);
    } else {
      multiply<2, P, Windows>(t, a, runs.begin(t, run + 1), panel, ahead, sums);
      done(run + 1, sums + kTileRows * 2 * kPanel);
    }
    done(run, sums);
  }
}

template <bool Windows>
void all_panels(const GemmTile& t, const Runs& runs) {
  const int64_t count = (t.cols + kPanel - 1) / kPanel;
  int64_t panel = 0;
  for (; panel + 1 < count; panel += 2) panels<2, Windows>(t, runs, panel, panel + 3 < count);
  if (panel < count) panels<1, Windows>(t, runs, panel, false);
}

}  // namespace

void gemm_bf16(const GemmTile& t) {
  if (t.rows == 0) return;  // a configuration of tiles without rows faults
  const Runs runs(t);
  const Tiles tiles(runs.rows);
  t.taps ? all_panels<true>(t, runs) : all_panels<false>(t, runs);
}

}  // namespace cnnfast::CNNFAST_ISA
