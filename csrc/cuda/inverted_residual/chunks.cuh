// inverted_residual: a block's tile of d, chunk by chunk of expanded channels. What both kernels' blocks do.
#pragma once
#include "stages.cuh"

namespace cnnfast::cuda {

// A block's shared memory.
template <class T>
struct BlockMemory {
  int* positions;
  T *x, *e, *d;
  float *biases, *sums;
  unsigned char* weights;

  __device__ BlockMemory(unsigned char* shared, const InvertedResidualPlan& p)
      : positions(reinterpret_cast<int*>(shared)),
        x(reinterpret_cast<T*>(shared + p.x)),
        e(reinterpret_cast<T*>(shared + p.e)),
        d(reinterpret_cast<T*>(shared + p.d)),
        biases(reinterpret_cast<float*>(shared + p.biases)),
        sums(reinterpret_cast<float*>(shared + p.sums)),
        weights(shared + p.weights) {}
};

// Calls use(first, weights) for each chunk: the one of the expanded channels from `first` on, whose d (and, if kSums, sums of
// strips) lies in shared memory, as do its weights.
template <class T, Multiply kMultiply, int K, int S, bool kSums, class Use>
__device__ inline void for_each_chunk(const BlockMemory<T>& m, const InvertedResidualArguments<T>& a,
                                      const InvertedResidualPlan& p, const BlockPlace& place, Use use) {
  const InvertedResidualShape& s = a.shape;
  const int end = min(place.expanded + p.chunks * kChunk<T>, s.expanded);
  locate_inputs(m.positions, s, p, place);
  __syncthreads();
  const InputRow input_row(m.positions, s, place);
  if (s.expands)
    copy_inputs(m.x, a, p, input_row);
  else
    copy_chunk(m.e, a, p, input_row, place.expanded);
  copy_weights(m.weights, a, p, place, place.expanded);
  cp_async_commit();
  const bool has_bias = static_cast<int>(threadIdx.x) < 2 * kChunk<T>;
  if (has_bias) shared_store(m.biases, threadIdx.x, load_bias(a, place.expanded));

  for (int first = place.expanded, stage = 0; first < end; first += kChunk<T>, stage ^= 1) {
    const int next = first + kChunk<T>;
    const bool more = next < end;
    unsigned char* const weights = m.weights + (p.stages == 2 ? stage * p.stage_bytes : 0);
    unsigned char* const next_weights = m.weights + (p.stages == 2 ? (stage ^ 1) * p.stage_bytes : 0);
    const float* const bias = m.biases + stage * 2 * kChunk<T>;
    cp_async_wait<0>();
    __syncthreads();  // this chunk's weights are there; the last chunk's d, weights and biases have been used
    float next_bias = 0;
    if (more) {
      next_bias = load_bias(a, next);
      if (p.stages == 2) copy_weights(next_weights, a, p, place, next);
      cp_async_commit();
    }
    if (s.expands) {
      expand<T, kMultiply>(m.e, m.x, reinterpret_cast<const T*>(weights + p.expand), bias, p.in_pixels(), p,
                           a.activation, ToTile{m.positions});
      __syncthreads();  // e is there
    }
    depthwise<T, K, S, kSums>(m.d, m.sums, m.e, reinterpret_cast<const T*>(weights), bias + kChunk<T>, s, p, place,
                              a.activation);
    if (more && has_bias) shared_store(m.biases, (stage ^ 1) * 2 * kChunk<T> + threadIdx.x, next_bias);
    __syncthreads();  // d is there, e has been used
    if (more && !s.expands) copy_chunk(m.e, a, p, input_row, next);
    use(first, weights);
    if (more && p.stages == 1) {
      __syncthreads();  // the weights have been used
      copy_weights(next_weights, a, p, place, next);
    }
    cp_async_commit();
  }
  __syncthreads();  // all of shared memory has been used
}

inline dim3 grid_of(const InvertedResidualShape& s, const InvertedResidualPlan& p) {
  const int64_t blocks = s.batch * p.tiles_h * p.tiles_w;
  if (blocks > std::numeric_limits<int>::max())
    throw std::runtime_error("inverted_residual: " + std::to_string(blocks) + " blocks, more than a grid holds");
  return dim3(static_cast<unsigned>(blocks), p.column_blocks * p.chunk_blocks);
}

}  // namespace cnnfast::cuda
