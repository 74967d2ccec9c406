// inverted_residual with squeeze-excite in one launch, for targets that have thread-block clusters (compute capability 9.0
// and 10.x; on others a trap). A cluster makes an image: d is only in its blocks' shared memory, which they read of each
// other (distributed shared memory). The bits are those of squeeze.cuh, gate.cuh and pointwise_conv2d one after the other,
// so that the batch may decide which it is.
//
// cluster    8 blocks of 256 threads, 4 or 2 where E has fewer chunks (64 bytes of expanded channels), each an equal share of
//            the chunks: x as a whole -> a chunk's e, of the whole image with its padding -> its d, tile by tile of 64
//            outputs, sums of the tiles -> means (cluster barrier) -> hidden values of squeeze-excite, a share of them a
//            block (cluster barrier) -> gates of the block's channels, and d times these in place (cluster barrier) -> y:
//            tiles x blocks of 16 to 64 output channels shared out, whose d comes from all blocks, 4 chunks at a time with
//            the weights' (two stages: the next are on their way) (cluster barrier: a block stays while others read)
// order      as the three launches': input channels, taps, a strip's outputs, strips, tiles, lanes of a weight's row,
//            expanded channels; e, d, gates and d times gates rounded to x's dtype
// grid       x: image, block of its cluster
// bytes      x once a block from L2, once an image from memory; y and residual once; expand_weight, dw_weight and
//            squeeze-excite's weights once an image, project_weight once a tile, from L2. Through the cluster
//            tiles * 64 * E * sizeof(T) for each block of output channels, and 4 (E + R) a block
// sectors    16 of 32 bytes for a warp's request of 512 where channels are whole sectors; d's pieces lie side by side in
//            lines of 128 bytes. x element by element where C is no multiple of a 16-byte vector
// shared     one_pass_plan.cuh: d of a block, and over each other x with e, the means, two stages. EfficientNet-B0's in
//            bfloat16: 151,744 B (14x14, 112 -> 672 -> 112, 5x5), 90,992 B (7x7, 192 -> 1152 -> 192, 5x5), 232,368 B
//            (28x28, 40 -> 240 -> 40, 5x5); at most 232,448 B. In 16 bits free of bank conflicts where C and K are
//            whole lines of 128 bytes and rows of x multiples of 8 pixels; in float32 e's stores take two passes
// registers  at most 128: two blocks a multiprocessor where shared memory lets them
// can't      kernels but 3x3 and 5x5, strides but 1 and 2, dilation; E or K that is no multiple of a 16-byte vector
//            (the projection by pointwise_conv2d isn't on tensor cores then); images whose share doesn't fit
#pragma once
#include "chunks.cuh"
#include "one_pass_excite.cuh"

