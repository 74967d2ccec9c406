// csrc/cuda/pointwise_conv2d.cu on CPU tensors.
#include "library.h"

#include "cuda/pointwise_conv2d.cu"

HOST_LIBRARY(CNNFAST_HOST, m) {
  m.def(
      "pointwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? residual, int[] stride,"
      " int activation, bool tf32) -> Tensor");
}

HOST_LIBRARY_IMPL(CNNFAST_HOST, m) { m.impl("pointwise_conv2d", TORCH_BOX(&cnnfast::cuda::pointwise_conv2d_op)); }

template <bool tf32, bool gated, int kMWarps, int kNWarps, int kMTiles>
std::string promise() {
  using P = cnnfast::cuda::PointwiseTraits<float, tf32, gated, kMWarps, kNWarps, kMTiles>;
  std::string line = "pointwise_conv2d_forward_kernel";
  for (const int value : {int{tf32}, int{gated}, kMWarps, kNWarps, kMTiles}) line += " " + std::to_string(value);
  return line + " rows=" + std::to_string(P::kRows) + " columns=" + std::to_string(P::kColumns) +
         " shared=" + std::to_string(P::kSharedBytes) + " row_bytes=" + std::to_string(P::kRowBytes) +
         " sectors_per_request=" + std::to_string(P::kSectorsPerRequest) +
         " registers=" + std::to_string(P::kMaxRegisters) + " registers_75=" + std::to_string(P::kMaxRegisters75) +
         "\n";
}
template <bool tf32, bool gated>
std::string promises() {
  return promise<tf32, gated, 4, 1, 1>() + promise<tf32, gated, 2, 2, 2>() + promise<tf32, gated, 4, 2, 2>() +
         promise<tf32, gated, 2, 4, 4>();
}

const char* host_promises() {
  static const std::string text =
      promises<false, false>() + promises<false, true>() + promises<true, false>() + promises<true, true>();
  return text.c_str();
}
