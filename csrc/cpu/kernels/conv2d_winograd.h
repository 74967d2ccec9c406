// Winograd's F(2x2, 3x3) (Lavin and Gray, 2016): what surrounds the 16 products by which a 3 x 3 convolution of stride 1
// computes tiles of 2 x 2 outputs with 16 multiplications a channel instead of 36.
//
// Layout   image: pixels of contiguous channels; v and m: 16 matrices, a row a tile, channels contiguous.
// Tile     one row of tiles; tiles outside, panels of channels inside: a tile's 4 x 4 inputs (2 x 2 outputs) in registers.
// Bytes    input: x read once (pixels that neighbouring tiles share again, from L1), four times as much written, to L2;
//          output: four times y read from L2, y written once, residual read once.
// Rate     input: 32 additions for 16 loads and 16 stores; output: 24 for 16 and 4.
// Rounding as tests/ops/test_conv2d_winograd.py bounds it: an output's error grows with all inputs of its own window times all
//          weights of its channel, not with the products that it consists of.
#pragma once
#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// (d0, d1, d2, d3) of the tile's rows or columns.
template <class S>
CNNFAST_INLINE void winograd_to(const Vec<S> (&d)[4], Vec<S> (&v)[4]) {
  v[0] = sub(d[0], d[2]);
  v[1] = add(d[1], d[2]);
  v[2] = sub(d[2], d[1]);
  v[3] = sub(d[1], d[3]);
}

template <class S>
CNNFAST_INLINE void winograd_from(const Vec<S> (&m)[4], Vec<S> (&y)[2]) {
  const Vec<S> sum = add(m[1], m[2]), difference = sub(m[1], m[2]);
  y[0] = add(m[0], sum);
  y[1] = sub(difference, m[3]);
}

// One panel of channels of one tile. at(i, j): its pixel.
template <class S, class F>
CNNFAST_INLINE void winograd_input_panel(const F& at, S* v, int64_t v_matrix) {
  Vec<S> columns[4][4], h[4][4];  // [column][row]
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Vec<S> d[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) d[i] = at(i, j);
    winograd_to(d, columns[j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec<S> d[4] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
    winograd_to(d, h[i]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(v + (i * 4 + j) * v_matrix, h[i][j]);
  }
}

template <class T>
void winograd_input(const WinogradInputTile& t) {
  using S = typename Compute<T>::type;
  const int64_t first_row = 2 * t.tile_row - t.pad_top, row = t.width * t.channels;
  const bool rows_inside = first_row >= 0 && first_row + 4 <= t.height;
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const int64_t first = 2 * tile - t.pad_left;
    const bool inside = rows_inside && first >= 0 && first + 4 <= t.width;
    const T* const x = static_cast<const T*>(t.x) + first_row * row + first * t.channels;
    S* const v = static_cast<S*>(t.v) + tile * t.v_row;
    int64_t channel = 0;
    if (inside)
      for (; channel + kPanel <= t.channels; channel += kPanel)
        winograd_input_panel<S>([&](int i, int j) { return load<S>(x + i * row + j * t.channels + channel); },
                                v + channel, t.v_matrix);
    for (; channel < t.channels; channel += kPanel)
      winograd_input_panel<S>(
          [&](int i, int j) {
            const bool there = first_row + i >= 0 && first_row + i < t.height && first + j >= 0 && first + j < t.width;
            return there ? load<S>(x + i * row + j * t.channels + channel, t.channels - channel) : Vec<S>::zero();
          },
          v + channel, t.v_matrix);
  }
}

template <class S>
void winograd_output(const WinogradOutputTile& t) {
  const int64_t first_row = 2 * t.tile_row;
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const S* const m = static_cast<const S*>(t.m) + tile * t.m_row;
    for (int64_t channel = 0; channel < t.channels; channel += kPanel) {
      const int64_t count = t.channels - channel;
      Vec<S> rows[4][2];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Vec<S> of[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) of[j] = load<S>(m + (i * 4 + j) * t.m_matrix + channel);
        winograd_from(of, rows[i]);
      }
      const Vec<S> bias = load<S>(static_cast<const S*>(t.bias) + channel);
      Vec<S> y[4];  // [column][row]
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const Vec<S> of[4] = {rows[0][j], rows[1][j], rows[2][j], rows[3][j]};
        Vec<S> two[2];
        winograd_from(of, two);
        y[2 * j] = add(two[0], bias);
        y[2 * j + 1] = add(two[1], bias);
      }
      const auto each_pixel = [&](const auto& f) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const int64_t h = first_row + k % 2, w = 2 * tile + k / 2;
          if (h < t.out_height && w < t.out_width) f(y[k], h * t.out_width + w);
        }
      };
      if (t.residual)
        each_pixel([&](Vec<S>& of, int64_t pixel) {
          of = add(of, load_storage<S>(t.residual, pixel * t.channels + channel, count, t.y_storage));
        });
      activate(y, t.activation);
      each_pixel([&](const Vec<S>& of, int64_t pixel) {
        store_storage(t.y, pixel * t.y_pixel + channel, of, count, t.y_storage);
      });
    }
  }
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