namespace cnnfast::cuda {

// Where a pixel of x goes in e, which has the padding around the image.
struct ToPadded {
  const int* positions;
  int pixels;
  __device__ ExpandedPlace operator()(int pixel) const {
    return {pixel < pixels ? shared_load<int>(positions, pixel) : -1, true};
  }
};

template <class T>
struct PaddedPiece {
  const int* positions;
  __device__ int operator()(int pixel, int piece) const {
    return shared_load<int>(positions, pixel) * kExpandedPitch<T> + piece * kVec<T>;
  }
};

struct ImageRow {
  int64_t first;
  int channels;
  __device__ int64_t operator()(int pixel) const { return (first + pixel) * channels; }
};

struct ProjectWeightRow {
  int first, rows, expanded;
  __device__ int64_t operator()(int row) const {
    return first + row < rows ? static_cast<int64_t>(first + row) * expanded : -1;
  }
};

// Several chunks of project_weight, one behind the other.
template <class T>
struct ChunksPiece {
  int rows;
  __device__ int operator()(int row, int piece) const {
    return piece / 4 * rows * kChunk<T> + MatrixTile<T, kChunkBytes>::at(row, piece % 4);
  }
};

__device__ inline BlockPlace place_of(const OnePassPlan& p, int64_t image, int tile, int channel) {
  BlockPlace place;
  place.image = image;
  place.row = tile / p.image.tiles_w * p.image.tile_h;
  place.column = tile % p.image.tiles_w * p.image.tile_w;
  place.channel = channel;
  place.expanded = 0;
  return place;
}

// d of this block's expanded channels, and the means of their pixels.
template <class T, Multiply kMultiply, int K, int S>
__device__ inline void squeeze(unsigned char* shared, const InvertedResidualArguments<T>& a, const OnePassPlan& plan,
                               int64_t image, int rank) {
  const InvertedResidualShape& s = a.shape;
  const InvertedResidualPlan& p = plan.image;
  const int begin = rank * plan.rank_chunks * kChunk<T>, end = min(begin + plan.rank_chunks * kChunk<T>, s.expanded);
  if (begin >= end) return;
  int* const positions = reinterpret_cast<int*>(shared + plan.positions);
  T* const x = reinterpret_cast<T*>(shared + p.x);
  T* const e = reinterpret_cast<T*>(shared + p.e);
  T* const d = reinterpret_cast<T*>(shared + plan.d);
  float* const biases = reinterpret_cast<float*>(shared + p.biases);
  float* const means = reinterpret_cast<float*>(shared + plan.means);

  const int pixels = s.height * s.width;
  for (int i = threadIdx.x; i < pixels; i += kBlockThreads)
    shared_store(positions, i, (i / s.width + s.pad_top) * p.in_w + i % s.width + s.pad_left);
  for (int i = threadIdx.x; i < p.in_pixels() * (kExpandedPitch<T> / kVec<T>); i += kBlockThreads)
    shared_store(e, i * kVec<T>, bits<Vec<T>>(uint4{}));
  __syncthreads();
  const ImageRow from_row{image * pixels, s.channels};
  const auto copy_chunk_of_x = [&](int first) {  // into e, where there is no expansion
    copy_rows<&InvertedResidualArguments<T>::x>(e, a, Pieces(4), pixels, first, s.channels - first, a.vectors_c,
                                                from_row, PaddedPiece<T>{positions});
  };
  const BlockPlace first_tile = place_of(plan, image, 0, 0);
  if (s.expands)
    copy_rows<&InvertedResidualArguments<T>::x>(x, a, Pieces(2 * p.slabs), pixels, 0, s.channels, a.vectors_c, from_row,
                                                SlabPiece<T>{p.x_slab});
  else
    copy_chunk_of_x(begin);
  copy_weights(shared + p.weights, a, p, first_tile, begin);
  cp_async_commit();
  const bool has_bias = static_cast<int>(threadIdx.x) < 2 * kChunk<T>, has_sum = threadIdx.x < kChunk<T>;
  if (has_bias) shared_store(biases, threadIdx.x, load_bias(a, begin));

  int turn = 0;  // of sums
  for (int first = begin, chunk = 0; first < end; first += kChunk<T>, ++chunk) {
    const int next = first + kChunk<T>, stage = chunk % 2;
    const bool more = next < end;
    const unsigned char* const weights = shared + p.weights + stage * p.stage_bytes;
    const float* const bias = biases + stage * 2 * kChunk<T>;
    cp_async_wait<0>();
    __syncthreads();  // this chunk's weights are there; the last chunk's e, weights and biases have been used
    float next_bias = 0;
    if (more) {
      next_bias = load_bias(a, next);
      copy_weights(shared + p.weights + (stage ^ 1) * p.stage_bytes, a, p, first_tile, next);
      cp_async_commit();
    }
    if (s.expands) {
      expand<T, kMultiply>(e, x, reinterpret_cast<const T*>(weights + p.expand), bias, pixels, p, a.activation,
                           ToPadded{positions, pixels});
      __syncthreads();  // e is there
    }
    float total = 0;
    for (int tile = 0; tile < plan.tiles; ++tile, turn ^= 1) {
      const BlockPlace place = place_of(plan, image, tile, 0);
      float* const sums = reinterpret_cast<float*>(shared + p.sums) + turn * kStrips * kChunk<T>;
      const int e_at = (place.row * S * p.in_w + place.column * S) * kExpandedPitch<T>;
      depthwise<T, K, S, true>(d + tile_at<T>(plan, chunk, tile), sums, e + e_at, reinterpret_cast<const T*>(weights),
                               bias + kChunk<T>, s, p, place, a.activation);
      __syncthreads();  // the tile's sums are there, the last tile's have been added; after the last one e has been used
      if (has_sum) total += sum_of_strips<T>(sums);
    }
    if (has_sum)
      shared_store(means, chunk * kChunk<T> + threadIdx.x, total / static_cast<float>(s.out_height * s.out_width));
    if (more && has_bias) shared_store(biases, (stage ^ 1) * 2 * kChunk<T> + threadIdx.x, next_bias);
    if (more && !s.expands) copy_chunk_of_x(next);
    cp_async_commit();
  }
}

// The cluster's blocks share the tiles of the image x blocks of output channels.
template <class T, Multiply kMultiply, int S>
__device__ inline void project(unsigned char* shared, const InvertedResidualArguments<T>& a, const OnePassPlan& plan,
                               int64_t image, int rank) {
  using Share = Columns<kFewColumns>;
  using Product = WarpProduct<T, kMultiply, Share::kMTiles, Share::kNTiles, kChunkBytes>;
  static_assert(kTilePixels * 4 == kBlockThreads);  // a thread loads one piece of a chunk
  const InvertedResidualShape& s = a.shape;
  const InvertedResidualPlan& p = plan.project;
  const T* const d = reinterpret_cast<const T*>(shared + plan.d);
  const int warp = threadIdx.x / 32;
  const int first_row = warp / Share::kWarpsN * Product::kRows;
  const int first_column = warp % Share::kWarpsN * p.n_tiles * 8;
  const int piece_at = MatrixTile<T, kChunkBytes>::at(threadIdx.x / 4, threadIdx.x % 4);
  const auto stage_of = [&](int chunk) { return shared + plan.stages + chunk / kTogether % 2 * plan.stage_bytes; };

  for (int task = rank; task < plan.tiles * plan.column_blocks; task += plan.ranks) {
    const int tile = task % plan.tiles;
    const BlockPlace place = place_of(plan, image, tile, task / plan.tiles * p.out_columns);
    const auto copy_project_weight = [&](int chunk) {
      const int first = chunk * kChunk<T>;
      copy_rows<&InvertedResidualArguments<T>::project_weight>(
          reinterpret_cast<T*>(stage_of(chunk) + plan.weights), a, Pieces(4 * kTogether), p.out_columns, first,
          min(kTogether * kChunk<T>, s.expanded - first), a.vectors_e,
          ProjectWeightRow{place.channel, s.out_channels, s.expanded}, ChunksPiece<T>{plan.weight_rows});
      cp_async_commit();
    };
    Vec<T> pieces[kTogether];
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int owner = (first + i) / plan.rank_chunks, chunk = (first + i) % plan.rank_chunks;
        if (first + i < plan.chunks)
          pieces[i] = cluster_load<Vec<T>>(d, tile_at<T>(plan, chunk, tile) + piece_at, owner);
      }
    };
    const auto store = [&](int first) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (first + i < plan.chunks)
          shared_store(reinterpret_cast<T*>(stage_of(first)), i * kTilePixels * kChunk<T> + piece_at, pieces[i]);
    };

    Product product;
    product.clear();
    copy_project_weight(0);
    load(0);
    store(0);
    for (int first = 0; first < plan.chunks; first += kTogether) {
      const int next = first + kTogether;
      cp_async_wait<0>();
      __syncthreads();  // this stage is there, the other one has been used
      if (next < plan.chunks) {
        copy_project_weight(next);
        load(next);
      }
      const T* const stage = reinterpret_cast<const T*>(stage_of(first));
      const T* const weight = reinterpret_cast<const T*>(stage_of(first) + plan.weights);
#pragma unroll 1
      for (int i = 0; i < min(kTogether, plan.chunks - first); ++i)
        product.multiply_add(stage + i * kTilePixels * kChunk<T>, first_row, weight + i * plan.weight_rows * kChunk<T>,
                             first_column, nullptr, p.n_tiles);
      if (next < plan.chunks) store(next);
    }
    __syncthreads();  // both stages have been used
    write<T, S>(reinterpret_cast<T*>(shared + plan.stages), product, first_row, first_column, a, p, place);
    __syncthreads();  // the outputs have been stored
  }
}

