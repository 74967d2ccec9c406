// pointwise_conv2d for everything that the kernel on tensor cores doesn't take: any number of channels and output
// channels, tensors that don't begin on 16 bytes. One thread an element, a plain loop, scalar loads: right first.
//
// grid       blocks of 256 over the output's elements in memory order, at most 65,535 blocks, striding on from there
// bytes      C loads of x and of weight an output, that caches have to serve; ideally x, weight, residual and y once
// sectors    neighbouring threads are neighbouring output channels: x's are one sector, the weight's strided
// order      channels ascending, float32 FMA
// registers  at most 64;  shared memory  none
#pragma once
#include "common.cuh"

namespace cnnfast::cuda {

constexpr int kPointwiseGenericThreads = 256;

template <class T>
__global__ void __launch_bounds__(kPointwiseGenericThreads, 4)
    pointwise_conv2d_forward_generic_kernel(const PointwiseArguments<T> a) {
  const PointwiseShape& s = a.shape;
  const int64_t count = s.batch * s.image() * s.out_channels;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
    const int64_t pixel = i / s.out_channels, k = i - pixel * s.out_channels;
    const int64_t x_at = s.sampled(pixel) * s.channels, gate_at = pixel / s.image() * s.channels;
    float sum = 0;
    for (int c = 0; c < s.channels; ++c) {
      float x = widen(global_load<T>(a.x, x_at + c));
      if (a.gate) x = widen(narrow<T>(x * widen(global_load<T>(a.gate, gate_at + c))));
      sum += x * widen(global_load<T>(a.weight, k * s.channels + c));
    }
    if (a.bias)
      sum += a.bias_float32 ? global_load<float>(static_cast<const float*>(a.bias), k)
                            : widen(global_load<T>(static_cast<const T*>(a.bias), k));
    if (a.residual) sum += widen(global_load<T>(a.residual, i));
    float v[1] = {sum};
    activate(v, a.activation);
    global_store(a.y, i, narrow<T>(v[0]));
  }
}

template <class T>
void launch_forward_generic(const PointwiseArguments<T>& a, cudaStream_t stream) {
  const int64_t blocks =
      ceil_div<int64_t>(a.shape.batch * a.shape.image() * a.shape.out_channels, kPointwiseGenericThreads);
  launch("pointwise_conv2d_forward_generic_kernel", pointwise_conv2d_forward_generic_kernel<T>,
         dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535)), dim3(kPointwiseGenericThreads), 0, stream, a);
}

}  // namespace cnnfast::cuda
