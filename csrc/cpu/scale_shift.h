// The gradients of activation(x * scale + shift + residual): for scale_shift, and for ops that begin so.
#pragma once
#include "channels.h"

namespace cnnfast::cpu {

// x channels_last; scale and shift (C), or none.
struct Scaled {
  Tensor x;
  Maybe scale, shift;
  int64_t activation;

  Scaled(const Tensor& x, const Maybe& scale, const Maybe& shift, int64_t activation);
};

struct ScaledGradients {
  Tensor x, residual, scale, shift;  // the first two channels_last, of x's dtype, or without elements
};

// grad and residual channels_last, of x's dtype. With gates and mean_grads, (N, C, 1, 1) of the compute type: of y =
// activation(...) * gates, where each pixel of activation(...) has mean_grads besides.
ScaledGradients scale_shift_gradients(const Tensor& grad, const Scaled& of, const Maybe& residual, const Maybe& gates,
                                      const Maybe& mean_grads, bool wants_x, bool wants_residual);

}  // namespace cnnfast::cpu
