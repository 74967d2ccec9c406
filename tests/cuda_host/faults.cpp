// Kernels with a planted fault each, and their sound twins: what the harness is for has to be found by it.
//
//   faults NAME ORDER   runs the kernel of that name with host::Order ORDER; prints its output, then what was counted
#include "cuda_host.h"

#include <cstdio>
#include <map>
#include <string_view>

#include "cuda/cluster.cuh"

using namespace cnnfast::cuda;

constexpr int kThreads = 64;

// y[i] = x[end - i], through shared memory.
template <bool with_barrier>
__global__ void reverse(const float* x, float* y) {
  CNNFAST_SHARED(float, tile);
  const int i = threadIdx.x;
  shared_store(tile, i, global_load<float>(x, i));
  if (with_barrier) __syncthreads();
  global_store(y, i, shared_load<float>(tile, kThreads - 1 - i));
}

__global__ void write_past_shared(const float* x, float* y) {
  CNNFAST_SHARED(float, tile);
  shared_store(tile, threadIdx.x + 1, global_load<float>(x, threadIdx.x));
  __syncthreads();
  global_store(y, threadIdx.x, shared_load<float>(tile, threadIdx.x));
}

__global__ void write_past_output(const float* x, float* y) {
  global_store(y, threadIdx.x + 1, global_load<float>(x, threadIdx.x));
}

__global__ void misaligned(const float* x, float* y) {
  if (threadIdx.x < 8) global_store(y, threadIdx.x * 4, global_load<Vec<float>>(x, 1 + threadIdx.x * 4));
}

template <int stride>
__global__ void strided(const float* x, float* y) {
  global_store(y, threadIdx.x, global_load<float>(x, threadIdx.x * stride % kThreads));
}

// Each warp reads a column of 32 rows: pitch 32 puts a column into one bank, pitch 33 into all.
template <int pitch>
__global__ void columns(const float* x, float* y) {
  CNNFAST_SHARED(float, tile);
  const int i = threadIdx.x;
  shared_store(tile, i % 32 * pitch + i / 32, global_load<float>(x, i));
  __syncthreads();
  global_store(y, i, shared_load<float>(tile, i % 32 * pitch + i / 32));
}

// The sum of all x, by shuffles in a warp and an atomic between warps.
__global__ void sum(const float* x, float* y) {
  float value = global_load<float>(x, threadIdx.x);
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(~0u, value, delta);
  if (threadIdx.x % 32 == 0) atomicAdd(y, value);
}

// y[i] = x[end - i]: each block of a cluster of two has half of x, and reads the other's.
template <bool with_barrier>
__global__ void reverse_in_cluster(const float* x, float* y) {
  CNNFAST_SHARED(float, tile);
  const int half = kThreads / 2, i = threadIdx.x % half, rank = cluster_rank();
  if (static_cast<int>(threadIdx.x) < half) shared_store(tile, i, global_load<float>(x, rank * half + i));
  if (with_barrier) cluster_barrier();
  if (static_cast<int>(threadIdx.x) < half)
    global_store(y, rank * half + i, cluster_load<float>(tile, half - 1 - i, 1 - rank));
  cluster_barrier();  // a block's shared memory is there until both have read
}

// Half of the threads leave before a barrier that the others wait at.
__global__ void deadlock(const float* x, float* y) {
  if (threadIdx.x < 32) return;
  __syncthreads();
  global_store(y, threadIdx.x, global_load<float>(x, threadIdx.x));
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::map<std::string_view, void (*)(const float*, float*)> kernels = {
      {"reverse", reverse<true>},
      {"missing_barrier", reverse<false>},
      {"write_past_shared", write_past_shared},
      {"write_past_output", write_past_output},
      {"misaligned", misaligned},
      {"coalesced", strided<1>},
      {"strided", strided<8>},
      {"bank_conflict", columns<32>},
      {"no_bank_conflict", columns<33>},
      {"sum", sum},
      {"deadlock", deadlock},
      {"reverse_in_cluster", reverse_in_cluster<true>},
      {"missing_cluster_barrier", reverse_in_cluster<false>},
  };
  host::settings.order = static_cast<host::Order>(std::atoi(argv[2]));
  const std::string_view name = argv[1];
  const int shared_bytes = name.ends_with("bank_conflict") ? 33 * 32 * 4 : kThreads * 4;
  auto* x = static_cast<float*>(std::aligned_alloc(256, kThreads * 4));
  auto* y = static_cast<float*>(std::aligned_alloc(256, kThreads * 4));
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i), y[i] = 0;
  host::name_buffer("x", x, kThreads * 4);
  host::name_buffer("y", y, kThreads * 4);
  host::counting = host::settings.order != host::Order::threads;
  if (name.find("cluster") != name.npos)
    launch_clusters(argv[1], kernels.at(name), dim3(2), dim3(kThreads), 2, shared_bytes, nullptr, x, y);
  else
    launch(argv[1], kernels.at(name), dim3(1), dim3(kThreads), shared_bytes, nullptr, x, y);
  for (int i = 0; i < kThreads; ++i) std::printf("%g ", y[i]);
  std::printf("\n%s\n", host::counters_json().c_str());
  std::free(x);
  std::free(y);
}
