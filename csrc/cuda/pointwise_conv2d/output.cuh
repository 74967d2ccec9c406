// The end of pointwise_conv2d's kernel on tensor cores: sums + bias + residual, activation, y. Its costs: forward.cuh.
#pragma once
#include "../matrix.cuh"
#include "common.cuh"

namespace cnnfast::cuda {

// Where a warp's sums lie in shared memory, 32 floats a row, on their way to the output: 16-byte pieces change places so
// that 2 neighbouring pieces of 4 rows (a request of 8 bytes a lane writes these), and a row's 8, or every second of the
// rows r and r + 4 (requests of 16 bytes read these), are in different banks.
__device__ constexpr int at_sum(int row, int column) {
  return row * 32 + ((column / 4) ^ (row % 4 * 2 + row / 4 % 2)) * 4 + column % 4;
}

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

}  // namespace cnnfast::cuda
