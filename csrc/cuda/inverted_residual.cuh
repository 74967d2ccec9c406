// inverted_residual on raw device pointers: forward. No torch: nvcc alone compiles it, or a host compiler with
// tests/cuda_host/cuda_host.h. Each kernel's file opens with its costs.
#pragma once
#include "inverted_residual/fused.cuh"

namespace cnnfast::cuda {

// Why the kernels can't take this problem; empty: they can.
template <class T>
std::string inverted_residual_reason(const InvertedResidualShape& s) {
  if (make_plan<T>(s).bytes <= kSharedBytes) return {};
  return "4 outputs, with the inputs, weights and " + std::to_string(s.channels) +
         " input channels that they need, don't fit the " + std::to_string(kSharedBytes) + " bytes of shared memory";
}

template <class T, bool tf32, int K, int S>
void with_columns(const InvertedResidualArguments<T>& a, const InvertedResidualPlan& p, cudaStream_t stream) {
  if (a.shape.out_channels <= kFewColumns)
    launch_inverted_residual<T, tf32, K, S, kFewColumns>(a, p, stream);
  else
    launch_inverted_residual<T, tf32, K, S, kManyColumns>(a, p, stream);
}

// tf32: float32 operands of both products may be rounded to TF32.
template <class T, bool tf32>
void inverted_residual_forward(const InvertedResidualArguments<T>& arguments, cudaStream_t stream) {
  InvertedResidualArguments<T> a = arguments;
  const InvertedResidualShape& s = a.shape;
  const InvertedResidualPlan p = make_plan<T>(s);
  if (p.bytes > kSharedBytes) throw std::runtime_error("inverted_residual: " + inverted_residual_reason<T>(s));
  if (s.batch * s.out_height * s.out_width * s.out_channels == 0) return;
  const auto vectors = [](int length, std::initializer_list<const void*> rows) {
    bool aligned = length % kVec<T> == 0;
    for (const void* row : rows) aligned &= reinterpret_cast<uintptr_t>(row) % 16 == 0;
    return aligned;
  };
  a.vectors_c = vectors(s.channels, {a.x, a.expand_weight});
  a.vectors_e = vectors(s.expanded, {a.dw_weight, a.project_weight});
  a.vectors_k = vectors(s.out_channels, {a.y, a.residual});

  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w && s.dilation_h == 1 && s.dilation_w == 1;
  const auto is = [&](int k, int stride) { return square && s.kernel_h == k && s.stride_h == stride; };
  if (is(3, 1)) return with_columns<T, tf32, 3, 1>(a, p, stream);
  if (is(3, 2)) return with_columns<T, tf32, 3, 2>(a, p, stream);
  if (is(5, 1)) return with_columns<T, tf32, 5, 1>(a, p, stream);
  if (is(5, 2)) return with_columns<T, tf32, 5, 2>(a, p, stream);
  with_columns<T, tf32, 0, 0>(a, p, stream);
}

}  // namespace cnnfast::cuda
