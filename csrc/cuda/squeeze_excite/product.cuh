// What the gate's kernels (gate.cuh) share: rows of a weight in global memory times vectors in shared memory, float32 sums.
//
// tile       a group of 1 to 32 lanes, as many as a row has vectors, takes 4 rows at once: 4 loads in flight, each used for
//            the vectors of 4 images (or one); then the lanes are summed by shuffles. Rows that aren't whole aligned
//            16-byte vectors are read element by element
// sectors    a warp's request of weights is contiguous: 16 of 32 bytes where groups have no idle lane
// shared     values lie [half of a vector][vector][4]: 16-byte loads, free of bank conflicts
#pragma once
#include "common.cuh"

namespace cnnfast::cuda {

constexpr int kProductRows = 4;  // of a weight, that a thread works on at once

struct GateBias {
  const void* data = nullptr;  // none: zeros
  bool float32 = false;        // otherwise of the weights' type
};

// `inputs` values of a row, in vectors of n.
struct RowTiling {
  int n, lanes;
};

template <class T>
RowTiling row_tiling(const T* weight, int row, int inputs) {
  const int n = row % kVec<T> == 0 && aligned<kVec<T>>(weight) ? kVec<T> : 1;
  int lanes = 1;
  while (lanes < 32 && lanes * n < inputs) lanes *= 2;
  return {n, lanes};
}

// Where value i of `pitch` (a multiple of 8) lies in shared memory: a vector of 8 in two halves, far apart.
__device__ inline int staged_at(int n, int pitch, int i) {
  return n == 8 ? i % 8 / 4 * (pitch / 2) + i / 8 * 4 + i % 4 : i;
}

template <class T>
__device__ inline float load_bias(const GateBias& bias, int i, bool valid) {
  if (bias.float32) return global_load<float>(static_cast<const float*>(bias.data), i, valid && bias.data);
  return widen(global_load<T>(static_cast<const T*>(bias.data), i, valid && bias.data));
}

// The rows of a weight that a thread's group works on at once: first, first + step, ..., below end.
struct Rows {
  int first, step, end;
};

// sum[j][image] = the bias of row j on the first lane of the group, 0 on the others.
template <class T, int images>
__device__ inline void begin_with(float (&sum)[kProductRows][images], const GateBias& bias, const Rows& rows,
                                  int lanes) {
#pragma unroll
  for (int j = 0; j < kProductRows; ++j) {
    const int row = rows.first + j * rows.step;
    const float value = load_bias<T>(bias, row, threadIdx.x % lanes == 0 && row < rows.end);
#pragma unroll
    for (int image = 0; image < images; ++image) sum[j][image] = value;
  }
}

// sum[j][image] += this lane's part of row j times the values of an image: `inputs` of them from weight's column `begin`.
template <class T, int n, int images>
__device__ inline void multiply(float (&sum)[kProductRows][images], const T* weight, int64_t pitch_of_weight,
                                const Rows& rows, int begin, int inputs, int lanes, const float* values, int pitch) {
  constexpr int kPart = kFloats<n>;
  for (int first = 0; first < inputs; first += lanes * n) {
    const int i = first + static_cast<int>(threadIdx.x) % lanes * n;
    Values<T, n> w[kProductRows];
#pragma unroll
    for (int j = 0; j < kProductRows; ++j) {
      const int row = rows.first + j * rows.step;
      w[j] = global_load<Values<T, n>>(weight, row * pitch_of_weight + begin + i, i < inputs && row < rows.end);
    }
    if (i >= inputs) continue;  // beyond lie no values, and 0 times what is there could be NaN
#pragma unroll
    for (int image = 0; image < images; ++image)
#pragma unroll
      for (int part = 0; part < n; part += kPart) {
        const auto v = shared_load<Values<float, kPart>>(values, image * pitch + staged_at(n, pitch, i + part));
#pragma unroll
        for (int j = 0; j < kProductRows; ++j)
#pragma unroll
          for (int k = 0; k < kPart; ++k) sum[j][image] += widen(w[j].v[part + k]) * v.v[k];
      }
  }
}

template <class T, int images>
__device__ inline void multiply(float (&sum)[kProductRows][images], const T* weight, int64_t pitch_of_weight,
                                const Rows& rows, int begin, int inputs, const RowTiling& t, const float* values,
                                int pitch) {
  if (t.n > 1)
    multiply<T, kVec<T>>(sum, weight, pitch_of_weight, rows, begin, inputs, t.lanes, values, pitch);
  else
    multiply<T, 1>(sum, weight, pitch_of_weight, rows, begin, inputs, t.lanes, values, pitch);
}

// Lanes `delta` apart add up what they have: the one keeps the first half of the values, the other the second; and so on
// with half the values and half the distance. By recursion, not a loop: a loop's v would lie in local memory.
template <int half, int n>
__device__ inline void exchange(float (&v)[n], int& first, int& count, int& delta) {
  if (delta == 0) return;
  const bool upper = threadIdx.x & delta;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float low = v[i], high = v[i + half];
    v[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, delta);
  }
  if (upper) first += half;
  count = half;
  delta /= 2;
  if constexpr (half > 1) exchange<half / 2>(v, first, count, delta);
}

// Adds up the lanes of a group, and calls store(row, image, sum) once for each row and image. Lanes that meet keep half of
// the values each while there are several: 16 values of 32 lanes take 16 shuffles, and the stores are spread over the
// lanes. A sum's order is that of the lanes' distances, from far to near, whichever value it is.
template <int images, class F>
__device__ inline void finish(const float (&sum)[kProductRows][images], const Rows& rows, int lanes, F store) {
  constexpr int kValues = kProductRows * images;
  float v[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) v[i] = sum[i / images][i % images];
  int first = 0, count = kValues, delta = lanes / 2;  // this lane's values
  exchange<kValues / 2>(v, first, count, delta);
  const unsigned equal_lanes = delta == 0 ? 0 : 2 * delta - 1;
  for (; delta > 0; delta /= 2) v[0] += __shfl_xor_sync(~0u, v[0], delta);
  if (threadIdx.x & equal_lanes) return;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int row = rows.first + (first + i) / images * rows.step;
    if (i < count && row < rows.end) store(row, (first + i) % images, v[i]);
  }
}

// The rows begin to end in rounds: each group's of a round, the same number of rounds for every thread.
template <class F>
__device__ inline void for_rows(int begin, int end, int lanes, F round) {
  const int groups = static_cast<int>(blockDim.x) / lanes, group = static_cast<int>(threadIdx.x) / lanes;
  for (int first = begin; first < end; first += groups * kProductRows) round(Rows{first + group, groups, end});
}

}  // namespace cnnfast::cuda
