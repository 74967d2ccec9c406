// depthwise_conv2d, gradients of weight and bias, in two stages, deterministic: no atomics, a fixed order of summation.
//
//   dweight[c][tap] = sum over pixels of gradient[pixel] * pre_activation(x)[pixel * S - pad + tap]
//   dbias[c]        = sum over pixels of gradient[pixel]
//
// Stage 1, vectorised (for what forward.cuh takes): a block sums one chunk of output rows, of all images in turn.
// tile       a thread: K taps of one kernel row x one 16-byte vector of channels, in registers, strip by strip of 4
//            gradients and the (4 - 1) S + K columns of x under them
// block      (lanes <= 32 vectors, slots of strips, K kernel rows), at most 256 threads; at its end the slots are summed
//            in shared memory, in order
// grid       x: chunk; y: channel block
// bytes      ideally gradient + x once from DRAM; the K kernel rows of a block read the same gradient row and
//            neighbouring rows of x at the same time, so L1 serves all but one of each.
//            L1 -> registers: K (4 + (4 - 1) S + K) vectors for 4 gradients (3x3: 7.5 a gradient at stride 1)
//            partial sums: chunks * (K K + 1) * C floats written and read once; chunks <= 512 / channel blocks
// sectors    16 for a warp's request of 512 bytes of x or gradient; for one of partial sums 32, half used (16 in float32)
// shared     threads * kVec floats, 8 KB at most; free of bank conflicts
// registers  at most 168 (K = 3) and 200 (K = 5: 48 sums, 32 gradients widened, 32 or 44 of x): with 32 lanes blocks of
//            192 and 160 threads, two a multiprocessor; float32 80-120
// Stage 2: a thread sums one (tap, channel) over the chunks, in order; reads are coalesced.
// Accuracy: float32 sums of at most rows * width / slots terms, then of slots, then of chunks.
#pragma once
#include "common.cuh"

namespace cnnfast::cuda {

constexpr int kMaxChunks = 512;

template <int K, int S>
struct WeightGradientTraits {
  static constexpr int kStrip = 4;  // neighbouring gradients that a thread takes at once
  static constexpr int kColumns = (kStrip - 1) * S + K;
  static constexpr int kLoadsPerStrip = K * (kStrip + kColumns);
  static constexpr int kSectorsPerRequest = 16;
  static constexpr int kMaxRegisters = K == 3 ? 168 : 200;
  static constexpr int kMinBlocks = 1;
};

// Chunks of (image, output row), the unit of the first stage's sums.
struct Chunks {
  int64_t rows;  // a chunk
  int count;     // 0 where there is nothing to sum
};

inline Chunks make_chunks(int64_t rows_total, int64_t channel_blocks) {
  if (rows_total == 0) return {0, 0};
  int64_t count = kMaxChunks / channel_blocks;
  if (count < 1) count = 1;
  const int64_t rows = ceil_div(rows_total, count);
  return {rows, static_cast<int>(ceil_div(rows_total, rows))};
}

// partial is [chunk][kernel_h * kernel_w taps, then the bias][out_channels].
template <class T>
struct WeightGradientArguments {
  const T* gradient = nullptr;
  const T* x = nullptr;
  Accumulate<T>* partial = nullptr;
  DepthwiseShape shape;
  int pre_activation = kIdentity;
  Chunks chunks;
};

template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, (WeightGradientTraits<K, S>::kMinBlocks))
    depthwise_conv2d_weight_gradient_kernel(const WeightGradientArguments<T> a) {
  constexpr int kStrip = WeightGradientTraits<K, S>::kStrip, kColumns = WeightGradientTraits<K, S>::kColumns;
  CNNFAST_SHARED(float, slots);
  const DepthwiseShape& s = a.shape;
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * kVec<T>;
  const bool active = channel < s.channels;  // the others only meet the barriers
  const int tap_row = threadIdx.z;

  float sum[K + 1][kVec<T>] = {};  // the last is the bias
  const int64_t rows_total = s.batch * s.out_height;
  const int64_t first = blockIdx.x * a.chunks.rows;
  const int64_t end = active ? min(first + a.chunks.rows, rows_total) : first;
  for (int64_t item = first; item < end; ++item) {
    const int64_t image = item / s.out_height;
    const int row = static_cast<int>(item % s.out_height) * S - s.pad_top + tap_row;
    const bool row_inside = row >= 0 && row < s.height;
    for (int column = threadIdx.y * kStrip; column < s.out_width; column += blockDim.y * kStrip) {
      const int64_t gradient_at = (item * s.out_width + column) * s.channels + channel;
      const int x_column = column * S - s.pad_left;
      const int64_t x_at = ((image * s.height + row) * s.width + x_column) * s.channels + channel;
      Vec<T> raw[kStrip], x[kColumns];
#pragma unroll
      for (int o = 0; o < kStrip; ++o)
        raw[o] = global_load<Vec<T>>(a.gradient, gradient_at + static_cast<int64_t>(o) * s.channels,
                                     column + o < s.out_width);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        x[j] = global_load<Vec<T>>(a.x, x_at + static_cast<int64_t>(j) * s.channels,
                                   row_inside && x_column + j >= 0 && x_column + j < s.width);
      float gradient[kStrip][kVec<T>];
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        widen<T>(gradient[o], raw[o]);
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) sum[K][i] += gradient[o][i];
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float v[kVec<T>];
        widen<T>(v, x[j]);
        activate_clamp(v, a.pre_activation);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (j < k || (j - k) % S != 0 || (j - k) / S >= kStrip) continue;
#pragma unroll
          for (int i = 0; i < kVec<T>; ++i) sum[k][i] += v[i] * gradient[(j - k) / S][i];
        }
      }
    }
  }

  // [half][z][y][x][4]: a warp's 16-byte accesses are side by side.
  const int threads = threads_in_block(), thread = thread_in_block();
