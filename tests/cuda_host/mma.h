// Host twins of mma.cuh's wrappers. A matrix instruction belongs to the whole warp: its lanes hand their operands to each
// other and meet. A copy is under way from cp_async to the wait for it: NaN meanwhile, so that neither a missing wait nor
// a copy into what others still read goes unseen.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "schedule.h"

namespace host {

// This lane's part, and the parts of all lanes. Parts alternate between two places: a lane may begin the next exchange
// while others still read this one, but not the one after.
inline const Warp::Parts& exchange(const void* part, size_t bytes) {
  Warp& warp = this_warp();
  Warp::Parts& parts = warp.parts[thread().exchanges++ % 2];
  std::memcpy(parts.of[lane()], part, bytes);
  warp_barrier();
  return parts;
}

// Element i of what register r holds, as T or (float) as a TF32, whose other bits the hardware doesn't look at.
template <class T>
float element(uint32_t r, int i) {
  const auto half = static_cast<uint16_t>(r >> (16 * i));
  if constexpr (std::is_same_v<T, __half>) return __half2float(__half_raw{half});
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(__nv_bfloat16_raw{half});
  return std::bit_cast<float>(r & 0xffffe000u);
}

// d += a b from the fragments that mma.cuh's header describes: registers of `n` elements, 8 n of them to an operand's k.
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int n = 4 / sizeof(T);
  uint32_t mine[6];
  std::memcpy(mine, a, sizeof(a));
  std::memcpy(mine + 4, b, sizeof(b));
  const Warp::Parts& parts = exchange(mine, sizeof(mine));
  const int g = lane() / 4, t = lane() % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = g + e / 2 * 8, column = 2 * t + e % 2;
    double sum = 0;
    for (int k = 0; k < 8 * n; ++k) {
      const int holder = k % (4 * n) / n, further = k / (4 * n);  // t of the lane that has this k, and its register
      const uint32_t from_a = parts.of[row % 8 * 4 + holder][row / 8 + 2 * further];
      const uint32_t from_b = parts.of[column * 4 + holder][4 + further];
      sum += static_cast<double>(element<T>(from_a, k % n)) * element<T>(from_b, k % n);
    }
    d[e] = static_cast<float>(d[e] + sum);
  }
}

}  // namespace host

namespace cnnfast::cuda {

template <class T>
void cp_async(T* to, int to_offset, const T* from, int64_t from_offset, bool valid = true,
              host::Site site = host::Site::current()) {
  const void* const source = valid ? from + from_offset : nullptr;
  host::count_access(host::Space::global, host::Access::load, source, 16, site);
  host::count_access(host::Space::shared, host::Access::store, to + to_offset, 16, site);
  host::Copy copy{to + to_offset, {}};
  if (valid) copy.data = *static_cast<const uint4*>(source);
  *static_cast<uint4*>(copy.to) = host::kUnderWay;
  host::thread().copies.back().push_back(copy);
}

inline void cp_async_commit() { host::thread().copies.emplace_back(); }

template <int groups>
void cp_async_wait() {
  auto& copies = host::thread().copies;  // the last of them is still open
  while (copies.size() > groups + 1) {
    for (const host::Copy& copy : copies.front()) *static_cast<uint4*>(copy.to) = copy.data;
    copies.pop_front();
  }
}

template <class T>
void ldmatrix(uint32_t (&to)[4], const T* from, int offset, host::Site site = host::Site::current()) {
  const T* const row = from + offset;
  host::count_access(host::Space::shared, host::Access::load, row, 16, site);
  const host::Warp::Parts& parts = host::exchange(&row, sizeof(row));
  for (int i = 0; i < 4; ++i) {
    const char* source;
    std::memcpy(&source, parts.of[i * 8 + host::lane() / 4], sizeof(source));
    to[i] = reinterpret_cast<const uint32_t*>(source)[host::lane() % 4];
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2);
  host::multiply_add<T>(d, a, b);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply_add<float>(d, a, b);
}

inline uint32_t round_to_tf32(float v) {
  const uint32_t word = std::bit_cast<uint32_t>(v);
  return v != v ? 0x7fffffffu : (word + 0x1000u) & 0xffffe000u;  // ties away from zero
}

}  // namespace cnnfast::cuda
