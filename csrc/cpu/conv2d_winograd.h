// conv2d_packed with weights for Winograd's algorithm.
#pragma once
#include "stages.h"

namespace cnnfast::cpu {

// x, residual and y channels_last; 3 x 3 windows of stride and dilation 1; weights: of 16 products, in `panels` one after
// the other.
void conv2d_winograd(const Conv& conv, const Tensor& x, const PointwiseWeights& weights, const Maybe& residual,
                     int64_t activation_code, const Tensor& y);

}  // namespace cnnfast::cpu
