// The schemas of every cnnfast op, in one place. Private until 1.0: the Python functions in cnnfast.ops are the API.
//
// Conventions, the same in every schema:
//   x                 (N, C, H, W), any dtype of {float32, float64, bfloat16, float16}; channels_last is the fast path
//   stride, dilation  [vertical, horizontal]
//   padding           [top, bottom, left, right], or [-1] for 'same': output = ceil(input / stride), the odd row or
//                     column of zeros at the bottom or right (TensorFlow's rule; for stride 1 also PyTorch's)
//   *activation       a code of cnnfast.ops.activations: 0 identity, 1 relu, 2 relu6, 3 sigmoid, 4 silu, 5 gelu, 6 tanh
//   output_mask       bit i set: gradient i of the returned list is wanted; one that is not comes back with 0 elements
//   backend           a code of cnnfast.ops.backends: 0 auto, 1 cpu, 2 cuda, 3 triton
//   max_pool          [kernel, stride, padding] of a max pooling of the result, or [-1] for none
//   packed            what pack_<op> returned: uint8, opaque, a 64-byte header first (csrc/packing.h)
//   *scale            of pack_<op>: by what a stage's output channels are multiplied before the bias is added
// No str anywhere: the stable ABI's string conversion leaks. No empty list either: AOTInductor passes None for it
// (pytorch/pytorch#194324).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cnnfast, m) {
  // y = activation(depthwise(pre_activation(x), weight) + bias);  weight (C * multiplier, 1, kh, kw), bias (C * multiplier)
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
      " int pre_activation, int activation, int backend=0) -> Tensor");
  // gradients of x, weight, bias
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
      " int[] dilation, int pre_activation, int activation, int output_mask, int backend=0)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("pack_depthwise_conv2d(Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "depthwise_conv2d_packed(Tensor x, Tensor packed, int out_channels, int[] kernel_size, int[] stride,"
      " int[] padding, int[] dilation, int pre_activation, int activation, int backend=0) -> Tensor");

  // the same, and the mean of y over each image's pixels, (N, C * multiplier, 1, 1)
  m.def(
      "depthwise_conv2d_squeeze(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
      " int pre_activation, int activation, int backend=0) -> (Tensor, Tensor)");
  m.def(
      "depthwise_conv2d_squeeze_backward(Tensor grad, Tensor grad_squeezed, Tensor x, Tensor weight, Tensor? bias,"
      " int[] stride, int[] padding, int[] dilation, int pre_activation, int activation, int output_mask,"
      " int backend=0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "depthwise_conv2d_squeeze_packed(Tensor x, Tensor packed, int out_channels, int[] kernel_size, int[] stride,"
      " int[] padding, int[] dilation, int pre_activation, int activation, int backend=0) -> (Tensor, Tensor)");
  // the same beside batch normalisation: see conv2d_stats
  m.def(
      "depthwise_conv2d_stats(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int[] stride,"
      " int[] padding, int[] dilation, int pre_activation, int backend=0) -> (Tensor, Tensor, Tensor)");
  // gradients of x, weight, bias, scale, shift
  m.def(
      "depthwise_conv2d_stats_backward(Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor weight,"
      " Tensor? bias, Tensor? scale, Tensor? shift, Tensor y, int[] stride, int[] padding, int[] dilation,"
      " int pre_activation, int output_mask, int backend=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // y = activation(conv(x, weight) + bias + residual);  weight (K, C, kh, kw), bias (K), residual like y
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation,"
      " int activation, int backend=0) -> Tensor");
  // gradients of x, weight, bias, residual
  m.def(
      "conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride,"
      " int[] padding, int[] dilation, int activation, int output_mask, int backend=0)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_conv2d(Tensor weight, Tensor? bias, Tensor? scale=None, bool winograd=False) -> Tensor");
  m.def(
      "conv2d_packed(Tensor x, Tensor packed, Tensor? residual, int out_channels, int[] kernel_size, int[] stride,"
      " int[] padding, int[] dilation, int activation, int backend=0) -> Tensor");

  // <op>_stats, for training beside batch normalisation: the op of pre_activation(x * scale + shift), scale and shift (C)
  // of the arithmetic's dtype, without an activation at the end; y, and its sums and sums of squares by channel
  m.def(
      "conv2d_stats(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int[] stride, int[] padding,"
      " int[] dilation, int pre_activation, int backend=0) -> (Tensor, Tensor, Tensor)");
  // gradients of x, weight, bias, scale, shift
  m.def(
      "conv2d_stats_backward(Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor weight, Tensor? bias,"
      " Tensor? scale, Tensor? shift, Tensor y, int[] stride, int[] padding, int[] dilation, int pre_activation,"
      " int output_mask, int backend=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // y = activation(conv1x1(x * gate, weight, stride) + bias + residual);  weight (K, C, 1, 1), bias (K), gate
  // (N, C, 1, 1), residual like y
  m.def(
      "pointwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? residual, int[] stride,"
      " int activation, int backend=0) -> Tensor");
  // gradients of x, weight, bias, gate, residual
  m.def(
      "pointwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? residual,"
      " int[] stride, int activation, int output_mask, int backend=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_pointwise_conv2d(Tensor weight, Tensor? bias, Tensor? scale=None) -> Tensor");
  m.def(
      "pointwise_conv2d_packed(Tensor x, Tensor packed, Tensor? gate, Tensor? residual, int out_channels,"
      " int[] stride, int activation, int backend=0) -> Tensor");
  m.def(
      "pointwise_conv2d_stats(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int[] stride,"
      " int pre_activation, int backend=0) -> (Tensor, Tensor, Tensor)");
  // gradients of x, weight, bias, scale, shift
  m.def(
      "pointwise_conv2d_stats_backward(Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor weight,"
      " Tensor? bias, Tensor? scale, Tensor? shift, Tensor y, int[] stride, int pre_activation, int output_mask,"
      " int backend=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // y = activation(x * scale + shift + residual), what batch normalisation is behind <op>_stats; scale and shift (C) of the
  // arithmetic's dtype, residual like y
  m.def("scale_shift(Tensor x, Tensor scale, Tensor shift, Tensor? residual, int activation, int backend=0) -> Tensor");
  // gradients of x, scale, shift, residual
  m.def(
      "scale_shift_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor? residual, int activation,"
      " int output_mask, int backend=0) -> (Tensor, Tensor, Tensor, Tensor)");
  // F.max_pool2d of activation(x * scale + shift) by max_pool (kernel, stride, padding), and, uint8, which of its window's
  // pixels each result is
  m.def(
      "scale_shift_max_pool(Tensor x, Tensor scale, Tensor shift, int[] max_pool, int activation, int backend=0)"
      " -> (Tensor, Tensor)");
  // gradients of x, scale, shift
  m.def(
      "scale_shift_max_pool_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor taps, int[] max_pool,"
      " int activation, int output_mask, int backend=0) -> (Tensor, Tensor, Tensor)");
  // squeeze_excite of z = activation(x * scale + shift): y = z * gates
  m.def(
      "scale_shift_excite(Tensor x, Tensor scale, Tensor shift, Tensor reduce_weight, Tensor? reduce_bias,"
      " Tensor expand_weight, Tensor? expand_bias, int activation, int se_activation, int gate_activation,"
      " int backend=0) -> Tensor");
  // gradients of the tensors, in that order
  m.def(
      "scale_shift_excite_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor reduce_weight,"
      " Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, int activation, int se_activation,"
      " int gate_activation, int output_mask, int backend=0)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Batch normalisation from a convolution's sum and sum of squares (C): scale = weight / sqrt(var + eps) and shift = bias -
  // mean * scale; the mean; the unbiased variance. All of the arithmetic's dtype; y's shape tells how many values are in a
  // sum.
  m.def(
      "batch_norm_scale_shift(Tensor y, Tensor sum, Tensor squares, Tensor? weight, Tensor? bias, float eps,"
      " int backend=0) -> (Tensor, Tensor, Tensor, Tensor)");
  // gradients of sum, squares, weight, bias
  m.def(
      "batch_norm_scale_shift_backward(Tensor grad_scale, Tensor grad_shift, Tensor y, Tensor sum, Tensor squares,"
      " Tensor? weight, float eps, int backend=0) -> (Tensor, Tensor, Tensor, Tensor)");

  // y = x / (k + alpha / size * sum of x^2 over `size` neighbouring channels, size / 2 of them before) ** beta
  m.def("local_response_norm(Tensor x, int size, float alpha, float beta, float k, int backend=0) -> Tensor");
  // gradient of x
  m.def(
      "local_response_norm_backward(Tensor grad, Tensor x, int size, float alpha, float beta, float k, int backend=0)"
      " -> Tensor");

  // t = mid_activation(depthwise(pre_activation(x), dw_weight) + dw_bias)
  // y = activation(conv1x1(t, pw_weight) + pw_bias + residual)
  // or, with pointwise_first, t = mid_activation(conv1x1(pre_activation(x), pw_weight) + pw_bias)
  // y = activation(depthwise(t, dw_weight) + dw_bias + residual)
  m.def(
      "separable_conv2d(Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor pw_weight, Tensor? pw_bias,"
      " Tensor? residual, int[] stride, int[] padding, int[] dilation, bool pointwise_first, int pre_activation,"
      " int mid_activation, int activation, int backend=0) -> Tensor");
  // gradients of x, dw_weight, dw_bias, pw_weight, pw_bias, residual
  m.def(
      "separable_conv2d_backward(Tensor grad, Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor pw_weight,"
      " Tensor? pw_bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, bool pointwise_first,"
      " int pre_activation, int mid_activation, int activation, int output_mask, int backend=0)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pack_separable_conv2d(Tensor dw_weight, Tensor? dw_bias, Tensor pw_weight, Tensor? pw_bias,"
      " bool pointwise_first, Tensor? dw_scale=None, Tensor? pw_scale=None) -> Tensor");
  m.def(
      "separable_conv2d_packed(Tensor x, Tensor packed, Tensor? residual, int out_channels, int[] kernel_size,"
      " int[] stride, int[] padding, int[] dilation, bool pointwise_first, int pre_activation, int mid_activation,"
      " int activation, int[] max_pool, int backend=0) -> Tensor");
  m.def(
      "separable_conv2d_stats(Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor pw_weight, Tensor? pw_bias,"
      " Tensor? scale, Tensor? shift, int[] stride, int[] padding, int[] dilation, int pre_activation,"
      " int mid_activation, int backend=0) -> (Tensor, Tensor, Tensor)");
  // gradients of x, dw_weight, dw_bias, pw_weight, pw_bias, scale, shift
  m.def(
      "separable_conv2d_stats_backward(Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor dw_weight,"
      " Tensor? dw_bias, Tensor pw_weight, Tensor? pw_bias, Tensor? scale, Tensor? shift, Tensor y, int[] stride,"
      " int[] padding, int[] dilation, int pre_activation, int mid_activation, int output_mask, int backend=0)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // gates = gate_activation(conv1x1(activation(conv1x1(mean of x over pixels, reduce_weight) + reduce_bias),
  // expand_weight) + expand_bias);  y = post_activation(x * gates + residual)
  m.def(
      "squeeze_excite(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias,"
      " Tensor? residual, int activation, int gate_activation, int post_activation, int backend=0) -> Tensor");
  // gradients of x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual
  m.def(
      "squeeze_excite_backward(Tensor grad, Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight,"
      " Tensor? expand_bias, Tensor? residual, int activation, int gate_activation, int post_activation,"
      " int output_mask, int backend=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pack_squeeze_excite(Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias)"
      " -> Tensor");
  m.def(
      "squeeze_excite_packed(Tensor x, Tensor packed, Tensor? residual, int activation, int gate_activation,"
      " int post_activation, int backend=0) -> Tensor");

  // e = activation(conv1x1(x, expand_weight) + expand_bias), or x without expand_weight
  // d = activation(depthwise(e, dw_weight) + dw_bias), with se_ weights times the gates of squeeze_excite(d)
  // y = conv1x1(d, project_weight) + project_bias + residual
  m.def(
      "inverted_residual(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor dw_weight, Tensor? dw_bias,"
      " Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight, Tensor? se_expand_bias,"
      " Tensor project_weight, Tensor? project_bias, Tensor? residual, int[] stride, int[] padding, int[] dilation,"
      " int activation, int se_activation, int gate_activation, int backend=0) -> Tensor");
  // gradients of the tensors, in that order
  m.def(
      "inverted_residual_backward(Tensor grad, Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor dw_weight,"
      " Tensor? dw_bias, Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight,"
      " Tensor? se_expand_bias, Tensor project_weight, Tensor? project_bias, Tensor? residual, int[] stride,"
      " int[] padding, int[] dilation, int activation, int se_activation, int gate_activation, int output_mask,"
      " int backend=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
      " Tensor)");
  m.def(
      "pack_inverted_residual(Tensor? expand_weight, Tensor? expand_bias, Tensor dw_weight, Tensor? dw_bias,"
      " Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight, Tensor? se_expand_bias,"
      " Tensor project_weight, Tensor? project_bias, Tensor? expand_scale=None, Tensor? dw_scale=None,"
      " Tensor? project_scale=None) -> Tensor");
  m.def(
      "inverted_residual_packed(Tensor x, Tensor packed, Tensor? residual, int expanded_channels, int out_channels,"
      " int[] kernel_size, int[] stride, int[] padding, int[] dilation, int activation, int se_activation,"
      " int gate_activation, int backend=0) -> Tensor");

  // packed ops one after the other; program as csrc/cpu/packed_sequence.cpp reads it
  m.def("packed_sequence(Tensor x, Tensor[] packed, Tensor program) -> Tensor");
}
