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
// shared     kSharedBytes, 24,832 to 49,408 B; no bank conflicts: matrix.cuh, and at_sum below
// registers  at most kMaxRegisters (sm_75: kMaxRegisters75)
// order      of each element's sum: channels ascending (on tensor cores 16, or 8, at once), whatever the tile. So the
//            tile may depend on the batch, and results don't
// can't      anything else: generic.cuh
#pragma once
#include "../matrix.cuh"
#include "common.cuh"

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
  static constexpr int kMaxRegisters = kThreads == 256 ? 128 : 96;
  static constexpr int kMaxRegisters75 =
      kMTiles == 4 ? 160 : kMaxRegisters;  // shared memory holds one such block there
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

// Where a warp's sums lie in shared memory, 32 floats a row, on their way to the output: 16-byte pieces change places so
// that 2 neighbouring pieces of 4 rows (a request of 8 bytes a lane writes these), and a row's 8, or every second of the
// rows r and r + 4 (requests of 16 bytes read these), are in different banks.
__device__ constexpr int at_sum(int row, int column) {
  return row * 32 + ((column / 4) ^ (row % 4 * 2 + row / 4 % 2)) * 4 + column % 4;
}

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

// A warp's sums, through shared memory of its own, to y.
template <class T, class Traits, class Product>
struct PointwiseOutput {
  static constexpr int kLanes = 32 / kVec<T>, kRowsAtOnce = 32 / kLanes;  // lanes on a row of 32 channels
  static constexpr int kTogether = Traits::kTogether, kPasses = 16 * kTogether / kRowsAtOnce;
  static constexpr int kInFlight = kPasses < 4 ? kPasses : 4;

  const PointwiseArguments<T>& a;
  float* const sums;
  const int64_t first_pixel;
  const int rows;
  const int lane = threadIdx.x % 32;
  // Lanes on two rows (16-bit types) are neighbours where the rows are 4 apart: at_sum.
  const int first_row = kLanes == 4 ? lane / 8 + lane / 4 % 2 * 4 : lane / kLanes;
  const int in_row = lane % kLanes * kVec<T>;
  const int column;
  const bool inside = column < a.shape.out_channels;
  float bias[kVec<T>];

  __device__ PointwiseOutput(const PointwiseArguments<T>& arguments, float* shared, int64_t first_pixel_of_warp,
                             int rows_of_warp, int first_column)
      : a(arguments),
        sums(shared),
        first_pixel(first_pixel_of_warp),
        rows(rows_of_warp),
        column(first_column + in_row) {
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) bias[i] = 0;
    if (!a.bias) return;
    if (a.bias_float32) {
#pragma unroll
      for (int i = 0; i < kVec<T>; i += 4) {
        const auto four = global_load<Vec<float>>(static_cast<const float*>(a.bias), column + i, inside);
#pragma unroll
        for (int k = 0; k < 4; ++k) bias[i + k] = four.v[k];
      }
    } else {
      const auto vector = global_load<Vec<T>>(static_cast<const T*>(a.bias), column, inside);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) bias[i] = widen(vector.v[i]);
    }
  }

  __device__ void write(const Product& product) {
#pragma unroll
    for (int begin = 0; begin < Traits::kMTiles; begin += kTogether) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            const Pair pair{product.sums[begin + i][j][e], product.sums[begin + i][j][e + 1]};
            shared_store(sums, at_sum(Product::row(i, e), Product::column(j, e)), pair);
          }
      __syncwarp();
      // The curves are long: one copy of them. Where there is none, residuals are asked for some together.
      if (a.activation <= kLastClamp) {
#pragma unroll 1
        for (int first = 0; first < kPasses; first += kInFlight) {
          Vec<T> residual[kInFlight];
#pragma unroll
          for (int i = 0; i < kInFlight; ++i) residual[i] = load_residual(begin, first + i);
#pragma unroll
          for (int i = 0; i < kInFlight; ++i) {
            float v[kVec<T>];
            sum(v, first + i, residual[i]);
            activate_clamp(v, a.activation);
            store(v, begin, first + i);
          }
        }
      } else {
#pragma unroll 1
        for (int pass = 0; pass < kPasses; ++pass) {
          float v[kVec<T>];
          sum(v, pass, load_residual(begin, pass));
          activate(v, a.activation);
          store(v, begin, pass);
        }
      }
    }
  }

 private:
  struct alignas(8) Pair {
    float v[2];
  };

  __device__ int row(int begin, int pass) const { return begin * 16 + pass * kRowsAtOnce + first_row; }
  __device__ bool valid(int begin, int pass) const { return inside && row(begin, pass) < rows; }
  __device__ int64_t at(int begin, int pass) const {
    return (first_pixel + row(begin, pass)) * a.shape.out_channels + column;
  }

  __device__ Vec<T> load_residual(int begin, int pass) const {
    return global_load<Vec<T>>(a.residual, at(begin, pass), a.residual && valid(begin, pass));
  }

  __device__ void sum(float (&v)[kVec<T>], int pass, const Vec<T>& residual) const {
#pragma unroll
    for (int i = 0; i < kVec<T>; i += 4) {
      const auto four = shared_load<Vec<float>>(sums, at_sum(pass * kRowsAtOnce + first_row, in_row + i));
#pragma unroll
      for (int k = 0; k < 4; ++k) v[i + k] = four.v[k] + bias[i + k] + widen(residual.v[i + k]);
    }
  }

  __device__ void store(const float (&v)[kVec<T>], int begin, int pass) const {
    Vec<T> to;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) to.v[i] = narrow<T>(v[i]);
    if (valid(begin, pass)) global_store(a.y, at(begin, pass), to);
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
