// What the depthwise_conv2d kernels share: the problem, the launch geometry of the vectorised ones, weights in shared
// memory.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>

#include "../../packing.h"
#include "../activation.cuh"

namespace cnnfast::cuda {

struct DepthwiseShape {
  int64_t batch;
  int channels, multiplier;  // of x; y has channels * multiplier
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  bool channels_last;  // of every image tensor: dense NHWC, otherwise dense NCHW

  int64_t out_channels() const { return static_cast<int64_t>(channels) * multiplier; }
  int taps() const { return kernel_h * kernel_w; }
};

// Output size along one axis, and the padding before it.
struct Axis {
  int out, before;
};

// One axis of the output; padding is [before, after], or null for 'same'. Sizes stay far enough below 2^31 that no sum of
// two of them overflows an int; products are 64-bit everywhere.
inline Axis output_axis(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, const int64_t* padding) {
  constexpr int64_t kLargest = 1 << 29;
  for (const int64_t value : {kernel, stride, dilation})
    if (value < 1 || value > kLargest)
      throw std::runtime_error("kernel_size, stride and dilation have to be 1 or more, got " + std::to_string(value));
  const int64_t reach = (kernel - 1) * dilation + 1;
  int64_t out = ceil_div(size, stride), before = 0;
  if (padding) {
    if (padding[0] < 0 || padding[1] < 0)
      throw std::runtime_error("padding can't be negative, got " + std::to_string(min(padding[0], padding[1])));
    if (size + padding[0] + padding[1] < reach)
      throw std::runtime_error("the kernel reaches over " + std::to_string(reach) + " pixels, the padded input has " +
                               std::to_string(size + padding[0] + padding[1]));
    out = (size + padding[0] + padding[1] - reach) / stride + 1;
    before = padding[0];
  } else if ((out - 1) * stride + reach > size) {
    before = ((out - 1) * stride + reach - size) / 2;
  }
  if (size > kLargest || out > kLargest || before > kLargest || reach > kLargest)
    throw std::runtime_error("sizes have to be below 2^29, got " +
                             std::to_string(max(max(size, out), max(before, reach))));
  return {static_cast<int>(out), static_cast<int>(before)};
}

// A weight or bias: element (channel, tap) lies at channel * channel_stride + tap * tap_stride, in elements, and is a
// float32 or of the images' dtype.
struct Parameter {
  const void* data = nullptr;  // none: no bias
  bool float32 = false;
  int64_t channel_stride = 1, tap_stride = 0;
};

template <class T>
__device__ inline Accumulate<T> load_parameter(const Parameter& p, int64_t channel, int tap = 0) {
  const int64_t i = channel * p.channel_stride + tap * p.tap_stride;
  if (p.float32) return global_load<float>(static_cast<const float*>(p.data), i);
  return widen(global_load<T>(static_cast<const T*>(p.data), i));
}

// A packing's header, that the device checks because only it can read it; data is null where weights aren't packed. The
// packer knows the weight alone, so not the input's channels.
struct PackedCheck {
  const void* data = nullptr;
  PackedHeader expected = {};
};

struct PackedWeights {
  Parameter weight, bias;
  PackedCheck check;
};

// The sections of a packing (csrc/packing.h) of the given itemsize: 8 for float64, otherwise 4.
inline PackedWeights packed_weights(const void* packed, const DepthwiseShape& s, int itemsize) {
  const char* bias = static_cast<const char*>(packed) + sizeof(PackedHeader);
  const int64_t panel = round_up(s.out_channels(), kPanel);
  PackedWeights p;
  p.bias = {bias, itemsize == 4, 1, 0};
  p.weight = {bias + panel * itemsize, itemsize == 4, 1, panel};
  p.check.data = packed;
  p.check.expected.magic = kPackedMagic;
  p.check.expected.version = kPackedVersion;
  p.check.expected.op = PackedOp::depthwise_conv2d;
  p.check.expected.itemsize = itemsize;
  p.check.expected.out_channels = static_cast<int>(s.out_channels());
  p.check.expected.kernel_h = s.kernel_h;
  p.check.expected.kernel_w = s.kernel_w;
  return p;
}

__device__ inline void check_packed(const PackedCheck& check) {
  if (!check.data || (threadIdx.x | threadIdx.y | threadIdx.z) != 0) return;
  PackedHeader header;
  unsigned* words = reinterpret_cast<unsigned*>(&header);
#pragma unroll
  for (int i = 0; i < static_cast<int>(offsetof(PackedHeader, reserved)) / 4; ++i)
    words[i] = global_load<unsigned>(static_cast<const unsigned*>(check.data), i);
  const PackedHeader& expected = check.expected;
  if (header.magic != expected.magic || header.version != expected.version || header.op != expected.op ||
      header.itemsize != expected.itemsize || header.out_channels != expected.out_channels ||
      header.kernel_h != expected.kernel_h || header.kernel_w != expected.kernel_w)
    fail();
}

template <class T>
__device__ inline void widen(float (&to)[kVec<T>], const Vec<T>& from) {
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) to[i] = widen(from.v[i]);
}

template <class T>
__device__ inline Vec<T> narrow_vec(const float (&from)[kVec<T>]) {
  Vec<T> to;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) to.v[i] = narrow<T>(from[i]);
  return to;
}

