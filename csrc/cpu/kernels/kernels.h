// What the ISA-neutral code (checks, tiling, threads) asks of the kernels: plain structs, one table of functions per ISA.
// No torch, no std containers: kernels/isa.cpp compiles this once per ISA, and nothing in it may become a weak symbol.
//
// "Compute type" S is float for float32, bfloat16 and float16 storage, double for float64. Strides are in elements.
#pragma once
#include <cstdint>

#include "../../packing.h"

namespace cnnfast {

enum class Storage : int { f32, f64, bf16, f16 };
constexpr int kStorages = 4;

// Codes as in cnnfast/ops/activations.py. The first are clamps, lo <= y <= hi, a NaN stays NaN; infinite for others.
struct Activation {
  int64_t code;
  double lo, hi;
};

// The window of a convolution; padding below and right is implied by the output's size.
struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
};

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

// Of float32 products on AMX: bfloat16 that a float is the sum of; bytes of them, of a panel, for a scalar of the depth.
constexpr int64_t kPlanes = 3, kPlanesOfDepth = kPlanes * kPanel * 2;

// y[rows][cols] = activation(a[rows][depth] * b[depth][cols] * scale + bias + residual)
struct GemmTile {
  const void* a;  // S, or bfloat16 for gemm_bf16
  int64_t a_row, a_depth;
  const void*
      b;  // S: panels of kPanel columns, b_panel apart, zero-padded to whole ones; or bfloat16, packed in pairs of
          // the depth
  int64_t b_panel;
  const void* bias;      // S [cols, rounded up to kPanel], or null
  const void* residual;  // y_storage, or null
  int64_t residual_row;
  void* y;
  int64_t y_row;
  Storage a_storage, b_storage, y_storage;
  int64_t rows, depth, cols;
  Activation activation;
  // Of a convolution; all 0 in a plain product. `line` rows of a, a_row apart, then the next ones a_line further; of the
  // depth, tap_depth scalars side by side, then those of the next tap, `taps` in a row a_tap apart, then a_tap_line.
  int64_t line, a_line, tap_depth, taps, a_tap, a_tap_line;
  // Of gemm: what is wanted in L2 next, in place of the panels to come; or null.
  const void* ahead;
  int64_t ahead_bytes;
  int64_t chain;      // sums of at most this depth are chains, in even parts, that are added; 0: the kernel's own rule
  const void* scale;  // of a bfloat16 b alone: float [cols, rounded up to kPanel], or null
  bool b_stays;       // a bfloat16 b is in L2 from the call before, and is to be there for the next
  // Floats that are to be multiplied in planes, each as the sum of three bfloat16.
  bool in_planes;
  // Then, once a is: from one plane of a row to the next, in scalars; the floats themselves; which rows are odd, having
  // something that is no such sum; b: two panels' planes.
  int64_t a_plane;
  const void* floats;
  int64_t float_row;
  const uint8_t* odd;
};

// Rows of `depth` floats to planes, zeros behind the depth up to a whole kPairDepth. odd[row]: see GemmTile.
struct RowsTile {
  const void* from;
  int64_t from_row, rows, depth;
  void* to;
  int64_t to_row, to_plane;
  uint8_t* odd;
};

// `count` of at most two panels of floats, from_panel scalars apart, to planes, to_panel bytes apart: kPlanesOfDepth bytes
// for each scalar of the depth, a whole kPairDepth of them.
struct PanelsTile {
  const void* from;
  int64_t from_panel, count, depth;
  void* to;
  int64_t to_panel;
};

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

// grad[i] *= activation'(z[i]), both S.
struct ActivationGradTile {
  void* grad;
  const void* z;
  int64_t count;
  Activation activation;
};

// sums[c] = factor * sum over pixels of x[pixel][c] (* by[pixel][c]); squares[c] the same of x[pixel][c]^2.
struct ChannelSumsTile {
  static constexpr int64_t kRun = 8;  // pixels that are all alike: off by at most 4 units
  const void* x;
  const void* by;  // like x, or null
  int64_t x_pixel;
  void* sums;     // S
  void* squares;  // S, or null; without `by`
  int64_t pixels, channels;
  int64_t run;  // pixels added in order: kRun, or 1 where they are sums themselves
  double factor;
};

// y[pixel][c] = activation(x[pixel][c] * scale[c] + shift[c] + residual[pixel][c]) * gate[c]; y may be x.
struct ScaleTile {
  const void* x;
  int64_t x_pixel;
  const void* scale;     // S, or null: 1
  const void* shift;     // S, or null: 0
  const void* residual;  // like y, or null
  void* y;
  int64_t y_pixel;
  Storage y_storage;
  int64_t pixels, channels;
  Activation activation;
  const void* gate;  // S, or null: 1
};

