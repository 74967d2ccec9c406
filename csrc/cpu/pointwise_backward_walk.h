// What the tasks of pointwise backward share, and one of them.
#pragma once
#include "pointwise_backward.h"
#include "stages.h"

namespace cnnfast::cpu {

// g, or a: what makes it, and of which channels.
struct Side {
  Storage storage;
  const char *x, *residual, *scale, *shift;
  int64_t channels, activation;

  bool as_stored() const { return !residual && !scale && !shift && activation == 0; }
  const char* pixel(int64_t first) const { return x + first * channels * storage_size(storage); }
  // Channels [channel, channel + count) of pixels [first, first + pixels).
  OperandTile tile(int64_t first, int64_t pixels, int64_t channel, int64_t count) const;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// How products are made: by FMA in the compute type; on AMX in bfloat16, or of floats in planes (products.h).
enum class By { fma, bf16, planes };

struct PointwiseBackward {
  PointwiseBackward(const PointwiseGradientsOf& of, PointwiseGradients& gradients);
  void run();

  // dW is left^T right, or its transpose is: where it is small its columns are the more of the channels.
  const Side& left() const { return g_left ? g : a; }
  const Side& right() const { return g_left ? a : g; }
  void operand(const Side& side, const OperandTile& t) const;
  // A range's sums: of shift and of scale, `in` each, then of the bias.
  char* sums_of(int64_t range) const { return mutable_bytes_of(*sums) + range * (2 * in + out) * scalar; }

  const PointwiseGradientsOf& of;
  PointwiseGradients& gradients;
  const Storage storage;
  const KernelTable& table;
  const int64_t scalar, pixels, in, out;
  const Side g, a;
  const bool g_left;
  const By by;
  const Storage operands;  // what they are stored as
  const bool input_wanted;
  const int64_t tile;     // pixels at a time
  Maybe no_bias, packed;  // for products on AMX; the weight
  GemmTile product{};     // da = g W
  Maybe sums, parts;      // of dW; a row a range of pixels

 private:
  By how() const;
  Tensor zeros(const Ints& size) const;
  Tensor parts_of(int64_t ranges) const;
  void pack_weight();
  void weight_in_blocks(int64_t tiles);
  Tensor totals() const;
  Tensor weight() const;
};

// Pixels of a range: dx and its sums, if `first_pass`; rows x cols of its part of dW, if `weight`.
struct PointwiseTask {
  Range pixels;
  int64_t range;  // which one
  bool first_pass, weight;
  Range rows, cols;
};
void walk(const PointwiseBackward& op, const PointwiseTask& task);

}  // namespace cnnfast::cpu
