// bfloat16 GEMM on AMX: the inside of pointwise_conv2d and of the products in separable_conv2d and inverted_residual where
// x and the packing are bfloat16. The rest of an AMX machine's table is AVX-512's.
//
// Layout   a: rows of pixels, channels contiguous, readable and finite up to a depth of whole tiles; b: panels of kPanel
//          output channels, in a panel for each pair of the depth 16 columns x 2 (packing.h): a tile of b is 1 KiB.
// Tile     32 rows x 2 panels: four accumulators, two tiles of a and two of b, 32 of the depth at a time.
// Loops    panels outside, rows inside: two panels (depth * 64 bytes) stay in L1 while the rows stream past. Rows that
//          don't fill a block are taken together with some of the block before: the same sums again.
// Sums     an accumulator starts with the bias; pairs of the depth are added in order, in float32; then the residual. An
//          output's bits depend on its row of a and its column of b alone.
// Rate     4 tile products of 16 cycles for 32 x 32 x 32: 1024 multiply-adds in 16 cycles, where FMA does 512.
// Limits   The unit takes subnormals as zero and flushes results below 2^-126.
#include <immintrin.h>

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

// sums[16 R][32] of rows [row, row + 16 R), panels [panel, panel + P).
template <int R, int P>
CNNFAST_INLINE void multiply(const GemmTile& t, int64_t row, int64_t panel, float* sums) {
  const int64_t a_bytes = t.a_row * 2;
  const char* a0 = static_cast<const char*>(t.a) + row * a_bytes;
  const char* a1 = a0 + (R > 1 ? kTileRows * a_bytes : 0);
  const char* b0 = static_cast<const char*>(t.b) + panel * t.b_panel * 2;
  const char* b1 = b0 + (P > 1 ? t.b_panel * 2 : 0);
  const float* bias = static_cast<const float*>(t.bias) + panel * kPanel;
  _tile_loadd(0, bias, 0);  // each row the same: a distance of 0
  if constexpr (P > 1) _tile_loadd(1, bias + kPanel, 0);
  if constexpr (R > 1) _tile_loadd(2, bias, 0);
  if constexpr (R > 1 && P > 1) _tile_loadd(3, bias + kPanel, 0);
  for (int64_t k = 0; k < t.depth; k += kPairDepth) {
    _tile_loadd(4, a0, a_bytes);
    _tile_loadd(6, b0, kPairBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (P > 1) {
      _tile_loadd(7, b1, kPairBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a1, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (P > 1) _tile_dpbf16ps(3, 5, 7);
    }
    a0 += kPairDepth * 2;
    a1 += kPairDepth * 2;
    b0 += kPairDepth * kPanel * 2;
    b1 += kPairDepth * kPanel * 2;
  }
  constexpr int kPitch = 2 * kPanel * sizeof(float);
  _tile_stored(0, sums, kPitch);
  if constexpr (P > 1) _tile_stored(1, sums + kPanel, kPitch);
  if constexpr (R > 1) _tile_stored(2, sums + kTileRows * 2 * kPanel, kPitch);
  if constexpr (R > 1 && P > 1) _tile_stored(3, sums + kTileRows * 2 * kPanel + kPanel, kPitch);
  written(sums);
}

// sums to y: residual, activation, storage T.
template <int P, class T>
CNNFAST_INLINE void finish(const GemmTile& t, int64_t row, int64_t rows, int64_t panel, float* sums) {
  const int64_t column = panel * kPanel;
  const Clamp<float> clamp(t.activation);
  const bool curved = !is_clamp(t.activation);
  if (curved) {
    if (t.residual)
      for (int64_t r = 0; r < rows; ++r)
        for (int p = 0; p < P; ++p) {
          float* at = sums + (2 * r + p) * kPanel;
          const T* residual = static_cast<const T*>(t.residual) + (row + r) * t.residual_row + column + p * kPanel;
          store(at, add(load<float>(at), load<float>(residual, t.cols - column - p * kPanel)));
        }
    curve(sums, 2 * rows, t.activation.code);
  }
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const int64_t count = t.cols - column - p * kPanel;
      Vec<float> y = load<float>(sums + (2 * r + p) * kPanel);
      if (!curved) {
        if (t.residual)
          y = add(y, load<float>(static_cast<const T*>(t.residual) + (row + r) * t.residual_row + column + p * kPanel,
                                 count));
        y = clamp(y);
      }
      store(static_cast<T*>(t.y) + (row + r) * t.y_row + column + p * kPanel, y, count);
    }
}

template <int P>
void panels(const GemmTile& t, int64_t panel) {
  alignas(64) float sums[2 * kTileRows * 2 * kPanel];
  if constexpr (P == 1)
    for (float& sum : sums) sum = 0;  // its other half goes through the activation too
  const auto done = [&](int64_t row, int64_t rows) {
    if (t.y_storage == Storage::bf16)
      finish<P, bf16>(t, row, rows, panel, sums);
    else if (t.y_storage == Storage::f16)
      finish<P, f16>(t, row, rows, panel, sums);
    else
      finish<P, float>(t, row, rows, panel, sums);
  };
  if (t.rows < 2 * kTileRows) {
    for (int64_t row = 0; row < t.rows; row += kTileRows) {
      const int64_t first = larger(0, smaller(row, t.rows - kTileRows));
      multiply<1, P>(t, first, panel, sums);
      done(first, smaller(t.rows, kTileRows));
    }
    return;
  }
  for (int64_t row = 0; row < t.rows; row += 2 * kTileRows) {
    const int64_t first = smaller(row, t.rows - 2 * kTileRows);
    multiply<2, P>(t, first, panel, sums);
    done(first, 2 * kTileRows);
  }
}

}  // namespace

void gemm_bf16(const GemmTile& t) {
  if (t.rows == 0) return;  // a configuration of tiles without rows faults
  const Tiles tiles(smaller(t.rows, kTileRows));
  const int64_t count = (t.cols + kPanel - 1) / kPanel;
  int64_t panel = 0;
  for (; panel + 1 < count; panel += 2) panels<2>(t, panel);
  if (panel < count) panels<1>(t, panel);
}

}  // namespace cnnfast::CNNFAST_ISA
