// squeeze_excite, first launch: sums of each channel's pixels, a chunk of an image a block.
//
//   partial[image][chunk][channel] = sum over the chunk's pixels of x
//
// layout     x dense NHWC or NCHW, float32, float16 or bfloat16; sums float32. Vectorised where the channels (NCHW: the
//            pixels) are whole 16-byte vectors and x is aligned; otherwise a thread takes one element for a vector
// tile       NHWC: a thread: one vector of channels x every slots-th pixel of the chunk, 4 loads in flight; at the end
//            the slots are summed in shared memory, in order
//            NCHW: a warp: one channel's row of pixels; its lanes are summed by shuffles
// block      256 threads: NHWC (lanes <= 32 vectors, slots), NCHW 8 warps, so 8 channels
// grid       x: image, chunk of at least 8 vectors a thread, at most 64 chunks an image; y: block of channels
// bytes      x once; partial written once: chunks * C * 4 bytes an image, of x the (4 / sizeof(T) / pixels of a chunk)th
// sectors    16 of 32 bytes for a warp's request of 512 bytes of x, none loaded for nothing where rows are whole sectors
// shared     NHWC: 32 bytes a thread (16-bit), 16 (float32); free of bank conflicts. NCHW: none
// registers  at most 64: four blocks of 256 a multiprocessor
// order      fixed, by C, H * W, dtype and layout alone: a thread's pixels, slots or lanes, then chunks (gate.cuh)
#pragma once
#include "common.cuh"

namespace cnnfast::cuda {

struct PoolTraits {
  static constexpr int kSectorsPerRequest = 16;
  static constexpr int kMaxRegisters = 64;
  static constexpr int kMinBlocks = 4;
};

template <class T>
struct PoolArguments {
  const T* x = nullptr;
  float* partial = nullptr;
  ExciteShape shape;
};

template <class T, int n>
__global__ void __launch_bounds__(kExciteThreads, PoolTraits::kMinBlocks)
    squeeze_excite_pool_kernel(const PoolArguments<T> a, const PixelTiling t) {
  CNNFAST_SHARED(float, slots);
  constexpr int kPart = kFloats<n>;
  const ExciteShape& s = a.shape;
  const int64_t image = blockIdx.x / t.chunks;
  const int begin = static_cast<int>(blockIdx.x % t.chunks) * t.chunk;
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * n;
  const bool active = channel < s.channels;  // the others only meet the barrier
  const int end = active ? min(begin + t.chunk, s.pixels) : begin;

  float sum[n] = {};
  for (int pixel = begin + threadIdx.y; pixel < end; pixel += kInFlight * blockDim.y) {
    Values<T, n> x[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = pixel + j * static_cast<int>(blockDim.y);
      x[j] = global_load<Values<T, n>>(a.x, (image * s.pixels + at) * s.channels + channel, at < end);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
#pragma unroll
      for (int i = 0; i < n; ++i) sum[i] += widen(x[j].v[i]);
  }

  // [part][y][x][4]: a warp's 16-byte accesses are side by side.
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int part = 0; part < n; part += kPart) {
    Values<float, kPart> own;
#pragma unroll
    for (int i = 0; i < kPart; ++i) own.v[i] = sum[part + i];
    shared_store(slots, part * threads + thread * kPart, own);
  }
  __syncthreads();
  if (threadIdx.y != 0 || !active) return;
#pragma unroll
  for (int part = 0; part < n; part += kPart) {
    Values<float, kPart> total{};
#pragma unroll 4
    for (unsigned y = 0; y < blockDim.y; ++y) {
      const Values<float, kPart> of_slot =
          shared_load<Values<float, kPart>>(slots, part * threads + (thread + y * blockDim.x) * kPart);
#pragma unroll
      for (int i = 0; i < kPart; ++i) total.v[i] += of_slot.v[i];
    }
    global_store(a.partial, static_cast<int64_t>(blockIdx.x) * s.channels + channel + part, total);
  }
}

template <class T, int n>
__global__ void __launch_bounds__(kExciteThreads, PoolTraits::kMinBlocks)
    squeeze_excite_pool_nchw_kernel(const PoolArguments<T> a, const PixelTiling t) {
  const ExciteShape& s = a.shape;
  const int64_t image = blockIdx.x / t.chunks;
  const int begin = static_cast<int>(blockIdx.x % t.chunks) * t.chunk;
  const int channel = blockIdx.y * blockDim.y + threadIdx.y;
  if (channel >= s.channels) return;  // a whole warp
  const int end = min(begin + t.chunk, s.pixels);
  const int64_t row = (image * s.channels + channel) * s.pixels;

  float sum[n] = {};
  for (int pixel = begin + threadIdx.x * n; pixel < end; pixel += kInFlight * 32 * n) {
    Values<T, n> x[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = pixel + j * 32 * n;
      x[j] = global_load<Values<T, n>>(a.x, row + at, at < end);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
#pragma unroll
      for (int i = 0; i < n; ++i) sum[i] += widen(x[j].v[i]);
  }
#pragma unroll
  for (int width = n / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) sum[0] += __shfl_xor_sync(~0u, sum[0], delta);
  if (threadIdx.x == 0) global_store(a.partial, static_cast<int64_t>(blockIdx.x) * s.channels + channel, sum[0]);
}

template <class T>
PixelTiling pool_tiling(const ExciteShape& s, bool vectorized) {
  const int n = vectorized ? kVec<T> : 1;
  return s.channels_last ? channels_last_tiling(s, n) : nchw_tiling(s, n);
}

template <class T, int n>
void launch_pool(const PoolArguments<T>& a, cudaStream_t stream) {
  const PixelTiling t = pool_tiling<T>(a.shape, n > 1);
  const char* const name = a.shape.channels_last ? "squeeze_excite_pool_kernel" : "squeeze_excite_pool_nchw_kernel";
  const dim3 grid(grid_blocks(name, a.shape.batch * t.chunks), t.channel_blocks);
  if (a.shape.channels_last)
    launch(name, squeeze_excite_pool_kernel<T, n>, grid, t.block(), t.lanes * t.slots * n * 4, stream, a, t);
  else
    launch(name, squeeze_excite_pool_nchw_kernel<T, n>, grid, t.block(), 0, stream, a, t);
}

}  // namespace cnnfast::cuda
