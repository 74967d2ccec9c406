// inverted_residual: the problem, how it is cut into blocks, and what lies where in a block's shared memory.
#pragma once
#include <cstddef>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../activation.cuh"
#include "../device.cuh"

namespace cnnfast::cuda {

struct InvertedResidualShape {
  int64_t batch;
  int channels, expanded, out_channels;
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  bool expands;  // otherwise x is the expanded tensor

  // Otherwise, out_channels is 0, d and its sums are wanted.
  __host__ __device__ bool projects() const { return out_channels > 0; }

  __host__ __device__ int taps() const { return kernel_h * kernel_w; }
};

// Inputs of an axis that so many neighbouring outputs reach; more than fit any shared memory are as good as 2^15.
inline int inputs_reached(int outputs, int stride, int kernel, int dilation) {
  const int64_t count = static_cast<int64_t>(outputs - 1) * stride + static_cast<int64_t>(kernel - 1) * dilation + 1;
  return static_cast<int>(count < 1 << 15 ? count : 1 << 15);
}

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = 8;
constexpr int kStripOutputs = 4;         // neighbouring outputs of a thread in the depthwise stage
constexpr int kStrips = 16;              // of a block
constexpr int kTilePixels = 64;          // outputs of a block
constexpr int kSharedBytes = 99 * 1024;  // at most, of a block: what sm_86, 89 and 120 have
constexpr int kEnoughTiles = 8;          // of an image: of fewer, blocks share the expanded channels of d
constexpr int kFewestChunks = 4;         // of such a block: each copies the tile of x
constexpr int kSlabBytes = 32;           // of x's channels: as deep as one matrix instruction
constexpr int kChunkBytes = 64;          // of the expanded channels that a block has at a time

template <class T>
constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kExpandedPitch = kChunk<T> + kVec<T>;
constexpr int kOutPadding = 8;  // elements after a row of y in shared memory

// How the warps share a block's 64 pixels x at most kMost output channels in the projection.
constexpr int kFewColumns = 64, kManyColumns = 192;
template <int kMost>
struct Columns {
  static constexpr int kWarpsN = kMost == kFewColumns ? 2 : 4;
  static constexpr int kMTiles = kTilePixels * kWarpsN / (16 * kBlockWarps);
  static constexpr int kNTiles = kMost / (8 * kWarpsN);
};

// Registers of a thread, at most: two blocks a multiprocessor, or the one whose sums and TF32 operands need more.
constexpr int kMaxRegisters = 128, kMaxRegistersOfOne = 224;
constexpr int blocks_at_once(bool tf32, int columns) { return tf32 && columns == kManyColumns ? 1 : 2; }

struct InvertedResidualPlan {
  int tile_h, tile_w;  // outputs of a block, tile_w whole strips
  int in_h, in_w;      // inputs that they reach
  int tiles_h, tiles_w;
  int n_tiles;              // of 8 output channels, of a warp
  int out_columns;          // output channels of a block
  int column_blocks;        // of output channels, fastest in grid.y; 1 where there is no projection
  int chunks;               // of expanded channels, of a block
  int chunk_blocks;         // more than one only where there is no projection
  int stages;               // of weights: 2, the next chunk's are on their way while this one's are used; or 1
  int slabs;                // of x's channels
  int x_slab, weight_slab;  // elements from a slab of x, of expand_weight to the next
  // Bytes from the beginning of shared memory
  int x, e, d, biases, sums, weights;  // positions of the inputs (int) are at 0
  int expand, project;                 // from a stage of weights: dw_weight is at 0
  int stage_bytes, bytes;

