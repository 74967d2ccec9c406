// pointwise_conv2d, forward: float16, bfloat16 or float32, NHWC, channels and output channels a multiple of the 16-byte
// vector (8 or 4); on tensor cores, float32 by TF32 where it may, otherwise by FMA (matrix.cuh).
//
//   y = activation(x * gate @ weight^T + bias + residual), x's pixels sampled by the stride; x * gate rounded to T
//
// tile       kRows pixels x kColumns output channels a block, 16 kMTiles x 32 a warp, a loop over slices of 64 bytes of
//            channels; pixels of all images count as one image's, with a gate each image's by themselves
// grid       x: tile of pixels, block of output channels (fastest, so that blocks in flight together share x in L2)
// pipeline   kStages slices in shared memory, kStages - 1 under way (cp.async, 16 bytes a copy); one barrier a slice
// bytes      ideally x, weight, residual and y once. L2 -> shared: x once for each kColumns output channels, the weight
//            once for each kRows pixels. With a stride only the pixels sampled
// sectors    16 of 32 bytes for a warp's request of 512, by copies of 64 bytes of 8 pixels; residual and y likewise
//            (float32: 128 bytes of 4). None is loaded for nothing where C * sizeof(T) % 32 == 0; of y and residual where
//            K * sizeof(T) % 32 == 0
// output     32 rows of a warp's sums at a time through shared memory, so that residual and y move 16 bytes a thread
// shared     kSharedBytes, 24,576 to 49,408 B; no bank conflicts: matrix.cuh, and at_sum in output.cuh
// registers  at most kMaxRegisters (sm_75: kMaxRegisters75)
// order      of each element's sum: channels ascending (on tensor cores 16, or 8, at once), whatever the tile. So the
//            tile may depend on the batch, and results don't
// can't      anything else: generic.cuh
#pragma once
#include "../matrix.cuh"
#include "common.cuh"
#include "output.cuh"

namespace cnnfast::cuda {

template <class T, bool tf32, bool gated, int kMWarps, int kNWarps, int kMTiles_>
struct PointwiseTraits {
  static constexpr bool kGated = gated;
  static constexpr int kMTiles = kMTiles_, kNTiles = 4;
  static constexpr int kThreads = 32 * kMWarps * kNWarps;
  static constexpr int kRows = 16 * kMTiles * kMWarps, kColumns = 8 * kNTiles * kNWarps;
  static constexpr int kRowBytes = 64;
  static constexpr int kStages = kRows + kColumns > 192 ? 3 : 4;
  static constexpr int kSharedBytes = kStages * (kRows + kColumns + gated) * kRowBytes;
  static constexpr int kMaxRegisters = kThreads == 256 ? 128 : kMTiles == 1 && sizeof(T) == 2 ? 80 : 96;
  // Shared memory holds one block of the largest tile there.
  static constexpr int kMaxRegisters75 = kMTiles == 4 ? 160 : kMaxRegisters;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr int kMinBlocks = 65536 / kMaxRegisters75 / kThreads;
#else
  static constexpr int kMinBlocks = 65536 / kMaxRegisters / kThreads;
#endif
  static constexpr int kSectorsPerRequest = 16;

  using Tile = MatrixTile<T, kRowBytes>;
  static constexpr int kTogether = kMTiles < 2 ? kMTiles : 2;  // tiles of 16 rows that go through shared memory at once
  static_assert(kThreads / 32 * kTogether * 16 * 32 * 4 <= kSharedBytes);
};

// kRows pixels of x and their gate, and kColumns rows of the weight, into shared memory, slice by slice.
template <class T, class Traits>
struct PointwiseLoader {
  using Tile = typename Traits::Tile;
  static constexpr int kRowsAtOnce = Traits::kThreads / Tile::kPieces;
  static constexpr int kRowsOfX = Traits::kRows / kRowsAtOnce, kRowsOfWeight = Traits::kColumns / kRowsAtOnce;
  static constexpr int kStage = (Traits::kRows + Traits::kColumns) * Tile::kDepth;

  const PointwiseArguments<T>& a;
  T* const stages;
  const int first_row = threadIdx.x / Tile::kPieces, piece = threadIdx.x % Tile::kPieces;
  int64_t x_at[kRowsOfX];  // negative: no such pixel
  int64_t weight_at;
  int rows_of_weight;  // of this thread's
  int64_t gate_at;

  __device__ PointwiseLoader(const PointwiseArguments<T>& arguments, T* shared, int64_t first_pixel, int rows,
                             int first_column, int image)
      : a(arguments), stages(shared) {
    const int c = piece * kVec<T>;
#pragma unroll
    for (int i = 0; i < kRowsOfX; ++i) {
      const int row = first_row + i * kRowsAtOnce;
      x_at[i] = row < rows ? a.shape.sampled(first_pixel + row) * a.shape.channels + c : -1;
    }
    const int column = first_column + first_row;
    weight_at = static_cast<int64_t>(column) * a.shape.channels + c;
    rows_of_weight = ceil_div(a.shape.out_channels - column, kRowsAtOnce);
    gate_at = static_cast<int64_t>(image) * a.shape.channels + c;
  }

  __device__ static T* stage_of(T* shared, int slice) { return shared + slice % Traits::kStages * kStage; }
  __device__ static T* gate_of(T* shared, int slice) {
    return shared + Traits::kStages * kStage + slice % Traits::kStages * Tile::kDepth;
  }

