// A separable convolution as two stages on rows of one image: what separable_conv2d.cpp and its sequence are made of.
#pragma once
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

struct Separable {
  Storage storage;  // of x; the result's is pointwise.y_storage
  const KernelTable* table;
  Conv conv;
  DepthwiseTile depthwise;
  GemmTile pointwise;
  int64_t row;  // of the intermediate, in scalars

  int64_t itemsize() const { return compute_size(storage); }
  int64_t tile_bytes(int64_t rows) const { return rows * conv.out_w * row * itemsize(); }

  // Output rows [begin, end) into `tile`, whose first row is `begin`; x begins with input row x_first_row.
  void first_stage(const char* x, int64_t x_first_row, int64_t begin, int64_t end, char* tile) const {
    DepthwiseTile t = depthwise;
    t.x = x;
    t.x_first_row = x_first_row;
    t.row_begin = begin;
    t.row_end = end;
    t.y = tile;
    table->depthwise_to_compute[static_cast<int>(storage)](t);
  }

  // The product of `rows` rows of `tile`; y and residual begin with the same row.
  GemmTile second_stage(int64_t rows, const char* tile, char* y, const char* residual = nullptr) const {
    GemmTile g = pointwise;
    g.a = tile;
    g.rows = rows * conv.out_w;
    g.y = y;
    g.residual = residual;
    return g;
  }
};

// `packed` holds its weights, which are checked against the sizes; rows of x and of the result lie one after another.
Separable separable_of(const Tensor& packed, Storage storage, Storage y_storage, const Conv& conv, int64_t out_channels,
                       int64_t pre_activation, int64_t mid_activation, int64_t activation_code);

}  // namespace cnnfast::cpu
