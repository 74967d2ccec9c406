// Tiles of pixels of which each channel has a scale, a shift, a sum or just an activation, forward and backward.
#pragma once
#include "common.h"

namespace cnnfast {

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

}  // namespace cnnfast
