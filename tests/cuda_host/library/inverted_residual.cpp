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

const char* host_promises() { return ""; }
