// A warp's share of a matrix product: sums [rows][columns] += A [rows][k] B [columns][k], both operands in shared memory.
//
// Operands   rows of kRowBytes along k (32, 64, or a multiple of 128), A's rows e.g. pixels, B's output channels: a
//            weight as it lies. Pieces of 16 bytes change places within a line of 128 bytes (MatrixTile::at), so that the
//            pieces of 8 neighbouring rows at one k, and those of a whole line, lie in different banks: 16-byte stores along
//            a row and all loads here are free of conflicts.
// Types      float16, bfloat16: mma of k = 16; float32: mma of TF32 with operands rounded to nearest, or FMA. bfloat16 and
//            TF32 below sm_80: FMA in float32, exact.
// Order      one float32 sum an element, k ascending, whatever the tile: results don't depend on how a product is cut
//            into blocks and warps.
// Registers  4 kMTiles kNTiles sums, 4 kMTiles + 4 of operands (FMA: 8 kMTiles + 4, or half as many)
#pragma once
#include "mma.cuh"

namespace cnnfast::cuda {

enum class Multiply { tensor_cores, fma };

// How this target multiplies T; tf32: float32 may be rounded to TF32.
template <class T, bool tf32>
__device__ constexpr Multiply multiply_by() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return std::is_same_v<T, __half> ? Multiply::tensor_cores : Multiply::fma;
#else
  return sizeof(T) == 2 || tf32 ? Multiply::tensor_cores : Multiply::fma;
#endif
}

// An operand in shared memory: where its rows' pieces of 16 bytes lie.
template <class T, int kRowBytes>
struct MatrixTile {
  static constexpr int kPieces = kRowBytes / 16;                          // of a row
  static constexpr int kSwapped = kPieces < 8 ? kPieces : 8;              // that change places with each other
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));  // elements of a row
  static_assert(kPieces == 2 || kPieces == 4 || kPieces % 8 == 0);

  // In elements, from the tile's begin; of rows that are a multiple of 8 apart, as much apart as the rows.
  __host__ __device__ static constexpr int at(int row, int piece) {
    return row * kDepth + (piece ^ row / (8 / kSwapped) % kSwapped) * kVec<T>;
  }
};

// Two values times two others, each product rounded to T.
template <class T>
__device__ inline uint32_t multiply_pair(uint32_t a, uint32_t b) {
  struct Pair {
    T v[2];
  };
  const Pair x = bits<Pair>(a), y = bits<Pair>(b);
  return bits<uint32_t>(Pair{narrow<T>(widen(x.v[0]) * widen(y.v[0])), narrow<T>(widen(x.v[1]) * widen(y.v[1]))});
}

template <class T, Multiply kMultiply, int kMTiles, int kNTiles, int kRowBytes>
struct WarpProduct {
  using Tile = MatrixTile<T, kRowBytes>;
  static constexpr int kRows = 16 * kMTiles, kColumns = 8 * kNTiles;
  static_assert(kNTiles % 2 == 0);

  float sums[kMTiles][kNTiles][4];

  // Where sums[i][j][e] belongs, from the warp's first row and column.
  __device__ static int row(int i, int e) { return 16 * i + lane() / 4 + e / 2 * 8; }
  __device__ static int column(int j, int e) { return 8 * j + lane() % 4 * 2 + e % 2; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
  }

  // Adds the product over one row's length of k. a and b are tiles, first_row and first_column (multiples of 8) the warp's
  // in them. With `gated`, A's elements are first multiplied by gate[k] (unswapped, in shared memory) and rounded to T. Of
  // fewer n_tiles the others are left out: B is read up to a pair of tiles.
  template <bool gated = false>
  __device__ void multiply_add(const T* a, int first_row, const T* b, int first_column, const T* gate = nullptr,
                               int n_tiles = kNTiles) {
    if constexpr (kMultiply == Multiply::tensor_cores)
      by_tensor_cores<gated>(a, first_row, b, first_column, gate, n_tiles);
    else
      by_fma<gated>(a, first_row, b, first_column, gate, n_tiles);
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }  // of blocks along x alone

