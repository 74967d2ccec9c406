// depthwise_conv2d, gradient of the input, vectorised, for what forward.cuh takes.
//
//   dx = pre_activation'(x) * sum over taps of gradient[(pixel + pad - tap) / S] * weight[tap]
//
// A gather: each dx is written once, by one thread, in a fixed order of summation; no atomics.
// tile       a thread: kStrip = 4 neighbouring pixels of dx x one 16-byte vector of channels; strips start where
//            (column + pad_left) is a multiple of S, so which tap meets which gradient column is known to the compiler;
//            of the K kernel rows only every S-th meets a row of dx, and only those are walked
// block, grid  as forward.cuh, over dx's pixels
// bytes      ideally gradient + weight + dx once (+ x once with a pre-activation).
//            L1 -> registers: ceil(K / S) * kColumns vectors for 4 pixels of dx (3x3: 4.5 each at stride 1, 1.5 at 2)
// sectors, shared, registers   as forward.cuh
#pragma once
#include "common.cuh"

namespace cnnfast::cuda {

template <int K, int S>
struct InputGradientTraits {
  static constexpr int kStrip = 4;                                 // neighbouring pixels of dx of a thread
  static constexpr int kBefore = (K - 1) / S;                      // gradient columns left of the strip's own
  static constexpr int kColumns = (kStrip - 1) / S + kBefore + 1;  // gradient columns of a strip
  static constexpr int kRows = ceil_div(K, S);                     // kernel rows that meet a row of dx, at most
  static constexpr int kLoadsPerStrip = kRows * kColumns;
  static constexpr int kSectorsPerRequest = 16;
  static constexpr int kMaxRegisters = 128;
  static constexpr int kMinBlocks = 2;
};

template <class T>
struct InputGradientArguments {
  const T* gradient = nullptr;
  const T* x = nullptr;  // read only where there is a pre-activation
  Parameter weight;
  T* dx = nullptr;
  DepthwiseShape shape;
  int pre_activation = kIdentity;
};

template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, (InputGradientTraits<K, S>::kMinBlocks))
    depthwise_conv2d_input_gradient_kernel(const InputGradientArguments<T> a, const Tiling tiling) {
  using Traits = InputGradientTraits<K, S>;
  constexpr int kStrip = Traits::kStrip, kColumns = Traits::kColumns;
  CNNFAST_SHARED(float, weights);
  const DepthwiseShape& s = a.shape;

  const int first_channel = blockIdx.y * blockDim.x * kVec<T>;
  StagedWeights<T>::template stage<K * K>(weights, a.weight, first_channel, s.channels);
  __syncthreads();

  const BlockOrigin origin = block_origin(tiling);
  const int channel = first_channel + threadIdx.x * kVec<T>;
  const int column = (origin.strip + threadIdx.y) * kStrip - s.pad_left % S;  // of dx; the first may be -1
  if (channel >= s.channels || column >= s.width) return;

  const int first_column = (column + s.pad_left) / S - Traits::kBefore;  // of the gradient
  const int end_row = min(origin.row + tiling.rows, s.height);
  for (int row = origin.row + threadIdx.z; row < end_row; row += blockDim.z) {
    float sum[kStrip][kVec<T>] = {};
    const int first_tap = (row + s.pad_top) % S;
#pragma unroll 1
    for (int r = 0; r < Traits::kRows; ++r) {
      const int tap_row = first_tap + r * S;
      const int out_row = (row + s.pad_top) / S - r;
      const bool row_inside = tap_row < K && out_row >= 0 && out_row < s.out_height;
      const int64_t row_at =
          ((origin.image * s.out_height + out_row) * s.out_width + first_column) * s.channels + channel;
      Vec<T> gradient[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const bool inside = row_inside && first_column + j >= 0 && first_column + j < s.out_width;
        gradient[j] = global_load<Vec<T>>(a.gradient, row_at + static_cast<int64_t>(j) * s.channels, inside);
      }
      float w[K][kVec<T>];
#pragma unroll
      for (int k = 0; k < K; ++k) StagedWeights<T>::load(w[k], weights, (tap_row < K ? tap_row : 0) * K + k);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float v[kVec<T>];
        widen<T>(v, gradient[j]);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int o = (j - Traits::kBefore) * S + k;
          if (o < 0 || o >= kStrip) continue;
#pragma unroll
          for (int i = 0; i < kVec<T>; ++i) sum[o][i] += v[i] * w[k][i];
        }
      }
    }

    const int64_t dx_at = ((origin.image * s.height + row) * s.width + column) * s.channels + channel;
#pragma unroll
    for (int o = 0; o < kStrip; ++o) {
      if (column + o < 0 || column + o >= s.width) continue;
      const int64_t at = dx_at + static_cast<int64_t>(o) * s.channels;
      if (a.pre_activation != kIdentity) {
        float x[kVec<T>];
        widen<T>(x, global_load<Vec<T>>(a.x, at));
        mask_gradient(sum[o], x, a.pre_activation);
      }
      global_store(a.dx, at, narrow_vec<T>(sum[o]));
    }
  }
}

template <class T, int K, int S>
void launch_input_gradient(const InputGradientArguments<T>& a, cudaStream_t stream) {
  const DepthwiseShape& s = a.shape;
  const int strips = ceil_div(s.width + s.pad_left % S, InputGradientTraits<K, S>::kStrip);
  const Tiling t = make_tiling(s.batch, s.height, strips, s.channels / kVec<T>);
  launch("depthwise_conv2d_input_gradient_kernel", depthwise_conv2d_input_gradient_kernel<T, K, S>, t.grid(s.batch),
         t.block(), StagedWeights<T>::bytes(t.lanes, K * K), stream, a, t);
}

}  // namespace cnnfast::cuda
