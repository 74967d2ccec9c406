// What the squeeze_excite kernels share: vectors of n elements, and how the pixels of channels_last images are shared out.
#pragma once
#include <stdexcept>
#include <string>

#include "../../packing.h"
#include "../activation.cuh"

namespace cnnfast::cuda {

constexpr int kExciteThreads = 256;  // a block of the kernels that read images
constexpr int kInFlight = 4;         // loads of an image that a thread issues before it uses the first

// What one thread loads or stores at once: 16 bytes (n = kVec<T>), or one element.
template <class T, int n>
struct alignas(n * sizeof(T)) Values {
  T v[n];
};

// float32 beside them, 16 bytes at a time.
template <int n>
constexpr int kFloats = n < 4 ? n : 4;

struct ExciteShape {
  int64_t batch;
  int channels, squeezed, pixels;
  bool channels_last;  // dense NHWC, otherwise dense NCHW

  __host__ __device__ int64_t elements() const { return batch * channels * pixels; }
};

// Chunks of an image's pixels, one a block. They depend on the image's shape and dtype alone, never on the batch, so an
// image's sums don't either.
struct PixelTiling {
  int lanes, slots;   // blockDim: vectors of channels, pixels at once
  int chunk, chunks;  // pixels, and how many chunks an image has
  int channel_blocks;

  dim3 block() const { return dim3(lanes, slots); }
};

constexpr int kPixelsPerThread = 8;
constexpr int kMaxImageChunks = 64;  // of which the gate's kernels add up the sums

inline int chunk_pixels(int pixels, int at_once) {
  const int fewest = ceil_div(ceil_div(pixels, kMaxImageChunks), at_once);
  return at_once * (fewest > kPixelsPerThread ? fewest : kPixelsPerThread);
}

// channels_last: as few channel blocks as 32 lanes allow, of nearly equal size and of whole 32-byte sectors.
inline PixelTiling channels_last_tiling(const ExciteShape& s, int n) {
  PixelTiling t;
  const int vectors = s.channels / n, blocks = ceil_div(vectors, 32);
  t.lanes = ceil_div(vectors, blocks);
  if (blocks > 1) t.lanes += t.lanes % 2;
  t.channel_blocks = ceil_div(vectors, t.lanes);
  t.slots = kExciteThreads / t.lanes;
  if (t.slots > s.pixels) t.slots = s.pixels;
  t.chunk = chunk_pixels(s.pixels, t.slots);
  t.chunks = ceil_div(s.pixels, t.chunk);
  return t;
}

// NCHW: a warp for each channel's row of pixels.
inline PixelTiling nchw_tiling(const ExciteShape& s, int n) {
  PixelTiling t;
  t.lanes = 32;
  t.slots = kExciteThreads / 32;
  t.channel_blocks = ceil_div(s.channels, t.slots);
  t.chunk = chunk_pixels(s.pixels, 32 * n);
  t.chunks = ceil_div(s.pixels, t.chunk);
  return t;
}

template <int n, class P>
bool aligned(const P* p) {
  return reinterpret_cast<uintptr_t>(p) % (n * sizeof(P)) == 0;
}

// Whether an image's rows in memory are whole vectors.
template <class T>
bool in_vectors(const ExciteShape& s) {
  return (s.channels_last ? s.channels : s.pixels) % kVec<T> == 0;
}

inline unsigned grid_blocks(const char* kernel, int64_t blocks) {
  if (blocks > std::numeric_limits<int>::max())
    throw std::runtime_error(std::string(kernel) + ": " + std::to_string(blocks) + " blocks, more than a grid holds");
  return static_cast<unsigned>(blocks);
}

}  // namespace cnnfast::cuda
