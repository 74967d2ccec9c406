// inverted_residual without squeeze-excite, in one launch: float32, float16 or bfloat16, NHWC, any number of channels, kernel
// size, stride, dilation and padding.
//
//   e = activation(x expand_weight + bias), or x;  d = activation(depthwise(e) + bias);  y = d project_weight + bias + residual
//
// tile       64 outputs of an image (8x8, 4x16 or 16x4, whichever expands the fewest pixels; fewer where shared memory is
//            short) x up to 64 or 192 output channels; with the inputs that they reach, the halo: 10x10 for 8x8 of 3x3 at
//            stride 1, 17x17 at stride 2, 12x12 and 19x19 of 5x5
// block      256 threads; x is copied once, then 64 bytes of expanded channels at a time, a chunk, go through: expand into
//            e (a warp 16 pixels at a time), depthwise from e into d (a thread a strip of 4 outputs x 4 bytes of channels),
//            d times the chunk of project_weight onto sums in registers. Padding is zeros of e: activation(bias) of a pixel
//            outside of the image never gets there. e and d are rounded to x's dtype.
// grid       x: image, tile; y: blocks of output channels, one up to 192 (each expands anew). From the shape of an image
//            alone: neighbours in the batch don't show
// bytes      ideally x, residual, y once; really x as often as tiles' halos overlap ((10 / 8)^2 = 1.56 of 3x3 at stride
//            1), from L2 mostly, and from L2 all weights for each block: copied by cp.async while the chunk before is
//            multiplied (two stages, where they fit). Neither e nor d is in memory
// sectors    16 of 32 bytes for a warp's request of 512 where channels are whole sectors; element by element where C, E or
//            K is no multiple of a 16-byte vector
// shared     positions, x, e, d, biases, weights (plan.cuh): 30,784 B (24, 144, 24 at stride 1, 16 bits) to 101,376 B.
//            In 16 bits free of bank conflicts where tiles are 8x8 or 4x16 and C and K whole lines of 128 bytes (with fewer
//            channels some of the copies of x, and y on its way, take two passes); in float32 e's stores take two
// registers  at most 128, so two blocks a multiprocessor where shared memory lets them; as TF32 for more than 64 output
//            channels at most 224, one block
// can't      float64; shapes of which not even 4 outputs fit shared memory (inverted_residual_reason): above some 850 input
//            channels (16 bits; float32 430), fewer for large kernels and dilations
#pragma once
#include "chunks.cuh"

namespace cnnfast::cuda {

template <class T, bool tf32, int K, int S, int kMostColumns>
__global__ void __launch_bounds__(kBlockThreads, blocks_at_once(tf32, kMostColumns))
    inverted_residual_kernel(const InvertedResidualArguments<T> a, const InvertedResidualPlan p) {
  using Share = Columns<kMostColumns>;
  constexpr Multiply kMultiply = multiply_by<T, tf32>();
  using Product = WarpProduct<T, kMultiply, Share::kMTiles, Share::kNTiles, kChunkBytes>;
  CNNFAST_SHARED(unsigned char, shared);
  const BlockMemory<T> memory(shared, p);
  const BlockPlace place(p, kChunk<T>);

  Product product;
  product.clear();
  const int warp = threadIdx.x / 32;
  const int first_row = warp / Share::kWarpsN * Product::kRows;
  const int first_column = warp % Share::kWarpsN * p.n_tiles * 8;
  for_each_chunk<T, kMultiply, K, S, false>(memory, a, p, place, [&](int, const unsigned char* weights) {
    product.multiply_add(memory.d, first_row, reinterpret_cast<const T*>(weights + p.project), first_column, nullptr,
                         p.n_tiles);
  });
  write<T, S>(reinterpret_cast<T*>(shared), product, first_row, first_column, a, p, place);
}

template <class T, bool tf32, int K, int S, int kMostColumns>
void launch_inverted_residual(const InvertedResidualArguments<T>& a, const InvertedResidualPlan& p,
                              cudaStream_t stream) {
  launch("inverted_residual_kernel", inverted_residual_kernel<T, tf32, K, S, kMostColumns>, grid_of(a.shape, p),
         dim3(kBlockThreads), p.bytes, stream, a, p);
}

}  // namespace cnnfast::cuda
