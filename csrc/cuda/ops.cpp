// The schemas of the C++ CUDA kernels: those of csrc/ops.cpp less `backend`, which Python has chosen by then.
// A library of its own, since cnnfast's CUDA key is registered once, in Python, for whichever backend it chooses.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cnnfast_cuda, m) {
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
      " int pre_activation, int activation) -> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
      " int[] dilation, int pre_activation, int activation, int output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "depthwise_conv2d_packed(Tensor x, Tensor packed, int out_channels, int[] kernel_size, int[] stride,"
      " int[] padding, int[] dilation, int pre_activation, int activation) -> Tensor");
  m.def(
      "inverted_residual(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor dw_weight, Tensor? dw_bias,"
      " Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight, Tensor? se_expand_bias,"
      " Tensor project_weight, Tensor? project_bias, Tensor? residual, int[] stride, int[] padding, int[] dilation,"
      " int activation, int se_activation, int gate_activation, bool tf32) -> Tensor");
  // tf32: whether float32 may be multiplied by TF32; Python knows PyTorch's setting
  m.def(
      "pointwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? residual, int[] stride,"
      " int activation, bool tf32) -> Tensor");
  m.def(
      "squeeze_excite(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias,"
      " Tensor? residual, int activation, int gate_activation, int post_activation) -> Tensor");
}
