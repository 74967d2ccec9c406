// The stages that ops are made of, each on one tile or shared among the threads; see the .cpp files for who does what.
#pragma once
#include "channels.h"
#include "common.h"
#include "packing.h"

namespace cnnfast::cpu {

// Bytes of intermediate that a tile may keep, so that it stays in L2 (1 to 2 MiB a core on servers) beside a group of
// weight panels and the rows of x that are being read.
constexpr int64_t kTileBytes = 290'000;

// Distance between the rows of an intermediate: whole panels (bfloat16: tiles of AMX), and never a multiple of 4 KiB, where the rows of a
// register block would all fall into one set of the L1 cache.
inline int64_t padded_row(int64_t channels, int64_t itemsize) {
  const int64_t row = round_up(channels, itemsize == 2 ? kPairDepth : kPanel);
  return row * itemsize % 4096 == 0 ? row + kPairDepth : row;
}

// How a fused op walks its output: bands of rows of an image.
struct Band {
  int64_t n, begin, end;  // rows [begin, end) of image n
};
struct Bands {
  int64_t rows, per_image, count, height;

  Band operator[](int64_t i) const {
    const int64_t begin = i % per_image * rows;
    return {i / per_image, begin, std::min(begin + rows, height)};
  }
};
// row_bytes: of the intermediate, for one output row. halo: input rows that neighbouring bands both compute.
// weight_bytes: of the product that reads the intermediate.
Bands bands_of(const Conv& conv, int64_t row_bytes, int64_t halo, int64_t weight_bytes);

// Input rows that the last output row of a band and the first of the next both read.
inline int64_t halo_of(const Conv& conv) {
  const Window& w = conv.window;
  return std::max<int64_t>(0, (w.kernel_h - 1) * w.dilation_h + 1 - w.stride_h);
}
// Input rows that output rows [begin, end) read.
std::pair<int64_t, int64_t> input_rows(const Conv& conv, int64_t begin, int64_t end);

DepthwiseTile depthwise_tile(const Conv& conv, const DepthwiseWeights& weights, Storage y_storage,
                             int64_t pre_activation, int64_t activation_code);
// A depthwise stage that reads an image, through a prologue where that scales: then a few rows at a time are in scratch.
struct DepthwiseStage {
  Storage storage;
  const KernelTable& table;
  Conv conv;
  Tensor x;  // channels_last
  Prologue prologue;
  DepthwiseTile tile;  // y's strides and storage are the caller's to fill in

  DepthwiseStage(const Conv& conv, const Tensor& x, const DepthwiseWeights& weights, Storage y_storage,
                 const Prologue& prologue, int64_t activation_code);
  // Output rows [begin, end) of image n; y: row `begin`.
  void rows(int64_t n, int64_t begin, int64_t end, char* y) const;
};

// What the left operand of a product with these weights is stored as: bfloat16 where both are and the ISA multiplies it,
// else the compute type.
Storage operand_storage(const KernelTable& table, Storage storage, const PointwiseWeights& weights);
// rows, a and y are the caller's to fill in; a bfloat16 a is finite, or anything that zeros may be multiplied with, up to
// a depth of whole kPairDepth.
GemmTile packed_gemm(const PointwiseWeights& weights, Storage a_storage, Storage y_storage, int64_t activation_code);
// Zeros after the channels of each of `pixels` rows of a bfloat16 left side, up to the next row or a whole kPairDepth;
// nothing for other types.
void clear_tail(const GemmTile& tile, char* rows, int64_t pixels);
// Pixels side by side in memory to such rows.
void copy_padded(const GemmTile& tile, const char* from, char* rows, int64_t pixels);
// Columns [col, col + cols), col a multiple of kPanel.
GemmTile columns_of(const GemmTile& whole, int64_t col, int64_t cols);
// The product on this thread.
void multiply(const KernelTable& table, const GemmTile& tile);
// A task's product, in parts that idle threads help with: groups of panels or blocks of rows, of the larger operand.
void gemm_in_parts(const Worker& worker, const KernelTable& table, const GemmTile& whole);
// The whole product on all threads.
void gemm_on_threads(const KernelTable& table, const GemmTile& whole);

}  // namespace cnnfast::cpu
