// What both GEMMs on AMX share: the tiles' configuration, how rows are cut into tiles, what happens to sums.
#pragma once
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

template <int R, int P>
CNNFAST_INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && P > 1) _tile_zero(3);
}

// Of the tiles that are loaded.
template <int R, int P>
CNNFAST_INLINE void tile_products() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (P > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (R > 1 && P > 1) _tile_dpbf16ps(3, 5, 7);
}

// To sums[16 R][32].
template <int R, int P>
CNNFAST_INLINE void store_sums(float* sums) {
  constexpr int kPitch = 2 * kPanel * sizeof(float);
  _tile_stored(0, sums, kPitch);
  if constexpr (P > 1) _tile_stored(1, sums + kPanel, kPitch);
  if constexpr (R > 1) _tile_stored(2, sums + kTileRows * 2 * kPanel, kPitch);
  if constexpr (R > 1 && P > 1) _tile_stored(3, sums + kTileRows * 2 * kPanel + kPanel, kPitch);
  written(sums);
}

// Where the scalars of the depth lie that begin at `tap` taps, beyond a row's first.
CNNFAST_INLINE int64_t tap_bytes(const GemmTile& t, int64_t tap) {
  return t.taps ? (tap / t.taps * t.a_tap_line + tap % t.taps * t.a_tap) * 2 : 0;
}

// sums to y: scale, bias, residual, activation, storage T.
template <int P, class T>
CNNFAST_INLINE void finish(const GemmTile& t, int64_t row, int64_t rows, int64_t panel, float* sums) {
  const int64_t column = panel * kPanel, left = smaller(t.cols - column, kPanel),
                right = P > 1 ? smaller(t.cols - column - kPanel, kPanel) : 0;
  const float* scale = static_cast<const float*>(t.scale) + column;
  const float* bias = static_cast<const float*>(t.bias) + column;
  const Vec<float> one = Vec<float>::set(1), scale0 = t.scale ? load<float>(scale) : one,
                   scale1 = t.scale && P > 1 ? load<float>(scale + kPanel) : scale0;
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
    __builtin_prefetch(y + 2 * kTileRows * t.y_row, 1, 2);  // where the next rows of the panel go
    if constexpr (std::is_same_v<T, bf16>) {
      _mm512_mask_storeu_epi16(y, kept, (__m512i)_mm512_cvtne2ps_pbh(v1.v, v0.v));
    } else {
      store(y, v0, left);
      if (P > 1) store(y + kPanel, v1, right);
    }
  };
  if (t.activation.code == 0) return each_row(store_row);
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

// finish, with y's storage.
template <int P>
CNNFAST_INLINE void finish(const GemmTile& t, int64_t row, int64_t rows, int64_t panel, float* sums) {
  if (t.y_storage == Storage::bf16)
    finish<P, bf16>(t, row, rows, panel, sums);
  else if (t.y_storage == Storage::f16)
    finish<P, f16>(t, row, rows, panel, sums);
  else
    finish<P, float>(t, row, rows, panel, sums);
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
  // Rows that run i shares with the one before, which stores them: y may be the residual, which is read once.
  int64_t shared(int64_t i) const { return i % per_line * rows - first_in_line(i); }
  const char* begin(const GemmTile& t, int64_t i) const {
    return static_cast<const char*>(t.a) + (i / per_line * t.a_line + first_in_line(i) * t.a_row) * 2;
  }
};

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
