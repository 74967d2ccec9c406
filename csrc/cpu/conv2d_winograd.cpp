// Dense 3 x 3 conv2d of stride 1 on the CPU by Winograd's F(2x2, 3x3): 2.25 times fewer multiplications than a product of
// pixels x (taps x channels) has.
//
// Stages   tiles of 4 x 4 inputs into 16 matrices (tiles x C), 16 products with weights that pack_conv2d has transformed, and
//          16 matrices (tiles x K) into tiles of 2 x 2 outputs, with bias, residual and activation.
// Tiling   a band of rows of tiles a task; idle threads help with rows, then with groups of panels of the 16 products.
// Bytes    x read once (and two rows again a band), y written once; the matrices, four times as large, stay in L2; weights,
//          16 / 9 of the untransformed, read once a band.
#include "conv2d_winograd.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kProducts = kWinogradTile * kWinogradTile;
// Depth of a chain of sums: as much rounding, with the transforms', as PyTorch's convolution has (docs/decisions.md).
constexpr int64_t kWinogradChain = 64;
// For which a band reads the weights, or it would wait for them: 4 multiplications a byte in each of 7 rows.
constexpr int64_t kFewestTiles = 28;
constexpr int64_t kColumns = 4 * kPanel;  // of a product's part: a register tile of the widest kernel

// Scalars from one matrix to the next: an odd number of cache lines, or a tile's 16 rows would fall into few sets of L1.
int64_t matrix_of(int64_t tiles, int64_t row) {
  const int64_t lines = ceil_div(tiles * row, kPanel);
  return (lines | 1) * kPanel;
}

}  // namespace

void conv2d_winograd(const Conv& conv, const Tensor& x, const PointwiseWeights& weights, const Maybe& residual,
                     int64_t activation_code, const Tensor& y) {
  const Storage storage = storage_of(x, "x");
  const KernelTable& table = kernels(storage);
  const int64_t tiles_h = ceil_div(conv.out_h, 2), tiles_w = ceil_div(conv.out_w, 2), out = weights.out;
  const int64_t in = conv.c, v_row = padded_row(in, 4), m_row = padded_row(out, 4);

  const int64_t row_bytes = kProducts * tiles_w * (v_row + m_row) * 4;
  const int64_t fitting = std::max(2 * kTileBytes / row_bytes, ceil_div(kFewestTiles, tiles_w));
  const int64_t rows = ceil_div(tiles_h, ceil_div(tiles_h, std::clamp<int64_t>(fitting, 1, tiles_h)));
  const int64_t per_image = ceil_div(tiles_h, rows);

  GemmTile product = packed_gemm(weights, Storage::f32, Storage::f32, 0);
  product.bias = nullptr;
  product.depth = in;
  product.b_panel = in * kPanel;
  product.chain = kWinogradChain;
  product.a_row = v_row;
  product.y_row = m_row;
  const int64_t groups = ceil_div(out, kColumns);

  const int64_t x_image = conv.h * conv.w * in * storage_size(storage);
  const int64_t y_pixels = conv.out_h * conv.out_w, y_pixel = pixel_of(y);
  for_each(conv.n * per_image, [&](const Worker& worker, int64_t i) {
    const int64_t n = i / per_image, begin = i % per_image * rows, count = std::min(rows, tiles_h - begin);
    const int64_t tiles = count * tiles_w, v_matrix = matrix_of(tiles, v_row), m_matrix = matrix_of(tiles, m_row);
    float* const v = reinterpret_cast<float*>(scratch(Slot::gathered, kProducts * v_matrix * 4));
    // The slot of planes, which these products have none of.
    float* const m = reinterpret_cast<float*>(scratch(Slot::planes, kProducts * m_matrix * 4));
    worker.each_part(count, [&](int64_t k) {
      table.winograd_input[static_cast<int>(storage)]({.x = bytes_of(x) + n * x_image,
                                                       .height = conv.h,
                                                       .width = conv.w,
                                                       .channels = in,
                                                       .pad_top = conv.window.pad_top,
                                                       .pad_left = conv.window.pad_left,
                                                       .tile_row = begin + k,
                                                       .tiles = tiles_w,
                                                       .v = v + k * tiles_w * v_row,
                                                       .v_row = v_row,
                                                       .v_matrix = v_matrix});
    });
    worker.each_part(kProducts * groups, [&](int64_t k) {
      const int64_t of = k / groups, column = k % groups * kColumns;
      GemmTile g = product;
      g.rows = tiles;
      g.a = v + of * v_matrix;
      g.b = weights.panels + of * round_up(out, kPanel) * in * 4;
      g.y = m + of * m_matrix;
      multiply(table, columns_of(g, column, std::min(kColumns, out - column)));
    });
    worker.each_part(count, [&](int64_t k) {
      table.winograd_output(
          {.m = m + k * tiles_w * m_row,
           .m_row = m_row,
           .m_matrix = m_matrix,
           .bias = weights.bias,
           .residual = residual ? bytes_of(*residual) + n * y_pixels * out * storage_size(storage) : nullptr,
           .y = mutable_bytes_of(y) + n * y_pixels * y_pixel * storage_size(storage),
           .y_storage = storage,
           .y_pixel = y_pixel,
           .out_height = conv.out_h,
           .out_width = conv.out_w,
           .channels = out,
           .tile_row = begin + k,
           .tiles = tiles_w,
           .activation = activation(activation_code)});
    });
  });
}

}  // namespace cnnfast::cpu
