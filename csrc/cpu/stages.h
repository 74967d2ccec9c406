// The stages that ops are made of, each on one tile or shared among the threads; see the .cpp files for who does what.
#pragma once
#include "channels.h"
#include "common.h"
#include "packing.h"
#include "products.h"

namespace cnnfast::cpu {

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
// pointwise_conv2d's gate, (N, C, 1, 1) or none, as what is done to x on the way in.
Prologue gated(const Maybe& gate, const Tensor& x);

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

}  // namespace cnnfast::cpu
