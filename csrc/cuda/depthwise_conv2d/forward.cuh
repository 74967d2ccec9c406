// depthwise_conv2d, forward, vectorised: float32, float16 or bfloat16, NHWC, channels a multiple of the 16-byte vector
// (4 or 8), square kernels of 3 or 5, stride 1 or 2, dilation 1, multiplier 1; float32 arithmetic, plain FMA.
//
//   y = activation(depthwise(pre_activation(x), weight) + bias)
//   or, given a gradient of y:  y = gradient * activation'(depthwise(...) + bias), what both gradients start from
//
// tile       a thread: a strip of 4 neighbouring outputs (2 for 5x5 at stride 2) x one 16-byte vector of channels, in
//            registers; each of the (strip - 1) S + K input columns of a kernel row is loaded and widened once and used
//            for all outputs that it reaches
// block      (lanes <= 32 vectors, strips, rows at once), at most 256 threads; walks down 8 rows or more where there are
//            blocks enough: the weights are staged once for all of them, and neighbouring rows' loads meet in L1
// grid       x: image, tile of rows, tile of strips; y: channel block
// bytes      ideally x + weight + y once from DRAM, what holds while the halo rows of a tile stay in L2.
//            L2 -> L1: a block's own halo: ((rows - 1) S + K) x ((columns - 1) S + K) pixels for rows x columns outputs
//            L1 -> registers: K ((strip - 1) S + K) vectors a strip (3x3: 4.5 an output at stride 1, 6.75 at 2)
// sectors    16 of 32 bytes for a warp's request of 512: none is loaded for nothing, where a pixel's channels are whole
//            sectors (C * sizeof(T) % 32 == 0)
// shared     (K K + 1) (lanes kVec + 4) floats of weights and bias: 10,400 B (3x3, 16-bit) to 27,040 B (5x5, 16-bit);
//            loads are free of bank conflicts where 8 divides lanes or lanes divides 8
// registers  at most 128, so two blocks of 256 a multiprocessor (16-bit 111-128, float32 72-108)
// can't      anything else: generic.cuh
#pragma once
#include "common.cuh"

namespace cnnfast::cuda {

template <int K, int S>
struct ForwardTraits {
  static constexpr int kStrip = K == 5 && S == 2 ? 2 : 4;  // neighbouring outputs of a thread; 4 would spill there
  static constexpr int kColumns = (kStrip - 1) * S + K;    // input columns of a strip
  static constexpr int kLoadsPerStrip = K * kColumns;      // 16-byte loads of x, of every strip inside the image
  static constexpr int kSectorsPerRequest = 16;            // lanes = 32
  static constexpr int kMaxRegisters = 128;
  static constexpr int kMinBlocks = 2;
};

template <class T>
struct ForwardArguments {
  const T* x = nullptr;
  Parameter weight, bias;
  PackedCheck packed;
  const T* gradient = nullptr;  // of y; none: y itself is wanted
  T* y = nullptr;
  DepthwiseShape shape;
  int pre_activation = kIdentity, activation = kIdentity;
};

template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, (ForwardTraits<K, S>::kMinBlocks))
    depthwise_conv2d_forward_kernel(const ForwardArguments<T> a, const Tiling tiling) {
  using Traits = ForwardTraits<K, S>;
  constexpr int kStrip = Traits::kStrip, kColumns = Traits::kColumns;
  CNNFAST_SHARED(float, weights);
  const DepthwiseShape& s = a.shape;

  check_packed(a.packed);
  const int first_channel = blockIdx.y * blockDim.x * kVec<T>;
  StagedWeights<T>::template stage<K * K>(weights, a.weight, first_channel, s.channels);
  StagedWeights<T>::stage_bias(weights, a.bias, K * K, first_channel, s.channels);
  __syncthreads();

  const BlockOrigin origin = block_origin(tiling);
  const int channel = first_channel + threadIdx.x * kVec<T>;
  const int out_column = (origin.strip + threadIdx.y) * kStrip;
  if (channel >= s.channels || out_column >= s.out_width) return;

  const int first_column = out_column * S - s.pad_left;
  const int end_row = min(origin.row + tiling.rows, s.out_height);
  for (int out_row = origin.row + threadIdx.z; out_row < end_row; out_row += blockDim.z) {
    float sum[kStrip][kVec<T>];
#pragma unroll
    for (int o = 0; o < kStrip; ++o) StagedWeights<T>::load(sum[o], weights, K * K);

#pragma unroll 1
    for (int r = 0; r < K; ++r) {
      const int row = out_row * S - s.pad_top + r;
      const bool row_inside = row >= 0 && row < s.height;
      const int64_t row_at = ((origin.image * s.height + row) * s.width + first_column) * s.channels + channel;
      Vec<T> x[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const bool inside = row_inside && first_column + j >= 0 && first_column + j < s.width;
        x[j] = global_load<Vec<T>>(a.x, row_at + static_cast<int64_t>(j) * s.channels, inside);
      }
      float w[K][kVec<T>];
#pragma unroll
      for (int k = 0; k < K; ++k) StagedWeights<T>::load(w[k], weights, r * K + k);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float v[kVec<T>];
        widen<T>(v, x[j]);
        activate_clamp(v, a.pre_activation);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (j < k || (j - k) % S != 0 || (j - k) / S >= kStrip) continue;
#pragma unroll
          for (int i = 0; i < kVec<T>; ++i) sum[(j - k) / S][i] += v[i] * w[k][i];
        }
      }
    }

    const int64_t y_at = ((origin.image * s.out_height + out_row) * s.out_width + out_column) * s.channels + channel;
#pragma unroll
    for (int o = 0; o < kStrip; ++o) {
      if (out_column + o >= s.out_width) break;
      const int64_t at = y_at + static_cast<int64_t>(o) * s.channels;
      if (a.gradient) {
        float gradient[kVec<T>];
        widen<T>(gradient, global_load<Vec<T>>(a.gradient, at));
        mask_gradient(gradient, sum[o], a.activation);
        global_store(a.y, at, narrow_vec<T>(gradient));
      } else {
        activate_clamp(sum[o], a.activation);
        global_store(a.y, at, narrow_vec<T>(sum[o]));
      }
    }
  }
}

template <class T, int K, int S>
void launch_forward(const ForwardArguments<T>& a, cudaStream_t stream) {
  const DepthwiseShape& s = a.shape;
  const Tiling t =
      make_tiling(s.batch, s.out_height, ceil_div(s.out_width, ForwardTraits<K, S>::kStrip), s.channels / kVec<T>);
  launch("depthwise_conv2d_forward_kernel", depthwise_conv2d_forward_kernel<T, K, S>, t.grid(s.batch), t.block(),
         StagedWeights<T>::bytes(t.lanes, K * K + 1), stream, a, t);
}

}  // namespace cnnfast::cuda