  template <bool gated>
  __device__ void by_tensor_cores(const T* a, int first_row, const T* b, int first_column, const T* gate, int n_tiles) {
    const int in_matrix = lane() % 8, matrix = lane() / 8;  // of the address that this lane gives to ldmatrix
#pragma unroll
    for (int piece = 0; piece < Tile::kPieces; piece += 2) {
      uint32_t from_b[kNTiles][2];
#pragma unroll
      for (int j = 0; j < kNTiles; j += 2) {
        if (j >= n_tiles) break;
        uint32_t four[4];
        ldmatrix(four, b,
                 Tile::at(first_column + matrix / 2 * 8 + in_matrix, piece + matrix % 2) + 8 * j * Tile::kDepth);
        from_b[j][0] = operand(four[0]), from_b[j][1] = operand(four[1]);
        from_b[j + 1][0] = operand(four[2]), from_b[j + 1][1] = operand(four[3]);
      }
      uint32_t gates[2];
      if constexpr (gated) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          gates[half] = shared_load<uint32_t>(gate, (piece + half) * kVec<T> + lane() % 4 * (kVec<T> / 4));
      }
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
        uint32_t from_a[4];
        ldmatrix(from_a, a,
                 Tile::at(first_row + matrix % 2 * 8 + in_matrix, piece + matrix / 2) + 16 * i * Tile::kDepth);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if constexpr (gated) from_a[r] = times(from_a[r], gates[r / 2]);
          from_a[r] = operand(from_a[r]);
        }
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) {
          if (j >= n_tiles) break;
          if constexpr (sizeof(T) == 2)
            mma_m16n8k16<T>(sums[i][j], from_a, from_b[j]);
          else
            mma_m16n8k8_tf32(sums[i][j], from_a, from_b[j]);
        }
      }
    }
  }

  // A register of ldmatrix as the mma wants it, and times a gate's.
  template <class Register>
  __device__ static Register operand(Register r) {
    if constexpr (sizeof(T) == 2)
      return r;
    else
      return round_to_tf32(bits<float>(r));
  }
  __device__ static uint32_t times(uint32_t a, uint32_t g) {
    if constexpr (sizeof(T) == 2)
      return multiply_pair<T>(a, g);
    else
      return bits<uint32_t>(bits<float>(a) * bits<float>(g));
  }

  // Elements of k at once: as many as leave registers for the sums.
  __device__ static constexpr int at_once(bool gated) { return kMTiles == 1 ? 4 : kMTiles < 4 || !gated ? 2 : 1; }
  template <int n>
  struct Group {
    T v[n];
  };

  template <bool gated>
  __device__ void by_fma(const T* a, int first_row, const T* b, int first_column, const T* gate, int n_tiles) {
    constexpr int kAtOnce = at_once(gated);
    using Loaded = Group<kAtOnce>;
#pragma unroll 1
    for (int k = 0; k < Tile::kDepth; k += kAtOnce) {
      const int piece = k / kVec<T>, inside = k % kVec<T>;
      float gates[kAtOnce];
      if constexpr (gated) widen_group(gates, shared_load<Loaded>(gate, k));
      float from_a[kMTiles][2][kAtOnce];
#pragma unroll
      for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = Tile::at(first_row + row(0, 0), piece) + (16 * i + 8 * half) * Tile::kDepth + inside;
          widen_group(from_a[i][half], shared_load<Loaded>(a, at));
          if constexpr (gated) {
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) from_a[i][half][n] = widen(narrow<T>(from_a[i][half][n] * gates[n]));
          }
        }
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
        if (j >= n_tiles) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = Tile::at(first_column + column(0, e), piece) + 8 * j * Tile::kDepth + inside;
          float from_b[kAtOnce];
          widen_group(from_b, shared_load<Loaded>(b, at));
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
            for (int i = 0; i < kMTiles; ++i)
#pragma unroll
              for (int half = 0; half < 2; ++half) sums[i][j][2 * half + e] += from_a[i][half][n] * from_b[n];
        }
      }
    }
  }

  template <int n>
  __device__ static void widen_group(float (&to)[n], const Group<n>& from) {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = widen(from.v[i]);
  }
};

}  // namespace cnnfast::cuda
