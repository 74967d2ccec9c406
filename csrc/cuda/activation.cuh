// Activations of values in registers, float32 (the clamps float64, too): all of a vector at once, so that the (uniform)
// branch is taken once a vector.
//
// Errors   sigmoid and tanh some 2, silu 3 units of 2^-24 of the largest result near by, GELU 2 of |x|, as in PyTorch's
//          CUDA kernels; sigmoid is 0 where it would be below 2^-126
// Special  as PyTorch's: a NaN stays; silu and GELU of -Inf are NaN (-Inf * 0), of +Inf +Inf; no other x gives a NaN
// Cost     silu and sigmoid two MUFU and some 10 other instructions a value, tanh and GELU 20 to 30, all inlined and
//          unrolled over the vector: keep n small
#pragma once
#include <cmath>

#include "device.cuh"

namespace cnnfast::cuda {

// The codes of cnnfast.ops.activations; those up to kLastClamp are in one or two instructions.
enum Activation : int {
  kIdentity = 0,
  kRelu = 1,
  kRelu6 = 2,
  kLastClamp = kRelu6,
  kSigmoid = 3,
  kSilu = 4,
  kGelu = 5,
  kTanh = 6,
  kLastActivation = kTanh
};

// For a code up to kLastClamp.
template <class A, int n>
__device__ inline void activate_clamp(A (&v)[n], int code) {
  if (code == kIdentity) return;
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = max_nan(v[i], A(0));
  if (code == kRelu6) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = min_nan(v[i], A(6));
  }
}

// exp overflows to Inf, whose reciprocal is 0.
__device__ inline float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }
// The normal distribution's integral up to x, times x.
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

// For every code.
template <int n>
__device__ inline void activate(float (&v)[n], int code) {
  if (code <= kLastClamp) return activate_clamp(v, code);
  if (code == kSigmoid) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = sigmoid(v[i]);
  } else if (code == kSilu) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] *= sigmoid(v[i]);
  } else if (code == kGelu) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = gelu(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = tanhf(v[i]);
  }
}

// Zeroes the gradient where the input z of a clamp is in its flat part; at a NaN it passes, as PyTorch's does.
template <class A, int n>
__device__ inline void mask_gradient(A (&gradient)[n], const A (&z)[n], int code) {
  if (code == kIdentity) return;
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (z[i] <= A(0) || (code == kRelu6 && z[i] >= A(6))) gradient[i] = A(0);
}

}  // namespace cnnfast::cuda
