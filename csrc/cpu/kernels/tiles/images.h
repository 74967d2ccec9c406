// Tiles of what goes through an image besides convolutions: Winograd's transforms, pooling, local response normalisation.
#pragma once
#include "common.h"

namespace cnnfast {

// Winograd's F(2x2, 3x3): a row of tiles of one image, channels_last, into a row of each of 16 matrices.
struct WinogradInputTile {
  const void* x;  // the image
  int64_t height, width, channels, pad_top, pad_left;
  int64_t tile_row, tiles;  // tiles in a row
  void* v;                  // S: its first tile in the first matrix
  int64_t v_row, v_matrix;  // from tile to tile (whole panels), from matrix to matrix
};
// And back: y = activation(tiles + bias + residual).
struct WinogradOutputTile {
  const void* m;  // S: the row's first tile in the first matrix
  int64_t m_row, m_matrix;
  const void* bias;      // S [channels rounded up to kPanel]
  const void* residual;  // the image, dense, or null
  void* y;               // the image
  Storage y_storage;
  int64_t y_pixel, out_height, out_width, channels, tile_row, tiles;
  Activation activation;
};

// Pooling of rows [row_begin, row_end) of one image, channels_last. Max: padding counts as -inf, a NaN stays. Average:
// padding counts as zeros, or as nothing.
struct Pool2dTile {
  const void* x;  // row x_first_row
  int64_t x_first_row, height, width, channels;
  void* y;  // row row_begin
  Storage y_storage;
  int64_t y_pixel, row_begin, row_end, out_width;
  Window window;  // without dilation
  bool count_include_pad;
};

// y = the largest of z = activation(x * scale + shift) in each window of an image, taps: which of the window's pixels that is,
// row by row. Forward makes rows [row_begin, row_end) of y and taps. Backward reads all of taps and of grad, y's gradient, and
// adds to the sums, makes these rows of dx: dz of a pixel is the sum of the gradients of the windows whose largest it is.
struct ScaleShiftMaxPoolTile {
  const void* x;      // the image
  const void* scale;  // S
  const void* shift;  // S
  int64_t height, width, channels, out_height, out_width, row_begin, row_end;
  Window window;
  Activation activation;
  void* y;        // like x; the image's
  uint8_t* taps;  // like y
  const void* grad;
  void* dx;        // the image's, or null
  void* sum;       // S, of activation'(z) dz
  void* sum_by_x;  // S, of that times x
};

// Local response normalisation of a matrix whose rows or columns are channels, or its gradient.
struct LocalResponseNormTile {
  const void* x;
  const void* grad;  // of y; null forward
  void* y;           // backward: the gradient of x
  int64_t row;       // of x, grad and y
  int64_t rows, cols;
  // Where a channel is copied to: rows_at_once rows, in S, with zeros for the channels before the first and after the last.
  void* padded;  // one such block forward, two and rows_at_once * padded_row backward
  int64_t rows_at_once, padded_row, padded_channel, padded_size;  // padded_channel: 1, or padded_row: rows are channels
  int64_t before, after;                                          // channels of the window besides its own
  double scale, beta, k;                                          // y = x (k + scale * sum of squares)^-beta
};

}  // namespace cnnfast
