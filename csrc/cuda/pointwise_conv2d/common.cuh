// What the pointwise_conv2d kernels share: the problem, and where its pixels lie.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../activation.cuh"
#include "../device.cuh"

namespace cnnfast::cuda {

// x, residual and y are dense NHWC.
struct PointwiseShape {
  int64_t batch;
  int channels, out_channels;
  int height, width, out_height, out_width;  // below 2^29
  int stride_h, stride_w;

  __host__ __device__ int64_t image() const { return static_cast<int64_t>(out_height) * out_width; }  // pixels of y's
  // The pixel of x, over all images, that is sampled for pixel `at` of y.
  __host__ __device__ int64_t sampled(int64_t at) const {
    if (stride_h == 1 && stride_w == 1) return at;
    const int64_t row = at / out_width, column = at - row * out_width;
    const int64_t n = row / out_height;
    return (n * height + (row - n * out_height) * stride_h) * width + column * stride_w;
  }
};

template <class T>
struct PointwiseArguments {
  const T* x = nullptr;
  const T* weight = nullptr;   // [out_channels][channels]
  const void* bias = nullptr;  // none, or [out_channels] of float32 or T
  bool bias_float32 = false;
  const T* gate = nullptr;      // none, or [batch][channels]
  const T* residual = nullptr;  // none, or like y
  T* y = nullptr;
  PointwiseShape shape;
  int activation = kIdentity;
  bool tf32 = false;  // whether float32 may be rounded to TF32
};

}  // namespace cnnfast::cuda