// The gradients of y = activation(z) * gate, z = x * scale + shift + residual, where the mean of activation(z) has one too:
// dz = activation'(z) * (grad * gate + mean_grad), dx = dz * scale, dresidual = dz. Pixels lie `channels` apart.
struct ScaleShiftGradTile {
  const void* grad;
  const void* x;
  const void* scale;      // S, or null: 1
  const void* shift;      // S, or null: 0
  const void* residual;   // or null
  const void* gate;       // S, or null: 1
  const void* mean_grad;  // S, or null: 0; only with gate
  void* dx;               // or null
  void* dresidual;        // or null
  void* sum;              // S, sums of dz, or null
  void* sum_by_x;         // S, sums of dz * x, or null
  int64_t pixels, channels;
  Activation activation;
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

// sum = sums over pixels of y = activation(x * scale + shift), sum_by_grad = those of y * grad.
struct ScaleShiftSumsTile {
  const void* x;
  const void* scale;  // S
  const void* shift;  // S
  const void* grad;   // or null
  void* sum;          // S
  void* sum_by_grad;  // S, or null
  int64_t pixels, channels;
  Activation activation;
};

// activation(x[pixel][c] * scale[c] + shift[c] + residual[pixel][c]) as operands of products, any of which may be null.
struct OperandTile {
  const void* x;
  const void* residual;  // like x, or null
  int64_t x_pixel;
  const void* scale;  // S, or null: 1
  const void* shift;  // S, or null: 0
  int64_t pixels, channels;
  Activation activation;
  void* rows;  // [pixel][channel], `row` apart
  int64_t row;
  void* panels;  // [panel][pixel][kPanel], `panel` apart; whole panels
  int64_t panel;
  void* columns;  // of operand_bf16 alone: [channel][pixel], `column` apart
  int64_t column;
};

// to[column][row] = from[row][column], words of 32 bits.
struct TransposeTile {
  const void* from;
  int64_t from_row, rows, columns;
  void* to;
  int64_t to_row;
};

// From the gradient of activation(z), z = x * scale + shift, those of x, scale and shift; any of these may be null.
struct GradInputTile {
  const void* grad;  // S
  int64_t grad_row;
  const void* x;
  void* dx;         // like x
  int64_t x_pixel;  // of both
  const void* scale;
  const void* shift;  // S, or null
  int64_t pixels, channels;
  Activation activation;
  void* sums;       // S [channels], added to: of the gradient of z
  void* sums_by_x;  // the same, times x
};

struct KernelTable {
  const char* isa;
  int64_t gemm_rows;  // of a register tile of gemm: work is shared out in multiples of it
  // [storage of x]; a null entry means that this ISA has none and the generic table serves
  void (*depthwise[kStorages])(const DepthwiseTile&);
  void (*depthwise_output_gradient[kStorages])(const DepthwiseOutputGradientTile&);
  void (*depthwise_input[kStorages])(const DepthwiseInputTile&);
  void (*depthwise_input_gradient[kStorages])(const DepthwiseInputTile&);
  void (*widen[kStorages])(const void* x, void* y, int64_t count);  // storage -> S
  void (*channel_sums[kStorages])(const ChannelSumsTile&);
  void (*scale_channels[kStorages])(const ScaleTile&);
  void (*scale_shift_grad[kStorages])(const ScaleShiftGradTile&);
  void (*scale_shift_sums[kStorages])(const ScaleShiftSumsTile&);
  void (*scale_shift_max_pool[kStorages])(const ScaleShiftMaxPoolTile&);
  void (*scale_shift_max_pool_grad[kStorages])(const ScaleShiftMaxPoolTile&);
  void (*max_pool2d[kStorages])(const Pool2dTile&);
  void (*avg_pool2d[kStorages])(const Pool2dTile&);
  void (*local_response_norm[kStorages])(const LocalResponseNormTile&);
  void (*local_response_norm_backward[kStorages])(const LocalResponseNormTile&);
  // [0] float, [1] double
  void (*gemm[2])(const GemmTile&);
  // a bfloat16 panel times scale [kPanel] to float, both b of a GemmTile
  void (*unpair)(const void* pairs, const void* scale, void* panel, int64_t count);
  void (*transpose)(const TransposeTile&);
  // On AMX; null elsewhere.
  void (*gemm_bf16)(const GemmTile&);  // a and b bfloat16
  void (*split_rows)(const RowsTile&);
  void (*operand_bf16)(const OperandTile&);  // from bfloat16 to bfloat16: rows; panels of pairs of pixels; columns
  bool (*split_panels)(const PanelsTile&);   // false: something in them is odd
  // The product of one or two panels and, beside it, what split_panels does for those that come next (or a count of 0).
  bool (*gemm_planes)(const GemmTile&, const PanelsTile& next);
  void (*depthwise_taps[kStorages])(const DepthwiseTapsTile&);  // of g, a and dx; those but S may be null
  void (*activation_grad[2])(const ActivationGradTile&);
  void (*operand[kStorages])(const OperandTile&);
  void (*grad_input[kStorages])(const GradInputTile&);
  void (*winograd_input[kStorages])(const WinogradInputTile&);  // none for f64
  void (*winograd_output)(const WinogradOutputTile&);           // S is float
};

namespace generic {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}

namespace amx {
void add_to(KernelTable& avx512);  // the rest of an AMX machine's table is AVX-512's
}  // namespace amx

}  // namespace cnnfast
