// inverted_residual with squeeze-excite in one launch, for targets that have thread-block clusters: the same bits as
// squeeze.cuh, gate.cuh and pointwise_conv2d one after the other, d never in memory.
#pragma once
#include "../cluster.cuh"
#include "chunks.cuh"
#include "one_pass_plan.cuh"

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

// Where a tile of a block's chunk begins in d.
template <class T>
__device__ inline int tile_at(const OnePassPlan& p, int chunk, int tile) {
  return (chunk * p.tiles + tile) * kTilePixels * kChunk<T>;
}

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

// The gates of this block's expanded channels: each block makes some of the hidden values, from all blocks' means.
template <class T>
__device__ inline void excite(unsigned char* shared, const GateArguments<T>& g, const OnePassPlan& p, int rank) {
  const auto floats = [&](int at) { return reinterpret_cast<float*>(shared + at); };
  float *const values = floats(p.values), *const hidden = floats(p.hidden), *const all_hidden = floats(p.all_hidden);
  float *const means = floats(p.means), *const gates = means;
  const int rank_channels = p.rank_chunks * kChunk<T>, pitch = p.value_pitch();
  for (int c = threadIdx.x; c < g.channels; c += kBlockThreads)
    shared_store(values, c / p.slice * pitch + staged_at(p.reduce.n, pitch, c % p.slice),
                 cluster_load<float>(means, c % rank_channels, c / rank_channels));
  __syncthreads();

  const int first_row = min(rank * p.hidden_rows, g.squeezed), end_row = min(first_row + p.hidden_rows, g.squeezed);
  for (int begin = 0; begin < g.channels; begin += p.slice)
    for_rows(first_row, end_row, p.reduce.lanes, [&](const Rows& rows) {
      float sum[kProductRows][1] = {};
      if (!p.sliced) begin_with<T>(sum, g.reduce_bias, rows, p.reduce.lanes);
      multiply(sum, g.reduce_weight, g.channels, rows, begin, min(p.slice, g.channels - begin), p.reduce,
               values + begin / p.slice * pitch, pitch);
      finish(sum, rows, p.reduce.lanes, [&](int row, int, float z) {
        const int at = row - first_row;  // the same thread's for each slice
        if (begin > 0)
          z += shared_load<float>(hidden, at);
        else if (p.sliced)
          z += load_bias<T>(g.reduce_bias, row, true);
        shared_store(hidden, at, z);
      });
    });
  cluster_barrier();  // all hidden values are there
  const int hidden_pitch = ceil_div(g.squeezed, 8) * 8;
  for (int row = threadIdx.x; row < g.squeezed; row += kBlockThreads)
    shared_store(all_hidden, staged_at(p.expand.n, hidden_pitch, row),
                 activated(cluster_load<float>(hidden, row % p.hidden_rows, row / p.hidden_rows), g.activation));
  __syncthreads();

  const int first = min(rank * rank_channels, g.channels), end = min(first + rank_channels, g.channels);
  for_rows(first, end, p.expand.lanes, [&](const Rows& rows) {
    float sum[kProductRows][1];
    begin_with<T>(sum, g.expand_bias, rows, p.expand.lanes);
    multiply(sum, g.expand_weight, g.squeezed, rows, 0, g.squeezed, p.expand, all_hidden, hidden_pitch);
    finish(sum, rows, p.expand.lanes, [&](int row, int, float z) { shared_store(gates, row - first, z); });
  });
  __syncthreads();
  for (int c = threadIdx.x; c < rank_channels; c += kBlockThreads)  // 0 beyond the last channel
    shared_store(gates, c, first + c < end ? activated(shared_load<float>(gates, c), g.gate_activation) : 0.0f);
  __syncthreads();
}

// d times the gates, both rounded, as the projection's kernel of three launches does.
template <class T>
__device__ inline void scale(T* d, const float* gates, const OnePassPlan& p, int rank) {
  const int row = threadIdx.x / 4, piece = threadIdx.x % 4;
  const int chunks = min(p.rank_chunks, p.chunks - rank * p.rank_chunks);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float gate[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; i += 4) {
      const auto four = shared_load<Vec<float>>(gates, chunk * kChunk<T> + piece * kVec<T> + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) gate[i + k] = widen(narrow<T>(four.v[k]));
    }
    for (int tile = 0; tile < p.tiles; ++tile) {
      const int at = tile_at<T>(p, chunk, tile) + MatrixTile<T, kChunkBytes>::at(row, piece);
      auto v = shared_load<Vec<T>>(d, at);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) v.v[i] = narrow<T>(widen(v.v[i]) * gate[i]);
      shared_store(d, at, v);
    }
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
