// Tiles of depthwise convolutions, forward and backward.
#pragma once
#include "common.h"

namespace cnnfast {

// Rows [row_begin, row_end) of one image's depthwise convolution, channels_last.
// x is the first element of input row x_first_row: a tile holds a band of rows, an image all of them.
struct DepthwiseTile {
  const void* x;
  int64_t x_first_row, x_row, x_pixel, height, width;  // strides of x; size of the whole input
  const void* weight;                                  // S [taps], weight_tap apart
  int64_t weight_tap;
  const void* bias;  // S [channels] or null
  void* y;           // output row row_begin
  Storage y_storage;
  int64_t y_row, y_pixel, row_begin, row_end, out_width;
  int64_t channels, multiplier;  // of the output; input channel = output channel / multiplier
  Window window;
  Activation pre_activation, activation;
};

// Depthwise backward goes row by row of the input, for a block of channels: see depthwise_conv2d_backward.h. Rows in
// scratch are S and of whole panels of channels.

// A row of the gradient of what came before the activation: (grad + add + y times) activation'(z).
struct DepthwiseOutputGradientTile {
  const void* grad;
  const void* y;         // or null
  int64_t pixel, ahead;  // of grad and y; from the row to the one that comes next where rows are dense, or 0
  const void* add;       // S [channels * multiplier], or null
  const void* times;     // likewise, beside y, which needs add
  const void* z;         // S; read where there is an activation
  int64_t z_pixel;
  void* g;                            // `multiplier` planes: every multiplier-th channel from 0, from 1 and so on
  int64_t g_pixel, g_panel, g_plane;  // from a pixel, a panel of channels, a plane to the next
  void* sums;                         // S, of the row, added to those before; planes likewise; or null
  int64_t sums_plane;
  int64_t pixels, channels, multiplier;  // of the input
  Activation activation;
};

// A row a = activation(x scale + shift), and from da the gradients of x, scale and shift.
struct DepthwiseInputTile {
  const void* x;
  void* dx;                // or null
  int64_t x_pixel, ahead;  // likewise, of x and dx
  const void* scale;       // S [channels], or null
  const void* shift;       // likewise
  void* a;
  void* slope;     // activation', of curves
  const void* da;  // like a
  int64_t a_pixel, a_panel;
  void* scale_sums;  // S [channels, rounded up to kPanel], of the row, added to those before; or null
  void* shift_sums;
  int64_t pixels, channels;
  Activation activation;
};

// A row of the window as it meets a row of the input.
struct DepthwiseTaps {
  const void* grad;    // the row of g
  const void* weight;  // S, taps weight_tap apart
  void* dweight;       // likewise, added to; or null, of all rows
};
struct DepthwiseTapsTile {
  const DepthwiseTaps* taps;
  int64_t rows, weight_tap, grad_pixel, grad_panel, out_width;
  const void* a;
  void* dx;                               // or null
  int64_t pixel, panel, width, channels;  // of a and dx; whole panels
  int64_t grad_ahead, ahead;              // as above, from the row of taps[0], and of a and dx
  Window window;
};
// Whether g, a and dx may be bfloat16 or float16 where the table has that: all rows of the window are taken at once, so
// that dx is rounded once.
constexpr bool depthwise_taps_at_once(const Window& w) {
  return w.kernel_w == 3 && w.dilation_w == 1 && w.stride_w <= 2 &&
         (w.kernel_h - 1) * w.dilation_h / w.stride_h + 1 <= (w.stride_w == 1 ? 3 : 2);
}

}  // namespace cnnfast
