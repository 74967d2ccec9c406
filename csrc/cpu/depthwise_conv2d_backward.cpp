// Gradients of depthwise_conv2d, with its squeeze or its statistics, on the CPU: depthwise_backward.h does the work.
#include "depthwise_backward.h"
#include "ops.h"

namespace cnnfast::cpu {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_backward(const Tensor& grad, const Tensor& x,
                                                                      const Tensor& weight, const Maybe& bias,
                                                                      const Ints& stride, const Ints& padding,
                                                                      const Ints& dilation, const Around& around,
                                                                      int64_t output_mask) {
  const Conv conv = conv_of(x, weight.size(2), weight.size(3), stride, padding, dilation);
  STD_TORCH_CHECK(conv.c > 0 && weight.size(0) % conv.c == 0, "weight must have a multiple of x's channels ", conv.c);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == conv.n && grad.size(1) == weight.size(0) &&
                      grad.size(2) == conv.out_h && grad.size(3) == conv.out_w,
                  "grad must have the output's shape");
  const int64_t given = 3 | (bias ? 4 : 0) | (around.scale ? 8 : 0) | (around.shift ? 16 : 0);
  const DepthwiseBackward op(grad, x, weight, bias, conv, around, output_mask & given);
  const auto of = [&](Sum which, int bit, const Maybe& parameter) {
    const Tensor& like = parameter ? *parameter : x;
    return op.wants(bit) ? weight_gradient(like, op.sum(which)) : no_gradient(like);
  };
  return {op.wants(0) ? in_format_of(x, op.dx) : no_gradient(x), of(kWeight, 1, weight), of(kBias, 2, bias),
          of(kScale, 3, around.scale), of(kShift, 4, around.shift)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                             Ints stride, Ints padding, Ints dilation,
                                                             int64_t pre_activation, int64_t activation_code,
                                                             int64_t output_mask, int64_t backend) {
  check_backend(backend);
  Around around{};
  around.pre_activation = pre_activation;
  around.activation = activation_code;
  const auto [dx, dweight, dbias, dscale, dshift] =
      depthwise_backward(grad, x, weight, bias, stride, padding, dilation, around, output_mask);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_squeeze_backward(Tensor grad, Tensor grad_squeezed, Tensor x,
                                                                     Tensor weight, Maybe bias, Ints stride,
                                                                     Ints padding, Ints dilation,
                                                                     int64_t pre_activation, int64_t activation_code,
                                                                     int64_t output_mask, int64_t backend) {
  check_backend(backend);
  check_residual(grad_squeezed, grad_squeezed, grad.size(0), grad.size(1), 1, 1);
  Around around{};
  // A mean hands the same share of its gradient to each pixel.
  around.add = channel_sums(channels_last(to_dtype(grad_squeezed, compute_dtype(storage_of(x, "x")))), std::nullopt,
                            1.0 / static_cast<double>(grad.size(2) * grad.size(3)));
  around.pre_activation = pre_activation;
  around.activation = activation_code;
  const auto [dx, dweight, dbias, dscale, dshift] =
      depthwise_backward(grad, x, weight, bias, stride, padding, dilation, around, output_mask);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_conv2d_stats_backward(
    Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
    Tensor y, Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t output_mask, int64_t backend) {
  check_backend(backend);
  check_scale_shift(scale, shift, x);
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const Around around{.add = contiguous(to_dtype(Maybe(grad_sum), dtype)),
                      .y = channels_last(y),
                      .times = twice(to_dtype(grad_squares, dtype)),
                      .scale = contiguous(scale),
                      .shift = contiguous(shift),
                      .pre_activation = pre_activation,
                      .activation = 0};
  return depthwise_backward(grad, x, weight, bias, stride, padding, dilation, around, output_mask);
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_backward));
  m.impl("depthwise_conv2d_squeeze_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_squeeze_backward));
  m.impl("depthwise_conv2d_stats_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_stats_backward));
}
