// Tiles of matrix products, and what makes their operands.
#pragma once
#include "common.h"

namespace cnnfast {

// Of float32 products on AMX: bfloat16 that a float is the sum of; bytes of them, of a panel, for a scalar of the depth.
constexpr int64_t kPlanes = 3, kPlanesOfDepth = kPlanes * kPanel * 2;

// y[rows][cols] = activation(a[rows][depth] * b[depth][cols] * scale + bias + residual)
struct GemmTile {
  const void* a;  // S, or bfloat16 for gemm_bf16
  int64_t a_row, a_depth;
  // S: panels of kPanel columns, b_panel apart, zero-padded to whole ones; or bfloat16, packed in pairs of the depth
  const void* b;
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

}  // namespace cnnfast
