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
  return aligned && sizeof(T) <= 4 && s.channels_last && s.multiplier == 1 && s.channels % kVec<T> == 0 &&
         s.kernel_h == s.kernel_w && (s.kernel_h == 3 || s.kernel_h == 5) && s.stride_h == s.stride_w &&
         (s.stride_h == 1 || s.stride_h == 2) && s.dilation_h == 1 && s.dilation_w == 1;
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
  if constexpr (sizeof(T) <= 4) with_kernel_and_stride(s, [&]<int K, int S>() { launch_forward<T, K, S>(a, stream); });
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

// What depthwise_conv2d_backward needs besides its outputs.
template <class T>
struct Workspace {
  bool masked;    // an image like y: the gradient through the activation
  Chunks chunks;  // of the weight gradient's first stage
  int64_t sums;   // Accumulate<T> elements of its partial sums
};

template <class T>
Workspace<T> depthwise_conv2d_workspace(const DepthwiseShape& s, int activation) {
  const int vectors = static_cast<int>(ceil_div<int64_t>(s.out_channels(), kVec<T>));
  const Chunks chunks = make_chunks(s.out_width == 0 ? 0 : s.batch * s.out_height, ceil_div(vectors, kWarp));
  return {activation != kIdentity, chunks, chunks.count * (s.taps() + 1) * s.out_channels()};
}

template <class T>
struct BackwardArguments {
  const T* gradient = nullptr;  // of y
  const T* x = nullptr;
  Parameter weight, bias;
  DepthwiseShape shape;
  int pre_activation = kIdentity, activation = kIdentity;
  T* masked = nullptr;               // of the workspace
  Accumulate<T>* partial = nullptr;  // of the workspace
  T* dx = nullptr;                   // null: not wanted, as the next two
  T* dweight = nullptr;
  void* dbias = nullptr;
};

template <class T>
void depthwise_conv2d_weight_gradient(const BackwardArguments<T>& a, const T* gradient, cudaStream_t stream) {
  const DepthwiseShape& s = a.shape;
  const WeightGradientArguments<T> first{
      gradient, a.x, a.partial, s, a.pre_activation, depthwise_conv2d_workspace<T>(s, a.activation).chunks};
  if (first.chunks.count == 0) {
    // nothing to sum: the second stage writes zeros
  } else if (!vectorized<T>(s, {gradient, a.x})) {
    launch_generic("depthwise_conv2d_weight_gradient_generic_kernel",
                   depthwise_conv2d_weight_gradient_generic_kernel<T>, first,
                   first.chunks.count * (s.taps() + 1) * s.out_channels(), stream);
  } else if constexpr (sizeof(T) <= 4) {
    with_kernel_and_stride(s, [&]<int K, int S>() { launch_weight_gradient<T, K, S>(first, stream); });
  }
  launch_weight_gradient_sum<T>(
      {a.partial, first.chunks.count, s.out_channels(), s.taps(), a.dweight, a.dbias, a.bias.float32}, stream);
}

template <class T>
void depthwise_conv2d_backward(const BackwardArguments<T>& a, cudaStream_t stream) {
  const T* gradient = a.gradient;
  if (a.activation != kIdentity && (a.dx || a.dweight || a.dbias)) {
    depthwise_conv2d_forward<T>(
        {a.x, a.weight, a.bias, {}, a.gradient, a.masked, a.shape, a.pre_activation, a.activation}, stream);
    gradient = a.masked;
  }
  if (a.dx) depthwise_conv2d_input_gradient<T>({gradient, a.x, a.weight, a.dx, a.shape, a.pre_activation}, stream);
  if (a.dweight || a.dbias) depthwise_conv2d_weight_gradient(a, gradient, stream);
}

}  // namespace cnnfast::cuda
