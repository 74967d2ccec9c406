// Thread-block clusters (compute capability 9.0 on): blocks that run together and read each other's shared memory. A kernel
// of clusters is compiled for every target, on older ones to a trap: its launcher asks has_clusters first.
#pragma once
#include "device.cuh"

#ifdef __CUDACC__
namespace cnnfast::cuda {

// Whether this target has clusters; a kernel of clusters is empty but for fail() where not.
__device__ constexpr bool targets_clusters() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return false;
#else
  return true;
#endif
}

// Of this block in its cluster.
__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  __trap();
  return 0;
#endif
}

// Waits for all threads of the cluster; what they wrote to shared memory before is there for all.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// What block `rank` has at the place of this block's p + offset; 4 or 16 bytes.
template <class V, class T>
__device__ inline V cluster_load(const T* p, int offset, int rank) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 16);
  using W = typename Word<sizeof(V)>::type;
  W word{};
#if __CUDA_ARCH__ >= 900
  const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(p + offset));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  if constexpr (sizeof(V) == 4)
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(there) : "memory");
  else
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "r"(there)
                 : "memory");
#else
  __trap();
#endif
  return bits<V>(word);
}

// Whether the current device runs clusters whose blocks have 227 KB of shared memory: compute capability 9.0 and 10.x.
inline bool has_clusters() {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return major == 9 || major == 10;
}

// As launch, in clusters of cluster_size (8 at most) blocks side by side in x.
template <class... Parameters>
void launch_clusters(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int cluster_size,
                     int shared_bytes, cudaStream_t stream, const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  char message[512];
  std::snprintf(message, sizeof(message),
                "%s, grid (%u, %u, %u), block (%u, %u, %u), clusters of %d, %d bytes of shared memory: %s", name,
                grid.x, grid.y, grid.z, block.x, block.y, block.z, cluster_size, shared_bytes,
                cudaGetErrorString(error));
  throw std::runtime_error(message);
}

}  // namespace cnnfast::cuda
#endif
