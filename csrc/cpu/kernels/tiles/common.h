// What all tiles are described with. "Compute type" S is float for float32, bfloat16 and float16 storage, double for float64.
// Strides are in elements.
#pragma once
#include <cstdint>

#include "../../../packing.h"

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

}  // namespace cnnfast
