// The gates of squeeze-excite, from sums of pixels that whoever read the image left, [image][chunk][channel] in float32:
//
//   mean   = sum over chunks of partial / pixels
//   hidden = activation(reduce_weight mean + reduce_bias)         reduce_weight (R, C)
//   gates  = gate_activation(expand_weight hidden + expand_bias)  expand_weight (C, R)
//
// launches   C R <= 32,768 (and C + R <= 8,192): one, a block of 512 threads an image. Otherwise two, a block of 256 for
//            256 channels of 4 images: more multiprocessors read the weights, and fewer times. Which depends on C and R
//            alone, and so does the order of every sum
// layout     vectors float32; weights float32, float16 or bfloat16, rows contiguous; biases of that type or float32
// tile       product.cuh's: 4 rows of a weight at once, times vectors in shared memory
// grid       one launch: x: image. Two: x: 4 images, y: 256 channels
// bytes      weights once an image or 4 images, from L2; partial once; between the two launches C / 256 * R * 4 bytes an
//            image, written once, read C / 256 times
// sectors    a warp's request of weights is contiguous: 16 of 32 bytes where groups have no idle lane
// shared     one launch: 4 (C + R) bytes, 32 KB at most. Two: 4 KB; 4 KB + 16 min(R, 1024) bytes.
//            Loads are free of bank conflicts
// registers  at most 128: two blocks of 256 a multiprocessor, or the one of 512
// can't      C above 16 million: the grid
#pragma once
#include "common.cuh"
#include "product.cuh"

namespace cnnfast::cuda {

struct GateTraits {
  static constexpr int kThreads = 512, kSliceThreads = 256;
  static constexpr int kMaxRegisters = 128;
  static constexpr int kMostWeights = 1 << 15, kMostValues = 1 << 13;  // of one launch
  static constexpr int kImages = 4;                                    // of a block where there are two
  static constexpr int kSlice = 256;                                   // channels, likewise
  static constexpr int kTile = 1024;                                   // of hidden in shared memory, likewise
};

template <class T>
struct GateArguments {
  const float* partial = nullptr;  // [image][chunk][channel]
  int64_t batch = 0;
  int chunks = 0, pixels = 0, channels = 0, squeezed = 0;
  const T* reduce_weight = nullptr;
  GateBias reduce_bias;
  const T* expand_weight = nullptr;
  GateBias expand_bias;
  int activation = kIdentity, gate_activation = kIdentity;
  float* hidden = nullptr;  // gate_workspace floats
  float* gates = nullptr;   // [image][channel]
  T* rounded = nullptr;     // instead of these, where they are wanted in T

