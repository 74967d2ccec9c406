// depthwise_conv2d for everything that the vectorised kernels don't take: any kernel size, stride, dilation, padding,
// multiplier and channel count, NHWC or NCHW, and float64. One thread an element, plain loops, scalar loads: right first.
//
// grid       blocks of 256 over the output's elements in memory order, at most 65,535 blocks, striding on from there
// bytes      taps loads of x and of weight an output, that caches have to serve; ideally x + weight + y once
// sectors    NHWC: neighbouring threads are neighbouring channels (multiplier 1), NCHW at stride 1: neighbouring columns:
//            coalesced; otherwise strided
// registers  at most 64;  shared memory  none
#pragma once
#include "common.cuh"
#include "forward.cuh"
#include "input_gradient.cuh"
#include "weight_gradient.cuh"

namespace cnnfast::cuda {

constexpr int kGenericMaxRegisters = 64;

// The element (n, c, h, w) of a dense image tensor, and back from its position in memory.
struct ImageIndex {
  int64_t n, c;
  int h, w;
};

struct ImageLayout {
  int64_t channels;
  int height, width;
  bool channels_last;

  __host__ __device__ int64_t at(int64_t n, int64_t c, int h, int w) const {
    return channels_last ? ((n * height + h) * width + w) * channels + c
                         : ((n * channels + c) * height + h) * width + w;
  }
  __host__ __device__ ImageIndex index(int64_t i) const {
    const int64_t pixels = static_cast<int64_t>(height) * width;
    const int64_t n = i / (pixels * channels), rest = i % (pixels * channels);
    const int64_t c = channels_last ? rest % channels : rest / pixels;
    const int64_t pixel = channels_last ? rest / channels : rest % pixels;
    return {n, c, static_cast<int>(pixel / width), static_cast<int>(pixel % width)};
  }
};

__host__ __device__ inline ImageLayout input_layout(const DepthwiseShape& s) {
  return {s.channels, s.height, s.width, s.channels_last};
}
__host__ __device__ inline ImageLayout output_layout(const DepthwiseShape& s) {
  return {static_cast<int64_t>(s.channels) * s.multiplier, s.out_height, s.out_width, s.channels_last};
}

template <class T>
__device__ inline Accumulate<T> load_activated(const T* x, int64_t at, int activation) {
  Accumulate<T> v[1] = {widen(global_load<T>(x, at))};
  activate_clamp(v, activation);
  return v[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) depthwise_conv2d_forward_generic_kernel(const ForwardArguments<T> a) {
  const DepthwiseShape& s = a.shape;
  const ImageLayout in = input_layout(s), out = output_layout(s);
  check_packed(a.packed);
  const int64_t count = s.batch * out.channels * s.out_height * s.out_width;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
    const ImageIndex y = out.index(i);
    Accumulate<T> sum[1] = {a.bias.data ? load_parameter<T>(a.bias, y.c) : Accumulate<T>(0)};
    for (int r = 0; r < s.kernel_h; ++r) {
      const int64_t h = static_cast<int64_t>(y.h) * s.stride_h - s.pad_top + static_cast<int64_t>(r) * s.dilation_h;
      if (h < 0 || h >= s.height) continue;
      for (int k = 0; k < s.kernel_w; ++k) {
        const int64_t w = static_cast<int64_t>(y.w) * s.stride_w - s.pad_left + static_cast<int64_t>(k) * s.dilation_w;
        if (w < 0 || w >= s.width) continue;
        sum[0] += load_activated(a.x, in.at(y.n, y.c / s.multiplier, h, w), a.pre_activation) *
                  load_parameter<T>(a.weight, y.c, r * s.kernel_w + k);
      }
    }
    if (a.gradient) {
      Accumulate<T> gradient[1] = {widen(global_load<T>(a.gradient, i))};
      mask_gradient(gradient, sum, a.activation);
      global_store(a.y, i, narrow<T>(gradient[0]));
    } else {
      activate_clamp(sum, a.activation);
      global_store(a.y, i, narrow<T>(sum[0]));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    depthwise_conv2d_input_gradient_generic_kernel(const InputGradientArguments<T> a) {
  const DepthwiseShape& s = a.shape;
  const ImageLayout in = input_layout(s), out = output_layout(s);
  const int64_t count = s.batch * in.channels * s.height * s.width;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
    const ImageIndex x = in.index(i);
    Accumulate<T> sum[1] = {0};
    for (int r = 0; r < s.kernel_h; ++r) {
      const int64_t h = static_cast<int64_t>(x.h) + s.pad_top - static_cast<int64_t>(r) * s.dilation_h;
      if (h < 0 || h % s.stride_h != 0 || h / s.stride_h >= s.out_height) continue;
      for (int k = 0; k < s.kernel_w; ++k) {
        const int64_t w = static_cast<int64_t>(x.w) + s.pad_left - static_cast<int64_t>(k) * s.dilation_w;
        if (w < 0 || w % s.stride_w != 0 || w / s.stride_w >= s.out_width) continue;
        for (int m = 0; m < s.multiplier; ++m) {
          const int64_t c = x.c * s.multiplier + m;
          sum[0] += widen(global_load<T>(a.gradient, out.at(x.n, c, h / s.stride_h, w / s.stride_w))) *
                    load_parameter<T>(a.weight, c, r * s.kernel_w + k);
        }
      }
    }
    if (a.pre_activation != kIdentity) {
      const Accumulate<T> z[1] = {widen(global_load<T>(a.x, i))};
      mask_gradient(sum, z, a.pre_activation);
    }
    global_store(a.dx, i, narrow<T>(sum[0]));
  }
}

// The first stage of the weight gradient: a thread sums one (tap or bias, channel) over one chunk of output rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    depthwise_conv2d_weight_gradient_generic_kernel(const WeightGradientArguments<T> a) {
  const DepthwiseShape& s = a.shape;
  const ImageLayout in = input_layout(s), out = output_layout(s);
  const int taps = s.kernel_h * s.kernel_w;
  const int64_t sums = (taps + 1) * out.channels, count = a.chunks.count * sums;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
    const int64_t chunk = i / sums, c = i % out.channels;
    const int tap = static_cast<int>(i % sums / out.channels);
    const int r = tap / s.kernel_w, k = tap % s.kernel_w;
    const int64_t end = min((chunk + 1) * a.chunks.rows, s.batch * s.out_height);
    Accumulate<T> sum = 0;
    for (int64_t item = chunk * a.chunks.rows; item < end; ++item) {
      const int64_t n = item / s.out_height;
      const int out_row = static_cast<int>(item % s.out_height);
      const int64_t h = static_cast<int64_t>(out_row) * s.stride_h - s.pad_top + static_cast<int64_t>(r) * s.dilation_h;
      if (tap < taps && (h < 0 || h >= s.height)) continue;
      for (int column = 0; column < s.out_width; ++column) {
        const int64_t w =
            static_cast<int64_t>(column) * s.stride_w - s.pad_left + static_cast<int64_t>(k) * s.dilation_w;
        if (tap < taps && (w < 0 || w >= s.width)) continue;
        const Accumulate<T> gradient = widen(global_load<T>(a.gradient, out.at(n, c, out_row, column)));
        sum +=
            tap == taps ? gradient : gradient * load_activated(a.x, in.at(n, c / s.multiplier, h, w), a.pre_activation);
      }
    }
    global_store(a.partial, i, sum);
  }
}

template <class Arguments>
void launch_generic(const char* name, void (*kernel)(Arguments), const Arguments& a, int64_t elements,
                    cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(elements, kThreads);
  launch(name, kernel, dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535)), dim3(kThreads), 0, stream, a);
}

}  // namespace cnnfast::cuda
