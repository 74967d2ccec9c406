// depthwise_conv2d on raw device pointers: forward, gradient of the input, gradients of weight and bias. No torch: nvcc
// alone compiles it, or a host compiler with tests/cuda_host/cuda_host.h. Each kernel's file opens with its costs.
//
// Image tensors (x, y, their gradients) are dense, all NHWC or all NCHW; sums are float32 (float64 for float64).
#pragma once
#include <initializer_list>

#include "depthwise_conv2d/common.cuh"
#include "depthwise_conv2d/forward.cuh"
#include "depthwise_conv2d/generic.cuh"
#include "depthwise_conv2d/input_gradient.cuh"
#include "depthwise_conv2d/weight_gradient.cuh"

namespace cnnfast::cuda {

// Whether the vectorised kernels take this problem; every image tensor's address goes in.
template <class T>
bool vectorized(const DepthwiseShape& s, std::initializer_list<const void*> images) {
  bool aligned = true;
  for (const void* image : images) aligned &= reinterpret_cast<uintptr_t>(image) % 16 == 0;
  return aligned && sizeof(T) <= 4 && s.channels_last && s.multiplier == 1 && s.channels % kVec<T> == 0 && s.kernel_h == s.kernel_w &&
         (s.kernel_h == 3 || s.kernel_h == 5) && s.stride_h == s.stride_w && (s.stride_h == 1 || s.stride_h == 2) &&
         s.dilation_h == 1 && s.dilation_w == 1;
}

// Calls f.template operator()<K, S>() for the shape's kernel size and stride.
template <class F>
void with_kernel_and_stride(const DepthwiseShape& s, F f) {
  if (s.kernel_h == 3)
    s.stride_h == 1 ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
  else
    s.stride_h == 1 ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
}

template <class T>
void depthwise_conv2d_forward(const ForwardArguments<T>& a, cudaStream_t stream) {
  const DepthwiseShape& s = a.shape;
  const int64_t elements = s.batch * s.out_channels() * s.out_height * s.out_width;
  if (elements == 0) return;
  if (!vectorized<T>(s, {a.x, a.y, a.gradient}))
    return launch_generic("depthwise_conv2d_forward_generic_kernel", depthwise_conv2d_forward_generic_kernel<T>, a,
                          elements, stream);
  if constexpr (sizeof(T) <= 4)
    with_kernel_and_stride(s, [&]<int K, int S>() { launch_forward<T, K, S>(a, stream); });
}

template <class T>
void depthwise_conv2d_input_gradient(const InputGradientArguments<T>& a, cudaStream_t stream) {
  const DepthwiseShape& s = a.shape;
  const int64_t elements = s.batch * s.channels * s.height * s.width;
  if (elements == 0) return;
  if (!vectorized<T>(s, {a.x, a.gradient, a.dx}))
    return launch_generic("depthwise_conv2d_input_gradient_generic_kernel",
                          depthwise_conv2d_input_gradient_generic_kernel<T>, a, elements, stream);
  if constexpr (sizeof(T) <= 4)
    with_kernel_and_stride(s, [&]<int K, int S>() { launch_input_gradient<T, K, S>(a, stream); });
}

// The first stage's chunks; the workspace holds chunks.count * (taps + 1) * out_channels sums.
template <class T>
Chunks depthwise_conv2d_chunks(const DepthwiseShape& s) {
  const int vectors = static_cast<int>(ceil_div<int64_t>(s.out_channels(), kVec<T>));
  return make_chunks(s.out_width == 0 ? 0 : s.batch * s.out_height, ceil_div(vectors, kWarp));
}

// a.partial and a.chunks describe the workspace; sum.partial and sum.chunks are taken from there.
template <class T>
void depthwise_conv2d_weight_gradient(const WeightGradientArguments<T>& a, WeightGradientSumArguments<T> sum,
                                      cudaStream_t stream) {
  const DepthwiseShape& s = a.shape;
  if (s.channels == 0) return;
  if (a.chunks.count == 0) {
    // nothing to sum: the second stage writes zeros
  } else if (!vectorized<T>(s, {a.x, a.gradient})) {
    launch_generic("depthwise_conv2d_weight_gradient_generic_kernel", depthwise_conv2d_weight_gradient_generic_kernel<T>,
                   a, a.chunks.count * (s.taps() + 1) * s.out_channels(), stream);
  } else if constexpr (sizeof(T) <= 4) {
    with_kernel_and_stride(s, [&]<int K, int S>() { launch_weight_gradient<T, K, S>(a, stream); });
  }
  sum.partial = a.partial;
  sum.chunks = a.chunks.count;
  sum.out_channels = s.out_channels();
  sum.taps = s.taps();
  launch_weight_gradient_sum(sum, stream);
}

}  // namespace cnnfast::cuda
