// What the kernels use of the device: 16-byte vectors, conversions, and one wrapper per memory access or PTX
// instruction. tests/cuda_host/cuda_host.h defines the host twins of everything under __CUDACC__, and counts there what
// the hardware would: include it first to compile a kernel with a host compiler. No torch here.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>

namespace cnnfast::cuda {

// Sums of float64 are float64, all others float32.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// The 16 bytes that one thread loads or stores at once.
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));
template <class T>
struct alignas(16) Vec {
  T v[kVec<T>];
};

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

template <class To, class From>
__host__ __device__ inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

__host__ __device__ inline float widen(float v) { return v; }
__host__ __device__ inline double widen(double v) { return v; }
__host__ __device__ inline float widen(__half v) { return __half2float(v); }
// Not __bfloat162float: from sm_90 on it is an instruction on a 16-bit register, which the compiler can't see through. For
// sm_100 and sm_120 all halves of the loaded words then sat in registers of their own, and the forward kernel spilled. A
// shift is folded into one operation on the word that was loaded.
__host__ __device__ inline float widen(__nv_bfloat16 v) {
  return bits<float>(static_cast<uint32_t>(bits<uint16_t>(v)) << 16);
}

template <class T>
__host__ __device__ inline T narrow(Accumulate<T> v) {
  return v;
}
template <>
__host__ __device__ inline __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__host__ __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

}  // namespace cnnfast::cuda

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <cstdio>
#include <stdexcept>
#include <type_traits>

// Every kernel's shared memory is dynamic: the host twin allocates exactly what was asked for, so that ASan sees its end.
#define CNNFAST_SHARED(type, name)                                    \
  extern __shared__ __align__(16) unsigned char cnnfast_shared_raw[]; \
  type* const name = reinterpret_cast<type*>(cnnfast_shared_raw)

namespace cnnfast::cuda {

template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

// Loads a V at p + offset through the read-only cache, or zeros (no access) where valid is false.
template <class V, class T>
__device__ inline V global_load(const T* p, int64_t offset, bool valid = true) {
  using W = typename Word<sizeof(V)>::type;
  W word{};
  if (valid) word = __ldg(reinterpret_cast<const W*>(p + offset));
  return bits<V>(word);
}

template <class V, class T>
__device__ inline void global_store(T* p, int64_t offset, const V& value) {
  using W = typename Word<sizeof(V)>::type;
  *reinterpret_cast<W*>(p + offset) = bits<W>(value);
}

template <class V, class T>
__device__ inline V shared_load(const T* p, int offset) {
  using W = typename Word<sizeof(V)>::type;
  const W word = *reinterpret_cast<const W*>(p + offset);  // by value: of a reference bits() may load single bytes
  return bits<V>(word);
}

template <class V, class T>
__device__ inline void shared_store(T* p, int offset, const V& value) {
  using W = typename Word<sizeof(V)>::type;
  *reinterpret_cast<W*>(p + offset) = bits<W>(value);
}

// max and min that return NaN where either operand is NaN; fmaxf and fminf drop it.
__device__ inline float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a || a > b ? a : b;
#endif
}
__device__ inline float min_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a || a < b ? a : b;
#endif
}
__device__ inline double max_nan(double a, double b) { return a != a || a > b ? a : b; }
__device__ inline double min_nan(double a, double b) { return a != a || a < b ? a : b; }

// 1 / x, wrong by one unit in the last place at most; 0 where it would be below 2^-126.
__device__ inline float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Ends the launch with an error that the next synchronising call reports: for what only the device can see.
__device__ inline void fail() { __trap(); }

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return count;
}

// Launches, and reports an error with the kernel's name and launch shape.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
            cudaStream_t stream, const std::type_identity_t<Parameters>&... arguments) {
  cudaError_t error = cudaSuccess;
  // Beyond 48 KB only on request, which each device keeps for itself: so at every launch, some 100 ns.
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return;
  char message[512];
  std::snprintf(message, sizeof(message), "%s, grid (%u, %u, %u), block (%u, %u, %u), %d bytes of shared memory: %s",
                name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes, cudaGetErrorString(error));
  throw std::runtime_error(message);
}

}  // namespace cnnfast::cuda
#elif !defined(CNNFAST_CUDA_HOST)
#error "compile with nvcc, or include tests/cuda_host/cuda_host.h first"
#endif
