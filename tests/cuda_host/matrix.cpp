// The warp-level product of matrix.cuh, and the wrappers of mma.cuh below it, against plain loops; with faults planted.
//
//   matrix TYPE FAULT ORDER   TYPE and the bytes of a row in shared memory, as in main(); FAULT as in kFaults
// prints the largest error as a share of the one that the arithmetic may make, then what was counted.
#include "cuda_host.h"

#include <cmath>
#include <cstdio>
#include <string_view>

#include "cuda/matrix.cuh"

using namespace cnnfast::cuda;

enum Fault { none, no_wait, no_barrier, wrong_row, overtaking, unswapped };
constexpr std::string_view kFaults[] = {"none", "no_wait", "no_barrier", "wrong_row", "overtaking", "unswapped"};
constexpr int kMTiles = 2, kNTiles = 4, kWarps = 2, kSlices = 3, kStages = 2;
constexpr int kRows = 16 * kMTiles * kWarps, kColumns = 8 * kNTiles;

// y [rows][columns] = (a * gate) [rows][k] b [columns][k], slice by slice of k through two stages; the last columns of a
// and b aren't there and count as zeros.
template <class T, Multiply kMultiply, int kRowBytes>
__global__ void product(const T* a, const T* b, const T* gate, float* y, int k, int fault) {
  using Product = WarpProduct<T, kMultiply, kMTiles, kNTiles, kRowBytes>;
  using Tile = typename Product::Tile;
  constexpr int kStage = (kRows + kColumns + 1) * Tile::kDepth;
  CNNFAST_SHARED(T, tiles);

  const auto copy = [&](int slice) {
    T* const stage = tiles + slice % kStages * kStage;
    for (int i = threadIdx.x; i < (kRows + kColumns) * Tile::kPieces; i += blockDim.x) {
      const int row = i / Tile::kPieces, piece = i % Tile::kPieces, at = slice * Tile::kDepth + piece * kVec<T>;
      const int to = fault == unswapped ? row * Tile::kDepth + piece * kVec<T> : Tile::at(row, piece);
      cp_async(stage, to, row < kRows ? a : b, (row < kRows ? row : row - kRows) * k + at, at < k);
    }
    for (int i = threadIdx.x; i < Tile::kPieces; i += blockDim.x) {
      const int at = slice * Tile::kDepth + i * kVec<T>;
      cp_async(stage, (kRows + kColumns) * Tile::kDepth + i * kVec<T>, gate, at, at < k);
    }
  };

  Product warp;
  warp.clear();
  const int first_row = static_cast<int>(threadIdx.x) / 32 * Product::kRows;
  copy(0);
  cp_async_commit();
  for (int slice = 0; slice < kSlices; ++slice) {
    if (fault != no_wait) cp_async_wait<0>();
    if (fault != no_barrier) __syncthreads();
    if (slice + 1 < kSlices) copy(slice + (fault == overtaking ? 2 : 1));
    cp_async_commit();
    const T* const stage = tiles + slice % kStages * kStage;
    const int from = fault == wrong_row ? first_row ^ 8 : first_row;
    warp.template multiply_add<true>(stage, from, stage + kRows * Tile::kDepth, 0,
                                     stage + (kRows + kColumns) * Tile::kDepth);
  }
  for (int i = 0; i < kMTiles; ++i)
    for (int j = 0; j < kNTiles; ++j)
      for (int e = 0; e < 4; ++e)
        global_store(y, (first_row + Product::row(i, e)) * kColumns + Product::column(j, e), warp.sums[i][j][e]);
}

template <class T>
struct Matrix {
  explicit Matrix(int count)
      : count(count), data(static_cast<T*>(std::aligned_alloc(256, (count * sizeof(T) + 255) / 256 * 256))) {}
  int count;
  std::unique_ptr<T, host::Free> data;
};

unsigned state = 1;
template <class T>
Matrix<T> draw(int count) {
  Matrix<T> m(count);
  for (int i = 0; i < count; ++i) {
    state = state * 1664525 + 1013904223;
    m.data.get()[i] = narrow<T>(static_cast<float>(state >> 8) * 0x1p-23f - 1);
  }
  return m;
}

// TF32's operands may each be off by 2^-11.
template <class T, Multiply kMultiply, int kRowBytes>
double largest_error(Fault fault) {
  constexpr int kDepth = kRowBytes / sizeof(T), k = kSlices * kDepth - kVec<T>;
  const Matrix<T> a = draw<T>(kRows * k), b = draw<T>(kColumns * k), gate = draw<T>(k);
  const Matrix<float> y = draw<float>(kRows * kColumns);
  const int shared = kStages * (kRows + kColumns + 1) * kRowBytes;
  launch("product", product<T, kMultiply, kRowBytes>, dim3(1), dim3(32 * kWarps), shared, nullptr, a.data.get(),
         b.data.get(), gate.data.get(), y.data.get(), k, static_cast<int>(fault));
  const bool is_tf32 = sizeof(T) == 4 && kMultiply == Multiply::tensor_cores;
  double largest = 0;
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column) {
      double sum = 0, size = 0;
      for (int c = 0; c < k; ++c) {
        const double term =
            static_cast<double>(widen(narrow<T>(widen(a.data.get()[row * k + c]) * widen(gate.data.get()[c])))) *
            widen(b.data.get()[column * k + c]);
        sum += term, size += std::abs(term);
      }
      const double error = std::abs(y.data.get()[row * kColumns + column] - sum) / size;
      largest = error <= largest ? largest : error;  // a NaN stays
    }
  return largest / (is_tf32 ? 0x1p-10 : 0x1p-24 * (4 + std::sqrt(k) / 2));
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string_view type = argv[1];
  const auto fault = static_cast<Fault>(std::find(std::begin(kFaults), std::end(kFaults), argv[2]) - kFaults);
  host::settings.order = static_cast<host::Order>(std::atoi(argv[3]));
  host::counting = host::settings.order != host::Order::threads;
  constexpr Multiply mma = Multiply::tensor_cores, fma = Multiply::fma;
  const double error = type == "half_32"           ? largest_error<__half, mma, 32>(fault)
                       : type == "half_64"         ? largest_error<__half, mma, 64>(fault)
                       : type == "half_128"        ? largest_error<__half, mma, 128>(fault)
                       : type == "half_256"        ? largest_error<__half, mma, 256>(fault)
                       : type == "bfloat16_64"     ? largest_error<__nv_bfloat16, mma, 64>(fault)
                       : type == "tf32_64"         ? largest_error<float, mma, 64>(fault)
                       : type == "float_64"        ? largest_error<float, fma, 64>(fault)
                       : type == "float_128"       ? largest_error<float, fma, 128>(fault)
                       : type == "bfloat16_fma_64" ? largest_error<__nv_bfloat16, fma, 64>(fault)
                                                   : throw std::invalid_argument(argv[1]);
  std::printf("%g\n%s\n", error, host::counters_json().c_str());
}
