// Tensor cores and what feeds them: one wrapper per PTX instruction, whose host twin is in tests/cuda_host/mma.h.
//
// A warp's fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16", "... m16n8k8"):
//   16-bit, k = 16   a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1, in a[2] and a[3] 8 further; two in a register
//                    b[0..1]: k = 2t, 2t + 1, in b[1] 8 further; column g
//   TF32, k = 8      a[0..3]: rows g, g + 8, g, g + 8; column t, in a[2] and a[3] 4 further
//                    b[0..1]: k = t, in b[1] 4 further; column g
//   sums             d[0..3]: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
// So in bytes the operands of both are the same: rows of 32, which ldmatrix hands out in pieces of 16.
//
// Below sm_80 there is no bfloat16 or TF32 product (matrix.cuh multiplies by FMA there), that of float16 is two of
// k = 8, and a copy is a load and a store.
#pragma once
#include "device.cuh"

#ifdef __CUDACC__
namespace cnnfast::cuda {

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes from global to shared memory, or writes zeros (no access) where valid is false. They have arrived, for
// this thread, after the cp_async_wait for the group of copies that they are in; for others after a barrier besides.
template <class T>
__device__ inline void cp_async(T* to, int to_offset, const T* from, int64_t from_offset, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to + to_offset)),
               "l"(from + from_offset), "r"(valid ? 16 : 0)
               : "memory");
#else
  shared_store(to, to_offset, global_load<Vec<T> >(from, from_offset, valid));
#endif
}

// Ends a group of copies.
__device__ inline void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the newest `groups` groups of this thread are under way.
template <int groups>
__device__ inline void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

// Four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8, and gets bytes
// 4 (l % 4) to 4 (l % 4) + 3 of row l / 4 of each matrix.
template <class T>
__device__ inline void ldmatrix(uint32_t (&to)[4], const T* from, int offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(from + offset))
               : "memory");
}

// d += a b, k = 16, 16-bit operands, float32 sums.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// d += a b, k = 8, operands that round_to_tf32 gave, float32 sums.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// To the nearest of 10 bits of mantissa; a mma cuts the others off.
__device__ inline uint32_t round_to_tf32(float v);

#if __CUDA_ARCH__ >= 800
#define CNNFAST_MMA(shape_and_types)                                                                         \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <>
__device__ inline void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  CNNFAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  CNNFAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}

__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  CNNFAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef CNNFAST_MMA

__device__ inline uint32_t round_to_tf32(float v) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(v));
  return rounded;
}
#else
template <>
__device__ inline void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#pragma unroll
  for (int k = 0; k < 2; ++k)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
}
#endif

}  // namespace cnnfast::cuda
#endif
