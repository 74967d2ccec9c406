// inverted_residual up to the squeeze of squeeze-excite: d in memory and its sums; fused.cuh describes tile, block and layout.
//
//   e = activation(x expand_weight + bias), or x;  d = activation(depthwise(e) + bias), rounded to x's dtype;
//   partial = sums of d over a tile's pixels, before they are rounded
//
// grid       x: image, tile; y: blocks of 4 chunks or more of expanded channels, where an image has few tiles
// bytes      ideally x and d once; partial: 4 E bytes a tile. x as fused.cuh's, for each block of channels
// sectors    of d's stores 2 of 32 bytes a pixel and chunk, none in part where E * sizeof(T) % 32 == 0
// order      a strip's 4 outputs, then the strips: of fixed order; the tiles' sums are added by the gates' kernel
// registers  at most 128
#pragma once
#include "chunks.cuh"

namespace cnnfast::cuda {

template <class T, bool tf32, int K, int S>
__global__ void __launch_bounds__(kBlockThreads, 2)
    inverted_residual_squeeze_kernel(const InvertedResidualArguments<T> a, const InvertedResidualPlan p) {
  CNNFAST_SHARED(unsigned char, shared);
  const BlockMemory<T> memory(shared, p);
  const BlockPlace place(p, kChunk<T>);
  const int64_t partial_row = static_cast<int64_t>(blockIdx.x) * a.shape.expanded;
  for_each_chunk<T, multiply_by<T, tf32>(), K, S, true>(memory, a, p, place, [&](int first, const unsigned char*) {
    const int length = min(kChunk<T>, a.shape.expanded - first);
    store_rows(a.d, memory.d, Pieces(ceil_div(length, kVec<T>)), length, a.vectors_e,
               OutputRow<S>{a.shape, p, place, a.shape.expanded, first}, ChunkPiece<T>{});
    const int channel = threadIdx.x;
    if (channel >= length) return;
    global_store(a.partial, partial_row + first + channel, sum_of_strips<T>(memory.sums));
  });
}

template <class T, bool tf32, int K, int S>
void launch_inverted_residual_squeeze(const InvertedResidualArguments<T>& a, const InvertedResidualPlan& p,
                                      cudaStream_t stream) {
  launch("inverted_residual_squeeze_kernel", inverted_residual_squeeze_kernel<T, tf32, K, S>, grid_of(a.shape, p),
         dim3(kBlockThreads), p.bytes, stream, a, p);
}

}  // namespace cnnfast::cuda
