// pointwise_conv2d on raw device pointers: forward. No torch: nvcc alone compiles it, or a host compiler with
// tests/cuda_host/cuda_host.h. Each kernel's file opens with its costs.
#pragma once
#include <initializer_list>

#include "pointwise_conv2d/common.cuh"
#include "pointwise_conv2d/forward.cuh"
#include "pointwise_conv2d/generic.cuh"

namespace cnnfast::cuda {

// Whether the kernel on tensor cores takes this problem.
template <class T>
bool vectorized(const PointwiseArguments<T>& a) {
  bool aligned = true;
  for (const void* p : std::initializer_list<const void*>{a.x, a.weight, a.bias, a.gate, a.residual, a.y})
    aligned &= reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return aligned && a.shape.channels % kVec<T> == 0 && a.shape.out_channels % kVec<T> == 0;
}

// The largest tile that fills the GPU with two blocks a multiprocessor: the larger, the less is loaded again. Of 128
// output channels where 64 wouldn't compute much less in vain. Every tile gives the same bits.
template <class T, bool tf32, bool gated>
void launch_forward(const PointwiseArguments<T>& a, cudaStream_t stream) {
  const PointwiseShape& s = a.shape;
  const int64_t enough = 2 * multiprocessors();
  const auto fills = [&]<class Traits>(Traits) { return PointwiseTiles::of<Traits>(s).blocks() >= enough; };
  const int of_64 = ceil_div(s.out_channels, 64) * 64, of_128 = ceil_div(s.out_channels, 128) * 128;
  if (s.out_channels <= 32) return launch_forward<T, tf32, gated, 4, 1, 1>(a, stream);
  if ((of_128 == of_64 || of_128 * 4 <= s.out_channels * 5) && fills(PointwiseTraits<T, tf32, gated, 2, 4, 4>{}))
    return launch_forward<T, tf32, gated, 2, 4, 4>(a, stream);
  if (fills(PointwiseTraits<T, tf32, gated, 4, 2, 2>{})) return launch_forward<T, tf32, gated, 4, 2, 2>(a, stream);
  launch_forward<T, tf32, gated, 2, 2, 2>(a, stream);
}

template <class T, bool tf32>
void launch_forward(const PointwiseArguments<T>& a, cudaStream_t stream) {
  a.gate ? launch_forward<T, tf32, true>(a, stream) : launch_forward<T, tf32, false>(a, stream);
}

template <class T>
void pointwise_conv2d_forward(const PointwiseArguments<T>& a, cudaStream_t stream) {
  if (a.shape.batch * a.shape.image() == 0) return;
  if (!vectorized(a)) return launch_forward_generic(a, stream);
  if constexpr (sizeof(T) == 4)
    if (a.tf32) return launch_forward<T, true>(a, stream);
  launch_forward<T, false>(a, stream);
}

}  // namespace cnnfast::cuda