template <class T, bool tf32, int K, int S>
__global__ void __launch_bounds__(kBlockThreads, 2)
    inverted_residual_one_pass_kernel(const InvertedResidualArguments<T> a, const GateArguments<T> gate,
                                      const OnePassPlan p) {
  if constexpr (!targets_clusters()) {
    fail();
  } else {
    constexpr Multiply kMultiply = multiply_by<T, tf32>();
    CNNFAST_SHARED(unsigned char, shared);
    const int rank = cluster_rank();
    const int64_t image = blockIdx.x / p.ranks;
    squeeze<T, kMultiply, K, S>(shared, a, p, image, rank);
    cluster_barrier();  // all means are there
    excite(shared, gate, p, rank);
    scale(reinterpret_cast<T*>(shared + p.d), reinterpret_cast<const float*>(shared + p.means), p, rank);
    cluster_barrier();  // all of d is there
    project<T, kMultiply, S>(shared, a, p, image, rank);
    cluster_barrier();  // a block's shared memory is there until all have read d
  }
}

template <class T, bool tf32, int K, int S>
void launch_inverted_residual_one_pass(const InvertedResidualArguments<T>& a, const GateArguments<T>& gate,
                                       const OnePassPlan& p, cudaStream_t stream) {
  launch_clusters("inverted_residual_one_pass_kernel", inverted_residual_one_pass_kernel<T, tf32, K, S>,
                  dim3(static_cast<unsigned>(a.shape.batch * p.ranks)), dim3(kBlockThreads), p.ranks, p.bytes, stream,
                  a, gate, p);
}

}  // namespace cnnfast::cuda
