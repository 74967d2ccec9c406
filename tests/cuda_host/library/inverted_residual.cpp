// csrc/cuda/inverted_residual.cu on CPU tensors.
#include "library.h"

#include "cuda/inverted_residual.cu"

HOST_LIBRARY(CNNFAST_HOST, m) {
  m.def(
      "inverted_residual(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor dw_weight, Tensor? dw_bias,"
      " Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight, Tensor? se_expand_bias,"
      " Tensor project_weight, Tensor? project_bias, Tensor? residual, int[] stride, int[] padding, int[] dilation,"
      " int activation, int se_activation, int gate_activation, bool tf32) -> Tensor");
}

HOST_LIBRARY_IMPL(CNNFAST_HOST, m) { m.impl("inverted_residual", TORCH_BOX(&cnnfast::cuda::inverted_residual_op)); }

std::string promise(const std::string& kernel, bool tf32, int k, int s, const std::string& columns, int registers) {
  return kernel + " " + std::to_string(tf32) + " " + std::to_string(k) + " " + std::to_string(s) + columns +
         " registers=" + std::to_string(registers) + "\n";
}

const char* host_promises() {
  using namespace cnnfast::cuda;
  static std::string text;
  text.clear();
  for (const bool tf32 : {false, true})
    for (const auto& [k, s] : {std::pair(3, 1), {3, 2}, {5, 1}, {5, 2}, {0, 0}}) {
      for (const int columns : {kFewColumns, kManyColumns})
        text += promise("inverted_residual_kernel", tf32, k, s, " " + std::to_string(columns),
                        blocks_at_once(tf32, columns) == 2 ? kMaxRegisters : kMaxRegistersOfOne);
      text += promise("inverted_residual_squeeze_kernel", tf32, k, s, "", kMaxRegisters);
      if (k > 0) text += promise("inverted_residual_one_pass_kernel", tf32, k, s, "", kMaxRegisters);
    }
  return text.c_str();
}
