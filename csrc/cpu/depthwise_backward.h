// Both gradients of a depthwise convolution in one walk down the rows, beside what its neighbours hand over.
#pragma once
#include <array>

#include "stages.h"

namespace cnnfast::cpu {

// What else is in the gradient of the convolution's result, and what x passes on its way in.
struct Around {
  Maybe add, y, times;  // grad + add + y times; add (C) or (N, C, 1, 1), times (C), of the compute type
  Maybe scale, shift;   // (C), of the compute type
  int64_t pre_activation, activation;
};

// The gradients that are sums over pixels; of a share, a row of channels each, of the weight one a tap.
enum Sum { kWeight, kBias, kScale, kShift, kSums };

// How the work is cut into tasks.
struct Parts {
  int64_t block, blocks;   // channels of the input, whole panels
  int64_t images, groups;  // of the batch
  int64_t rows, bands;     // of the input

  int64_t shares() const { return groups * bands; }
};

struct DepthwiseBackward {
  // wanted: bits for x, weight, bias, scale and shift. into: where x's gradient goes, else a new image.
  DepthwiseBackward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Maybe& bias, const Conv& conv,
                    const Around& around, int64_t wanted, const Maybe& into = std::nullopt);

  bool wants(int bit) const { return wanted >> bit & 1; }
  bool wants_input() const { return wanted & 0b11001; }
  // The gradient of the weight, (C * multiplier, 1, kernel_h, kernel_w), or of one number a channel.
  Tensor sum(Sum which) const;

  const Storage storage;
  const KernelTable& table;
  const Conv conv;
  const Around around;
  const int64_t wanted, multiplier, out_channels, taps, padded, scalar, item;  // padded: x's channels in whole panels
  const int64_t ring;  // rows of the output that meet one of the input, at most
  const Tensor grad, x, packed;
  const DepthwiseWeights weights;
  const Parts parts;
  const std::array<int64_t, kSums + 1> first;  // where each sum begins in a share
  Tensor planes;                               // the weight as (multiplier, taps, padded)
  Tensor dx, shares;

 private:
  Parts cut() const;
  void lay_out_weights();
  void add_shares();
};

// A task of those that op.parts counts: a block of channels of a band of the images of a group.
void walk(const DepthwiseBackward& op, int64_t task);

}  // namespace cnnfast::cpu