  __device__ void load(int slice) {
    T* const stage = stage_of(stages, slice);
    const int c = slice * Tile::kDepth;
    const bool inside = c + piece * kVec<T> < a.shape.channels;
    const int to = Tile::at(first_row, piece);  // the same piece of every row that is a multiple of 8 further
#pragma unroll
    for (int i = 0; i < kRowsOfX; ++i)
      cp_async(stage, to + i * kRowsAtOnce * Tile::kDepth, a.x, x_at[i] + c, inside && x_at[i] >= 0);
#pragma unroll
    for (int i = 0; i < kRowsOfWeight; ++i)
      cp_async(stage, to + (Traits::kRows + i * kRowsAtOnce) * Tile::kDepth, a.weight,
               weight_at + static_cast<int64_t>(i) * kRowsAtOnce * a.shape.channels + c, inside && i < rows_of_weight);
    if constexpr (Traits::kGated)
      if (threadIdx.x < Tile::kPieces) cp_async(gate_of(stages, slice), piece * kVec<T>, a.gate, gate_at + c, inside);
  }
};

// Pixels that tiles are cut from: all images' together, or each image's.
struct PointwiseTiles {
  int64_t images, pixels;
  int64_t an_image;  // tiles of an image
  int columns;       // blocks of output channels

  template <class Traits>
  static PointwiseTiles of(const PointwiseShape& s) {
    constexpr bool gated = Traits::kGated;
    PointwiseTiles t{};
    t.images = gated ? s.batch : 1;
    t.pixels = gated ? s.image() : s.batch * s.image();
    t.an_image = ceil_div<int64_t>(t.pixels, Traits::kRows);
    t.columns = ceil_div(s.out_channels, Traits::kColumns);
    return t;
  }
  int64_t blocks() const { return images * an_image * columns; }
};

template <class T, bool tf32, bool gated, int kMWarps, int kNWarps, int kMTiles>
__global__ void __launch_bounds__((PointwiseTraits<T, tf32, gated, kMWarps, kNWarps, kMTiles>::kThreads),
                                  (PointwiseTraits<T, tf32, gated, kMWarps, kNWarps, kMTiles>::kMinBlocks))
    pointwise_conv2d_forward_kernel(const PointwiseArguments<T> a, const PointwiseTiles tiles) {
  using Traits = PointwiseTraits<T, tf32, gated, kMWarps, kNWarps, kMTiles>;
  using Product = WarpProduct<T, multiply_by<T, tf32>(), kMTiles, Traits::kNTiles, Traits::kRowBytes>;
  using Loader = PointwiseLoader<T, Traits>;
  constexpr int kStages = Traits::kStages;
  CNNFAST_SHARED(T, shared);

  // Fewer blocks than 2^31: so many tiles, too.
  const int tile = blockIdx.x / tiles.columns, an_image = static_cast<int>(tiles.an_image);
  const int image = tile / an_image, of_image = tile % an_image;
  const int64_t first_pixel = image * tiles.pixels + static_cast<int64_t>(of_image) * Traits::kRows;
  const int rows = static_cast<int>(
      min(tiles.pixels - static_cast<int64_t>(of_image) * Traits::kRows, static_cast<int64_t>(Traits::kRows)));
  const int first_column = static_cast<int>(blockIdx.x % tiles.columns) * Traits::kColumns;
  const int slices = ceil_div(a.shape.channels, Traits::Tile::kDepth);
  const int warp = threadIdx.x / 32, row_of_warp = warp % kMWarps * Product::kRows,
            column_of_warp = warp / kMWarps * Product::kColumns;

  Product product;
  product.clear();
  {
    Loader loader(a, shared, first_pixel, rows, first_column, image);
#pragma unroll
    for (int slice = 0; slice < kStages - 1; ++slice) {
      if (slice < slices) loader.load(slice);
      cp_async_commit();
    }
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      cp_async_wait<kStages - 2>();  // this slice's are there
      __syncthreads();               // everyone's; and the slice before, whose place the next copies take, is done with
      if (slice + kStages - 1 < slices) loader.load(slice + kStages - 1);
      cp_async_commit();
      const T* const x = Loader::stage_of(shared, slice);
      const T* const weight = x + Traits::kRows * Traits::Tile::kDepth;
      product.template multiply_add<gated>(x, row_of_warp, weight, column_of_warp, Loader::gate_of(shared, slice));
    }
  }
  __syncthreads();  // the sums go where the slices were

  float* const sums = reinterpret_cast<float*>(shared) + warp * Traits::kTogether * 16 * 32;
  PointwiseOutput<T, Traits, Product> output(a, sums, first_pixel + row_of_warp, rows - row_of_warp,
                                             first_column + column_of_warp);
  output.write(product);
}

template <class T, bool tf32, bool gated, int kMWarps, int kNWarps, int kMTiles>
void launch_forward(const PointwiseArguments<T>& a, cudaStream_t stream) {
  using Traits = PointwiseTraits<T, tf32, gated, kMWarps, kNWarps, kMTiles>;
  const auto tiles = PointwiseTiles::of<Traits>(a.shape);
  if (tiles.blocks() > std::numeric_limits<int>::max())
    throw std::runtime_error("pointwise_conv2d: " + std::to_string(tiles.blocks()) + " blocks, more than a grid holds");
  launch("pointwise_conv2d_forward_kernel", pointwise_conv2d_forward_kernel<T, tf32, gated, kMWarps, kNWarps, kMTiles>,
         dim3(static_cast<unsigned>(tiles.blocks())), dim3(Traits::kThreads), Traits::kSharedBytes, stream, a, tiles);
}

}  // namespace cnnfast::cuda
