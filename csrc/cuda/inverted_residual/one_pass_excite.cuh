// inverted_residual in one launch: squeeze-excite in a cluster, from the means of d to d times the gates.
#pragma once
#include "../cluster.cuh"
#include "../matrix.cuh"
#include "one_pass_plan.cuh"

namespace cnnfast::cuda {

// Where a tile of a block's chunk begins in d.
template <class T>
__device__ inline int tile_at(const OnePassPlan& p, int chunk, int tile) {
  return (chunk * p.tiles + tile) * kTilePixels * kChunk<T>;
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

}  // namespace cnnfast::cuda
