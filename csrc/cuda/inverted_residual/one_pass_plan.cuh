// inverted_residual with squeeze-excite in one launch: how the blocks of a cluster share an image, and what lies where in
// their shared memory.
#pragma once
#include "../squeeze_excite/gate.cuh"
#include "plan.cuh"

namespace cnnfast::cuda {

constexpr int kClusterSharedBytes = 227 * 1024;  // at most, of a block: what the targets that have clusters have
constexpr int kReservedBytes = 1024;             // besides, of each block
constexpr int kMostClusterBlocks = 8;            // that every one of them takes
constexpr int kTogether = 4;                     // chunks that the projection loads at once

struct OnePassPlan {
  InvertedResidualPlan image;    // of expand and depthwise: all inputs at once, tiles of outputs as squeeze.cuh's
  InvertedResidualPlan project;  // of a tile's outputs
  int ranks;                     // blocks of a cluster
  int chunks, rank_chunks;       // of expanded channels: all, and those of a block
  int tiles;
  int column_blocks;         // of output channels
  bool sliced;               // whether the hidden values are sums of parts, as of two launches, each of ...
  int slice;                 // ... so many channels
  RowTiling reduce, expand;  // of the two weights of squeeze-excite
  int hidden_rows;           // of a block
  // Bytes from the beginning of shared memory. What other blocks read; the gates go over the means:
  int d, means, hidden;
  int positions;             // where x's pixels go in image.e; over these and the rest of `image` lie ...
  int values, all_hidden;    // ... all means, all hidden values; and then ...
  int stages, stage_bytes;   // ... two stages of the projection
  int weights, weight_rows;  // from a stage, whose d is at 0; rows from a chunk to the next
  int bytes;

  // A multiprocessor's. While all clusters run at once, they take the time of one image, and one pass is predicted to win;
  // beyond, three launches keep the multiprocessors busier, with less shared memory a block.
  int blocks() const { return 2 * (bytes + kReservedBytes) <= kClusterSharedBytes + kReservedBytes ? 2 : 1; }
  __host__ __device__ int value_pitch() const { return ceil_div(slice, 8) * 8; }
};

// From the shape of an image alone; tile: squeeze.cuh's plan. bytes > kClusterSharedBytes: it doesn't fit.
template <class T>
OnePassPlan make_one_pass_plan(const InvertedResidualShape& s, const GateArguments<T>& gate,
                               const InvertedResidualPlan& tile) {
  constexpr int size = sizeof(T);
  OnePassPlan p{};
  p.bytes = kClusterSharedBytes + 1;
  const int64_t tiles = static_cast<int64_t>(tile.tiles_h) * tile.tiles_w;
  const int64_t pixels = static_cast<int64_t>(s.height) * s.width;
  if (tile.bytes > kSharedBytes || tiles * kTilePixels * kChunkBytes > kClusterSharedBytes ||
      pixels > kClusterSharedBytes)
    return p;
  p.bytes = 0;
  const auto place = [&](int64_t bytes) {
    const int at = p.bytes;
    p.bytes = aligned(at + bytes);
    return at;
  };

  p.tiles = static_cast<int>(tiles);
  p.chunks = ceil_div(s.expanded, kChunk<T>);
  p.ranks = p.chunks >= kMostClusterBlocks ? kMostClusterBlocks : p.chunks >= 4 ? 4 : 2;
  p.rank_chunks = ceil_div(p.chunks, p.ranks);
  p.hidden_rows = ceil_div(gate.squeezed, p.ranks);
  const int64_t rank_channels = static_cast<int64_t>(p.rank_chunks) * kChunk<T>;
  p.d = place(p.rank_chunks * tiles * kTilePixels * kChunkBytes);
  p.means = place(rank_channels * sizeof(float));
  p.hidden = place(p.hidden_rows * static_cast<int64_t>(sizeof(float)));
  const int kept = p.bytes;

  InvertedResidualPlan& i = p.image;
  i = tile;
  const auto rows_reached = [&](int rows) { return inputs_reached(rows, s.stride_h, s.kernel_h, s.dilation_h); };
  const auto columns_reached = [&](int columns) {
    return inputs_reached(columns, s.stride_w, s.kernel_w, s.dilation_w);
  };
  i.in_h = max(rows_reached(tile.tiles_h * tile.tile_h), s.pad_top + s.height);
  i.in_w = max(columns_reached(ceil_div(s.out_width, kStripOutputs) * kStripOutputs), s.pad_left + s.width);
  if (s.stride_w == 2) i.in_w |= 1;  // so that StripPlace's neighbours lie in different banks
  // Strips beyond the last column read on, from the next row on, for outputs that there aren't.
  const int beyond = max(columns_reached(tile.tiles_w * tile.tile_w) - i.in_w, 0);
  i.out_columns = 0;
  const int rows = static_cast<int>(ceil_div<int64_t>(pixels, 16)) * 16;  // whole fragments
  i.x_slab = rows * kSlab<T> + (i.slabs == 2 ? 2 * kSlab<T> : kSlab<T>);
  p.positions = place(pixels * sizeof(int));
  i.x = place(static_cast<int64_t>(i.slabs) * i.x_slab * size);
  i.e = place((static_cast<int64_t>(i.in_h) * i.in_w + beyond) * kExpandedPitch<T> * size);
  i.biases = place(2 * 2 * kChunk<T> * sizeof(float));
  i.sums = place(2 * kStrips * kChunk<T> * sizeof(float));
  i.weights = p.bytes;
  i.stage_bytes = i.project;
  place(2 * static_cast<int64_t>(i.stage_bytes));
  const int of_image = p.bytes;

  p.bytes = kept;
  p.sliced = !gate.one_launch();
  p.slice = p.sliced ? GateTraits::kSlice : gate.channels;
  p.reduce = row_tiling(gate.reduce_weight, gate.channels, p.slice);
  p.expand = row_tiling(gate.expand_weight, gate.squeezed, gate.squeezed);
  p.values = place(ceil_div(gate.channels, p.slice) * static_cast<int64_t>(p.value_pitch()) * sizeof(float));
  p.all_hidden = place(round_up(gate.squeezed, 8) * sizeof(float));
  const int of_gates = p.bytes;

  // Output channels of a block at a time: so many that the block which has most to do copies least.
  int64_t least = std::numeric_limits<int64_t>::max();
  p.project = tile;
  for (int n_tiles = Columns<kFewColumns>::kNTiles; n_tiles > 0; --n_tiles) {
    const int columns = 8 * Columns<kFewColumns>::kWarpsN * n_tiles, blocks = ceil_div(s.out_channels, columns);
    const int64_t work = ceil_div<int64_t>(tiles * blocks, p.ranks) * (kTilePixels + columns);
    if (work >= least) continue;
    least = work;
    p.project.n_tiles = n_tiles;
    p.project.out_columns = columns;
    p.column_blocks = blocks;
  }
  p.bytes = kept;
  p.stages = p.bytes;
  p.weights = kTogether * kTilePixels * kChunkBytes;
  // A warp loads pairs of tiles; and neighbouring chunks of a row begin in different banks.
  p.weight_rows = p.project.out_columns + p.project.n_tiles % 2 * 8 + 1;
  p.stage_bytes = p.weights + kTogether * p.weight_rows * kChunkBytes;
  place(2 * p.stage_bytes);  // the outputs go over these and are smaller

  p.bytes = max(p.bytes, max(of_image, of_gates));
  return p;
}

}  // namespace cnnfast::cuda