  __host__ __device__ int in_pixels() const { return in_h * in_w; }
};

inline int aligned(int64_t bytes) {  // and nothing overflows
  constexpr int64_t kFar = 1 << 28;
  return static_cast<int>(bytes > kFar ? kFar : ceil_div<int64_t>(bytes, 16) * 16);
}

template <class T>
InvertedResidualPlan lay_out(const InvertedResidualShape& s, int tile_h, int tile_w, int stages) {
  constexpr int size = sizeof(T);
  InvertedResidualPlan p{};
  p.tile_h = tile_h;
  p.tile_w = tile_w;
  p.in_h = inputs_reached(tile_h, s.stride_h, s.kernel_h, s.dilation_h);
  p.in_w = inputs_reached(tile_w, s.stride_w, s.kernel_w, s.dilation_w);
  p.tiles_h = ceil_div(s.out_height, tile_h);
  p.tiles_w = ceil_div(s.out_width, tile_w);
  const bool few = s.out_channels <= kFewColumns;
  const int warps_n = few ? Columns<kFewColumns>::kWarpsN : Columns<kManyColumns>::kWarpsN;
  p.column_blocks = few ? 1 : ceil_div(s.out_channels, kManyColumns);
  p.chunks = ceil_div(s.expanded, kChunk<T>);
  p.chunk_blocks = 1;
  if (!s.projects()) {
    const int64_t tiles = static_cast<int64_t>(p.tiles_h) * p.tiles_w;
    const int blocks = tiles > 0 && tiles < kEnoughTiles ? static_cast<int>(ceil_div<int64_t>(kEnoughTiles, tiles)) : 1;
    p.chunks = max(ceil_div(p.chunks, blocks), min(p.chunks, kFewestChunks));
    p.chunk_blocks = ceil_div(ceil_div(s.expanded, kChunk<T>), p.chunks);
  }
  p.n_tiles = ceil_div(ceil_div(s.out_channels, p.column_blocks), 8 * warps_n);
  p.out_columns = 8 * warps_n * p.n_tiles;
  p.stages = stages;
  p.slabs = s.expands ? ceil_div(s.channels, kSlab<T>) : 0;

  const int64_t rows = ceil_div<int64_t>(static_cast<int64_t>(p.in_h) * p.in_w, 16) * 16;  // whole fragments
  const auto place = [&](int64_t bytes) {
    const int at = p.bytes;
    p.bytes = aligned(at + bytes);
    return at;
  };
  place(rows * sizeof(int));
  // Neighbouring threads store neighbouring pieces of a row: a slab begins in other banks than the one before.
  const int shift = p.slabs == 2 ? 2 * kSlab<T> : kSlab<T>;
  p.x_slab = aligned(rows * kSlab<T>) + shift;
  p.weight_slab = (kChunk<T> + 1) * kSlab<T>;
  p.x = place(static_cast<int64_t>(p.slabs) * p.x_slab * size);
  p.e = place(rows * kExpandedPitch<T> * size);
  p.d = place(kTilePixels * kChunkBytes);
  p.biases = place(2 * 2 * kChunk<T> * sizeof(float));  // of two chunks: of expand and of dw
  p.sums = place(s.projects() ? 0 : kStrips * kChunk<T> * sizeof(float));
  p.weights = p.bytes;
  p.expand = aligned(static_cast<int64_t>(s.taps()) * kChunkBytes);
  p.project = aligned(p.expand + static_cast<int64_t>(p.slabs) * p.weight_slab * size);
  p.stage_bytes = p.project + (p.out_columns + p.n_tiles % 2 * 8) * kChunkBytes;  // a warp loads pairs of tiles
  place(static_cast<int64_t>(stages) * p.stage_bytes);
  const int out = kTilePixels * (p.out_columns + kOutPadding) * size;  // over all of it
  if (p.bytes < out) p.bytes = out;
  return p;
}

// The tile that expands the fewest pixels in all, of those that fit with two stages of weights; else with one; else
// smaller ones. From the shape of an image alone, so that its neighbours don't show in it. bytes > kSharedBytes: none.
template <class T>
InvertedResidualPlan make_plan(const InvertedResidualShape& s) {
  struct Tile {
    int h, w;
  };
  const auto best = [&](std::initializer_list<Tile> tiles, int stages) {
    InvertedResidualPlan best{};
    best.bytes = kSharedBytes + 1;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (const Tile tile : tiles) {
      const InvertedResidualPlan p = lay_out<T>(s, tile.h, tile.w, stages);
      const int64_t work =
          static_cast<int64_t>(p.tiles_h) * p.tiles_w * (ceil_div(p.in_pixels(), 16) * 16 + kTilePixels);
      if (p.bytes > kSharedBytes || work >= least) continue;
      best = p;
      least = work;
    }
    return best;
  };
  InvertedResidualPlan p{};
  p.bytes = kSharedBytes + 1;
  for (int stages = 2; stages >= 1 && p.bytes > kSharedBytes; --stages) p = best({{8, 8}, {4, 16}, {16, 4}}, stages);
  if (p.bytes > kSharedBytes) p = best({{4, 8}, {8, 4}}, 1);
  if (p.bytes > kSharedBytes) p = best({{4, 4}, {2, 8}}, 1);
  if (p.bytes > kSharedBytes) p = best({{1, 4}}, 1);
  return p;
}

}  // namespace cnnfast::cuda
