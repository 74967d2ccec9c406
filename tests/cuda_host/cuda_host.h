// CUDA's device environment on a host compiler: include it before a .cuh of csrc/cuda, which then compiles as C++20 with
// g++ (the toolkit's headers are needed for cuda_fp16.h and cuda_bf16.h) and runs on host threads.
//
// host::settings chooses how a block runs:
//   threads   one host thread per CUDA thread, for ASan, UBSan and TSan
//   forward   one CUDA thread at a time up to its next barrier, in order of threadIdx: repeatable, and fast
//   reverse   the same from the last to the first: what differs from forward is a race
//   warps     each warp as far as it gets before the next one moves
// Blocks run one after another (so a kernel must not wait for another block), but those of a cluster together. Shared
// memory is exactly as large as the launch asked for, and NaN-filled before a block begins and once it has ended: others of
// its cluster must not read it then. Accesses through device.cuh's wrappers are counted (counters.h).
#pragma once
#define CNNFAST_CUDA_HOST 1

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "counters.h"
#include "mma.h"
#include "schedule.h"

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define threadIdx (::host::thread().index)
#define blockIdx (::host::block().index)
#define blockDim (::host::block_dim)
#define gridDim (::host::grid_dim)
#define CNNFAST_SHARED(type, name) type* const name = reinterpret_cast<type*>(::host::block().shared.get())

using std::max;
using std::min;

inline void __syncthreads() { host::block_barrier(); }
inline void __syncwarp() { host::warp_barrier(); }

// The value of another lane of the warp; every lane takes part (mask is all lanes).
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  host::Warp& warp = host::this_warp();
  std::memcpy(&warp.exchange[host::lane()], &value, sizeof(T));
  host::warp_barrier();
  T result;
  std::memcpy(&result, &warp.exchange[lane % 32], sizeof(T));
  host::warp_barrier();
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int delta) {
  return __shfl_sync(mask, value, host::lane() ^ delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int from = host::lane() + static_cast<int>(delta);
  return __shfl_sync(mask, value, from < 32 ? from : host::lane());
}
template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value);
}

namespace cnnfast::cuda {

// Host twins of device.cuh's wrappers.
template <class V, class T>
V global_load(const T* p, int64_t offset, bool valid = true, host::Site site = host::Site::current()) {
  V value{};
  const void* const from = valid ? p + offset : nullptr;
  host::count_access(host::Space::global, host::Access::load, from, sizeof(V), site);
  if (valid) value = *reinterpret_cast<const V*>(from);
  return value;
}

template <class V, class T>
void global_store(T* p, int64_t offset, const V& value, host::Site site = host::Site::current()) {
  host::count_access(host::Space::global, host::Access::store, p + offset, sizeof(V), site);
  *reinterpret_cast<V*>(p + offset) = value;
}

template <class V, class T>
V shared_load(const T* p, int offset, host::Site site = host::Site::current()) {
  host::count_access(host::Space::shared, host::Access::load, p + offset, sizeof(V), site);
  return *reinterpret_cast<const V*>(p + offset);
}

template <class V, class T>
void shared_store(T* p, int offset, const V& value, host::Site site = host::Site::current()) {
  host::count_access(host::Space::shared, host::Access::store, p + offset, sizeof(V), site);
  *reinterpret_cast<V*>(p + offset) = value;
}

template <class A>
A max_nan(A a, A b) {
  return a != a || a > b ? a : b;
}
template <class A>
A min_nan(A a, A b) {
  return a != a || a < b ? a : b;
}

inline float reciprocal(float x) {
  const float result = 1 / x;
  return std::abs(result) < std::numeric_limits<float>::min() ? std::copysign(0.0f, result) : result;
}

inline int multiprocessors() { return host::settings.multiprocessors; }

inline void fail() { host::trapped = true; }

inline bool has_clusters() { return host::settings.clusters; }
constexpr bool targets_clusters() { return true; }
inline int cluster_rank() { return host::thread().rank; }
inline void cluster_barrier() { host::cluster_barrier(); }

template <class V, class T>
V cluster_load(const T* p, int offset, int rank, host::Site site = host::Site::current()) {
  const char* const here = host::block().shared.get();
  const char* const there = host::cluster->blocks[rank]->shared.get();
  const char* const from = there + (reinterpret_cast<const char*>(p + offset) - here);
  host::count_access(host::Space::cluster, host::Access::load, from, sizeof(V), site);
  return *reinterpret_cast<const V*>(from);
}

// As device.cuh's launch, with the limits of the hardware; the kernel runs at once.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t,
            const std::type_identity_t<Parameters>&... arguments) {
  host::check_launch(name, grid, block, shared_bytes);
  host::run(name, grid, block, shared_bytes, [&] { kernel(arguments...); });
}

template <class... Parameters>
void launch_clusters(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int cluster_size,
                     int shared_bytes, cudaStream_t, const std::type_identity_t<Parameters>&... arguments) {
  host::check_launch(name, grid, block, shared_bytes, cluster_size);
  host::run(name, grid, block, shared_bytes, [&] { kernel(arguments...); }, cluster_size);
}

}  // namespace cnnfast::cuda