  int slices() const { return ceil_div(channels, GateTraits::kSlice); }
  bool one_launch() const {
    return static_cast<int64_t>(channels) * squeezed <= GateTraits::kMostWeights &&
           channels + squeezed <= GateTraits::kMostValues;
  }
};

// How many floats `hidden` has to have.
template <class T>
int64_t gate_workspace(const GateArguments<T>& a) {
  return a.one_launch() ? 0 : a.batch * a.slices() * a.squeezed;
}

template <class T>
__device__ inline float channel_mean(const GateArguments<T>& a, int64_t image, int channel, bool valid) {
  float sum = 0;
#pragma unroll 8
  for (int chunk = 0; chunk < a.chunks; ++chunk)
    sum += global_load<float>(a.partial, (image * a.chunks + chunk) * a.channels + channel, valid);
  return sum / static_cast<float>(a.pixels);
}

__device__ inline float activated(float v, int activation) {
  float one[1] = {v};
  activate(one, activation);
  return one[0];
}

template <class T>
__device__ inline void store_gate(const GateArguments<T>& a, int64_t image, int channel, float z) {
  const float gate = activated(z, a.gate_activation);
  const int64_t at = image * a.channels + channel;
  a.rounded ? global_store(a.rounded, at, narrow<T>(gate)) : global_store(a.gates, at, gate);
}

template <class T>
__global__ void __launch_bounds__(GateTraits::kThreads, 1)
    squeeze_excite_gate_kernel(const GateArguments<T> a, const RowTiling reduce, const RowTiling expand) {
  CNNFAST_SHARED(float, values);
  const int pitch = ceil_div(a.channels, 8) * 8, hidden_pitch = ceil_div(a.squeezed, 8) * 8;
  float* const hidden = values + pitch;
  const int64_t image = blockIdx.x;
  for (int c = threadIdx.x; c < a.channels; c += blockDim.x)
    shared_store(values, staged_at(reduce.n, pitch, c), channel_mean(a, image, c, true));
  __syncthreads();
  for_rows(0, a.squeezed, reduce.lanes, [&](const Rows& rows) {
    float sum[kProductRows][1];
    begin_with<T>(sum, a.reduce_bias, rows, reduce.lanes);
    multiply(sum, a.reduce_weight, a.channels, rows, 0, a.channels, reduce, values, pitch);
    finish(sum, rows, reduce.lanes,
           [&](int row, int, float z) { shared_store(hidden, staged_at(expand.n, hidden_pitch, row), z); });
  });
  __syncthreads();
  for (int at = threadIdx.x; at < hidden_pitch; at += blockDim.x)  // in memory's order, with what is only padding
    shared_store(hidden, at, activated(shared_load<float>(hidden, at), a.activation));
  __syncthreads();
  for_rows(0, a.channels, expand.lanes, [&](const Rows& rows) {
    float sum[kProductRows][1];
    begin_with<T>(sum, a.expand_bias, rows, expand.lanes);
    multiply(sum, a.expand_weight, a.squeezed, rows, 0, a.squeezed, expand, hidden, hidden_pitch);
    finish(sum, rows, expand.lanes, [&](int row, int, float z) { shared_store(values, row, z); });
  });
  __syncthreads();
  for (int c = threadIdx.x; c < a.channels; c += blockDim.x) store_gate(a, image, c, shared_load<float>(values, c));
}

// hidden[image][slice][R] = the slice's part of reduce_weight mean.
template <class T>
__global__ void __launch_bounds__(GateTraits::kSliceThreads, 2)
    squeeze_excite_reduce_kernel(const GateArguments<T> a, const RowTiling t) {
  CNNFAST_SHARED(float, values);
  constexpr int kImages = GateTraits::kImages, kSlice = GateTraits::kSlice;
  const int64_t first_image = static_cast<int64_t>(blockIdx.x) * kImages;
  const int begin = blockIdx.y * kSlice, inputs = min(kSlice, a.channels - begin);
#pragma unroll 1
  for (int image = 0; image < kImages; ++image)
    if (static_cast<int>(threadIdx.x) < inputs)
      shared_store(values, image * kSlice + staged_at(t.n, kSlice, threadIdx.x),
                   channel_mean(a, first_image + image, begin + threadIdx.x, first_image + image < a.batch));
  __syncthreads();
  for_rows(0, a.squeezed, t.lanes, [&](const Rows& rows) {
    float sum[kProductRows][kImages] = {};
    multiply(sum, a.reduce_weight, a.channels, rows, begin, inputs, t, values, kSlice);
    finish(sum, rows, t.lanes, [&](int row, int image, float part) {
      if (first_image + image < a.batch)
        global_store(a.hidden, ((first_image + image) * gridDim.y + blockIdx.y) * a.squeezed + row, part);
    });
  });
}

template <class T>
__global__ void __launch_bounds__(GateTraits::kSliceThreads, 2)
    squeeze_excite_expand_kernel(const GateArguments<T> a, const RowTiling t) {
  CNNFAST_SHARED(float, values);
  constexpr int kImages = GateTraits::kImages, kSlice = GateTraits::kSlice, kTile = GateTraits::kTile;
  const int64_t first_image = static_cast<int64_t>(blockIdx.x) * kImages;
  const int begin = blockIdx.y * kSlice, end = min(begin + kSlice, a.channels);
  const int pitch = min(kTile, ceil_div(a.squeezed, 8) * 8);
  float* const sums = values + kImages * pitch;
  const auto stage = [&](int tile) {
    for (int i = threadIdx.x; i < kImages * pitch; i += blockDim.x) {
      const int64_t image = first_image + i / pitch;
      const int at = i % pitch, row = tile + at;
      if (row >= a.squeezed) continue;
      float z = load_bias<T>(a.reduce_bias, row, true);
#pragma unroll 8
      for (unsigned slice = 0; slice < gridDim.y; ++slice)
        z += global_load<float>(a.hidden, (image * gridDim.y + slice) * a.squeezed + row, image < a.batch);
      shared_store(values, i / pitch * pitch + staged_at(t.n, pitch, at), activated(z, a.activation));
    }
    __syncthreads();
  };
  if (a.squeezed <= kTile) stage(0);
  for_rows(begin, end, t.lanes, [&](const Rows& rows) {
    float sum[kProductRows][kImages];
    begin_with<T>(sum, a.expand_bias, rows, t.lanes);
    for (int tile = 0; tile < a.squeezed; tile += kTile) {
      if (a.squeezed > kTile) stage(tile);
      multiply(sum, a.expand_weight, a.squeezed, rows, tile, min(kTile, a.squeezed - tile), t, values, pitch);
      if (a.squeezed > kTile) __syncthreads();
    }
    finish(sum, rows, t.lanes,
           [&](int row, int image, float z) { shared_store(sums, image * kSlice + row - begin, z); });
  });
  __syncthreads();
  const int channel = begin + threadIdx.x;
  if (channel >= end) return;
#pragma unroll 1
  for (int image = 0; image < kImages && first_image + image < a.batch; ++image)
    store_gate(a, first_image + image, channel, shared_load<float>(sums, image * kSlice + threadIdx.x));
}

// a.batch > 0
template <class T>
void launch_gates(const GateArguments<T>& a, cudaStream_t stream) {
  const RowTiling expand = row_tiling(a.expand_weight, a.squeezed, a.squeezed);
  if (a.one_launch()) {
    const RowTiling reduce = row_tiling(a.reduce_weight, a.channels, a.channels);
    const char* const name = "squeeze_excite_gate_kernel";
    const int shared = static_cast<int>(round_up(a.channels, 8) + round_up(a.squeezed, 8)) * 4;
    return launch(name, squeeze_excite_gate_kernel<T>, dim3(grid_blocks(name, a.batch)), dim3(GateTraits::kThreads),
                  shared, stream, a, reduce, expand);
  }
  const char *const first = "squeeze_excite_reduce_kernel", *const second = "squeeze_excite_expand_kernel";
  const dim3 grid(grid_blocks(first, ceil_div<int64_t>(a.batch, GateTraits::kImages)), a.slices());
  const RowTiling reduce = row_tiling(a.reduce_weight, a.channels, GateTraits::kSlice);
  launch(first, squeeze_excite_reduce_kernel<T>, grid, dim3(GateTraits::kSliceThreads),
         GateTraits::kImages * GateTraits::kSlice * 4, stream, a, reduce);
  const int tile = static_cast<int>(min(round_up(a.squeezed, 8), static_cast<int64_t>(GateTraits::kTile)));
  launch(second, squeeze_excite_expand_kernel<T>, grid, dim3(GateTraits::kSliceThreads),
         GateTraits::kImages * (tile + GateTraits::kSlice) * 4, stream, a, expand);
}

}  // namespace cnnfast::cuda