#pragma unroll
  for (int k = 0; k <= K; ++k) {
#pragma unroll
    for (int half = 0; half < kVec<T> / 4; ++half)
      shared_store(slots, (half * threads + thread) * 4,
                   Vec<float>{sum[k][half * 4], sum[k][half * 4 + 1], sum[k][half * 4 + 2], sum[k][half * 4 + 3]});
    __syncthreads();
    if (threadIdx.y == 0 && active && (k < K || tap_row == 0)) {
      const int tap = k < K ? tap_row * K + k : K * K;
      const int64_t at = (static_cast<int64_t>(blockIdx.x) * (K * K + 1) + tap) * s.channels + channel;
#pragma unroll
      for (int half = 0; half < kVec<T> / 4; ++half) {
        Vec<float> total{};
        for (unsigned y = 0; y < blockDim.y; ++y) {
          const Vec<float> part = shared_load<Vec<float>>(slots, (half * threads + thread + y * blockDim.x) * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) total.v[i] += part.v[i];
        }
        global_store(a.partial, at + half * 4, total);
      }
    }
    __syncthreads();
  }
}

template <class T>
struct WeightGradientSumArguments {
  const Accumulate<T>* partial = nullptr;
  int chunks = 0;
  int64_t out_channels = 0;
  int taps = 0;
  T* dweight = nullptr;   // [out_channels][taps]; none: not wanted
  void* dbias = nullptr;  // [out_channels]; none: not wanted
  bool bias_float32 = false;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_weight_gradient_sum_kernel(const WeightGradientSumArguments<T> a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;  // [tap][channel]
  const int64_t count = (a.taps + 1) * a.out_channels;
  if (i >= count) return;
  Accumulate<T> total = 0;
  for (int chunk = 0; chunk < a.chunks; ++chunk) total += global_load<Accumulate<T>>(a.partial, chunk * count + i);
  const int64_t channel = i % a.out_channels;
  const int tap = static_cast<int>(i / a.out_channels);
  if (tap < a.taps) {
    if (a.dweight) global_store(a.dweight, channel * a.taps + tap, narrow<T>(total));
  } else if (a.dbias && a.bias_float32) {
    global_store(static_cast<float*>(a.dbias), channel, static_cast<float>(total));
  } else if (a.dbias) {
    global_store(static_cast<T*>(a.dbias), channel, narrow<T>(total));
  }
}

template <class T, int K, int S>
void launch_weight_gradient(const WeightGradientArguments<T>& a, cudaStream_t stream) {
  const int vectors = a.shape.channels / kVec<T>;
  const unsigned lanes = channel_lanes(vectors);
  const unsigned strips = ceil_div(a.shape.out_width, WeightGradientTraits<K, S>::kStrip);
  const unsigned fit = kThreads / (lanes * K);
  const dim3 block(lanes, fit < strips ? fit : strips, K);
  const dim3 grid(a.chunks.count, ceil_div(vectors, static_cast<int>(lanes)));
  launch("depthwise_conv2d_weight_gradient_kernel", depthwise_conv2d_weight_gradient_kernel<T, K, S>, grid, block,
         static_cast<int>(block.x * block.y * block.z) * kVec<T> * 4, stream, a);
}

template <class T>
void launch_weight_gradient_sum(const WeightGradientSumArguments<T>& a, cudaStream_t stream) {
  const int64_t count = (a.taps + 1) * a.out_channels;
  launch("depthwise_conv2d_weight_gradient_sum_kernel", depthwise_conv2d_weight_gradient_sum_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div<int64_t>(count, kThreads))), dim3(kThreads), 0, stream, a);
}

}  // namespace cnnfast::cuda
