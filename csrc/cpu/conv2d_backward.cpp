// Gradients of conv2d: ATen's convolution_backward, and around it what an activation, a bias and a residual have, as tensors.
#include "channels.h"
#include "conv2d_aten.h"
#include "ops.h"

namespace cnnfast::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                           Maybe residual, Ints stride, Ints padding, Ints dilation,
                                                           int64_t activation_code, int64_t output_mask,
                                                           int64_t backend) {
  check_backend(backend);
  check_conv2d_weight(weight, x);
  const bool bias_wanted = output_mask & 4 && bias;
  // In bfloat16 ATen adds up in float32; what else there is to compute isn't rounded.
  const bool as_stored = storage_of(x, "x") == Storage::bf16 && activation_code == 0 && !bias_wanted;
  const ScalarType dtype = as_stored ? x.scalar_type() : compute_dtype(storage_of(x, "x"));
  const Conv conv = conv_of(x, weight.size(2), weight.size(3), stride, padding, dilation);
  const AtenConv aten_conv(conv);
  check_residual(grad, grad, conv.n, weight.size(0), conv.out_h, conv.out_w);
  const Tensor xs = channels_last(to_dtype(x, dtype)), ws = to_dtype(weight, dtype);
  Tensor g = channels_last(to_dtype(grad, dtype));
  Tensor bias_sums;
  if (activation_code != 0 || bias_wanted) {
    const Tensor z = activation_code == 0 ? g
                                          : conv2d(xs, ws, to_dtype(bias, dtype), to_dtype(residual, dtype), stride,
                                                   padding, dilation, 0, 0);
    g = activation_backward(g, z, activation_code, bias_wanted ? &bias_sums : nullptr);
  }
  Tensor dx = no_gradient(x), dweight = no_gradient(weight), dbias = no_gradient(bias ? *bias : weight);
  Tensor dresidual = no_gradient(residual ? *residual : x);
  const Tensor padded = output_mask & 3 ? aten_conv.pad(xs) : xs;
  if (output_mask & 1)
    dx = as_if_empty(x, to_dtype(aten_conv.unpad(aten_conv.backward(g, padded, ws, false)), x.scalar_type()));
  if (output_mask & 2)
    dweight = weight_gradient(weight, torch::stable::contiguous(aten_conv.backward(g, padded, ws, true)));
  if (bias_wanted) dbias = weight_gradient(*bias, bias_sums);
  if (output_mask & 8 && residual) dresidual = image_gradient(*residual, g);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) { m.impl("conv2d_backward", TORCH_BOX(&cnnfast::cpu::conv2d_backward)); }
