// squeeze_excite, last launch: y = post_activation(x * gate + residual), one gate an image and channel, float32.
//
// layout     as pool.cuh; gates [image][channel]
// tile       NHWC: a thread: one vector of channels, whose gates stay in registers, x every slots-th pixel of a chunk,
//            4 pixels in flight. NCHW: 4 vectors of an image's rows, 256 apart
// block      256 threads, NHWC as pool.cuh's
// grid       NHWC: as pool.cuh's, from the last image to the first: what the pool read last is still in L2.
//            NCHW: 1024 vectors a block, from the last to the first, too
// bytes      x, residual and y once; x from L2 as far as it fits there; gates once for 8 pixels or more
// sectors    16 of 32 bytes for a warp's request of 512 bytes of x, residual and y
// shared     none
// registers  at most 128: two blocks of 256 a multiprocessor
#pragma once
#include "common.cuh"

namespace cnnfast::cuda {

struct ScaleTraits {
  static constexpr int kSectorsPerRequest = 16;
  static constexpr int kMaxRegisters = 128;
  static constexpr int kMinBlocks = 2;
};

template <class T>
struct ScaleArguments {
  const T* x = nullptr;
  const T* residual = nullptr;  // none: null
  const float* gates = nullptr;
  T* y = nullptr;
  ExciteShape shape;
  int post_activation = kIdentity;
};

// gate: of one channel (m = 1), or of each.
template <class T, int n, int m>
__device__ inline Values<T, n> scaled(const Values<T, n>& x, const float (&gate)[m], const Values<T, n>& residual,
                                      int post_activation) {
  float v[n];
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = widen(x.v[i]) * gate[m == 1 ? 0 : i] + widen(residual.v[i]);
  activate(v, post_activation);
  Values<T, n> y;
#pragma unroll
  for (int i = 0; i < n; ++i) y.v[i] = narrow<T>(v[i]);
  return y;
}

template <class T, int n>
__global__ void __launch_bounds__(kExciteThreads, ScaleTraits::kMinBlocks)
    squeeze_excite_scale_kernel(const ScaleArguments<T> a, const PixelTiling t) {
  constexpr int kPart = kFloats<n>;
  const ExciteShape& s = a.shape;
  const unsigned item = gridDim.x - 1 - blockIdx.x;
  const int64_t image = item / t.chunks;
  const int begin = static_cast<int>(item % t.chunks) * t.chunk;
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * n;
  if (channel >= s.channels) return;
  const int end = min(begin + t.chunk, s.pixels);

  float gate[n];
#pragma unroll
  for (int part = 0; part < n; part += kPart) {
    const auto g = global_load<Values<float, kPart>>(a.gates, image * s.channels + channel + part);
#pragma unroll
    for (int i = 0; i < kPart; ++i) gate[part + i] = g.v[i];
  }
#pragma unroll 1
  for (int pixel = begin + threadIdx.y; pixel < end; pixel += kInFlight * blockDim.y) {
    Values<T, n> x[kInFlight], residual[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = pixel + j * static_cast<int>(blockDim.y);
      const int64_t offset = (image * s.pixels + at) * s.channels + channel;
      x[j] = global_load<Values<T, n>>(a.x, offset, at < end);
      residual[j] = global_load<Values<T, n>>(a.residual, offset, a.residual && at < end);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = pixel + j * static_cast<int>(blockDim.y);
      if (at >= end) break;
      global_store(a.y, (image * s.pixels + at) * s.channels + channel,
                   scaled(x[j], gate, residual[j], a.post_activation));
    }
  }
}

template <class T, int n>
__global__ void __launch_bounds__(kExciteThreads, ScaleTraits::kMinBlocks)
    squeeze_excite_scale_nchw_kernel(const ScaleArguments<T> a) {
  const ExciteShape& s = a.shape;
  const int64_t count = s.elements();
  const int64_t begin = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * kInFlight * kExciteThreads * n;
  const int64_t first_row = begin / s.pixels;  // row: (image, channel)
  const unsigned first_pixel = static_cast<unsigned>(begin % s.pixels);

  Values<T, n> x[kInFlight], residual[kInFlight];
  float gate[kInFlight][1];
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    const unsigned i = (j * kExciteThreads + threadIdx.x) * n;
    const bool inside = begin + i < count;
    x[j] = global_load<Values<T, n>>(a.x, begin + i, inside);
    residual[j] = global_load<Values<T, n>>(a.residual, begin + i, inside && a.residual);
    gate[j][0] = global_load<float>(a.gates, first_row + (first_pixel + i) / s.pixels, inside);
  }
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    const unsigned i = (j * kExciteThreads + threadIdx.x) * n;
    if (begin + i >= count) break;
    global_store(a.y, begin + i, scaled(x[j], gate[j], residual[j], a.post_activation));
  }
}

template <class T, int n>
void launch_scale(const ScaleArguments<T>& a, cudaStream_t stream) {
  const ExciteShape& s = a.shape;
  if (s.channels_last) {
    const char* const name = "squeeze_excite_scale_kernel";
    const PixelTiling t = channels_last_tiling(s, n);
    launch(name, squeeze_excite_scale_kernel<T, n>, dim3(grid_blocks(name, s.batch * t.chunks), t.channel_blocks),
           t.block(), 0, stream, a, t);
  } else {
    const char* const name = "squeeze_excite_scale_nchw_kernel";
    const int64_t blocks = ceil_div<int64_t>(s.elements(), kInFlight * kExciteThreads * n);
    launch(name, squeeze_excite_scale_nchw_kernel<T, n>, dim3(grid_blocks(name, blocks)), dim3(kExciteThreads), 0,
           stream, a);
  }
}

}  // namespace cnnfast::cuda