constexpr int kThreads = 256;  // at most, a block
constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;        // rows that share one staging of the weights, where there are blocks enough
constexpr int64_t kEnoughBlocks = 512;  // some four for each multiprocessor of a large GPU

// threadIdx.x: 16-byte vector of channels; y: strip of a row; z: row. A block covers grid-wise `rows` rows of an image.
struct Tiling {
  int lanes, strips, rows_at_once;  // blockDim
  int rows, tiles_w, tiles_h, channel_blocks;

  dim3 block() const { return dim3(lanes, strips, rows_at_once); }
  dim3 grid(int64_t batch) const {
    const int64_t blocks = batch * tiles_w * tiles_h;
    if (blocks > std::numeric_limits<int>::max())
      throw std::runtime_error("depthwise_conv2d: " + std::to_string(blocks) + " blocks, more than a grid holds");
    return dim3(static_cast<unsigned>(blocks), channel_blocks);
  }
};

// As few channel blocks as 32 lanes allow, of nearly equal size and of whole 32-byte sectors.
inline int channel_lanes(int vectors) {
  const int blocks = ceil_div(vectors, kWarp);
  const int lanes = ceil_div(vectors, blocks);
  return blocks > 1 ? lanes + lanes % 2 : lanes;
}

inline Tiling make_tiling(int64_t batch, int rows_total, int strips_total, int vectors) {
  Tiling t;
  t.lanes = channel_lanes(vectors);
  t.channel_blocks = ceil_div(vectors, t.lanes);
  t.tiles_w = ceil_div(strips_total, kThreads / t.lanes);
  t.strips = ceil_div(strips_total, t.tiles_w);
  const int rows_fit = kThreads / (t.lanes * t.strips);
  t.rows_at_once = rows_fit < rows_total ? rows_fit : rows_total;
  if (t.rows_at_once > 64) t.rows_at_once = 64;  // blockDim.z's limit
  const auto blocks = [&](int rows) { return batch * t.tiles_w * ceil_div(rows_total, rows) * t.channel_blocks; };
  t.rows = ceil_div(kRowsPerBlock, t.rows_at_once) * t.rows_at_once;
  while (t.rows > t.rows_at_once && blocks(t.rows) < kEnoughBlocks) t.rows -= t.rows_at_once;
  t.tiles_h = ceil_div(rows_total, t.rows);
  return t;
}

__device__ inline int threads_in_block() { return blockDim.x * blockDim.y * blockDim.z; }
__device__ inline int thread_in_block() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }

// Where this block's pixels begin.
struct BlockOrigin {
  int64_t image;
  int row, strip;
};

__device__ inline BlockOrigin block_origin(const Tiling& t) {
  const unsigned column = blockIdx.x % t.tiles_w, rest = blockIdx.x / t.tiles_w;
  return {static_cast<int64_t>(rest / t.tiles_h), static_cast<int>(rest % t.tiles_h) * t.rows,
          static_cast<int>(column) * t.strips};
}

// Weights in shared memory as float32 [tap][half][lane][4], the bias after the taps: a thread's kVec channels are
// kVec / 4 halves, each read with one 16-byte load whose lanes are side by side, so free of bank conflicts. The 4 floats
// between taps spread the stores.
template <class T>
struct StagedWeights {
  __host__ __device__ static constexpr int tap_stride(int lanes) { return lanes * kVec<T> + 4; }
  static constexpr int bytes(int lanes, int rows) { return rows * tap_stride(lanes) * 4; }
  __host__ __device__ static constexpr int at(int lanes, int tap, int c) {
    return tap * tap_stride(lanes) + ((c % kVec<T>) / 4 * lanes + c / kVec<T>)*4 + c % 4;
  }

  template <int taps>
  __device__ static void stage(float* shared, const Parameter& weight, int first_channel, int channels) {
    const int lanes = blockDim.x;
    const int here = min(lanes * kVec<T>, channels - first_channel);
    const bool tap_fastest = weight.tap_stride == 1;  // in the order of memory, whichever that is
    for (int i = thread_in_block(); i < here * taps; i += threads_in_block()) {
      const int tap = tap_fastest ? i % taps : i / here;
      const int c = tap_fastest ? i / taps : i % here;
      shared_store(shared, at(lanes, tap, c), load_parameter<T>(weight, first_channel + c, tap));
    }
  }

  // As row `tap` of the staged; zeros where there is none.
  __device__ static void stage_bias(float* shared, const Parameter& bias, int tap, int first_channel, int channels) {
    const int lanes = blockDim.x;
    const int here = min(lanes * kVec<T>, channels - first_channel);
    for (int c = thread_in_block(); c < here; c += threads_in_block())
      shared_store(shared, at(lanes, tap, c), bias.data ? load_parameter<T>(bias, first_channel + c) : 0.0f);
  }

  __device__ static void load(float (&w)[kVec<T>], const float* shared, int tap) {
    const int lanes = blockDim.x;
#pragma unroll
    for (int half = 0; half < kVec<T> / 4; ++half) {
      const Vec<float> part =
          shared_load<Vec<float>>(shared, tap * tap_stride(lanes) + (half * lanes + static_cast<int>(threadIdx.x)) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[half * 4 + i] = part.v[i];
    }
  }
};

}  // namespace cnnfast::cuda
