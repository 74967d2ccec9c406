// The gradients of pointwise_conv2d and pointwise_conv2d_stats: pointwise_backward, and around it what is rare (strides,
// a gate, an activation after the product), as tensors.
#include <cstring>

#include "ops.h"
#include "pointwise_backward.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

// Copies the pixels that a stride reads, from an image to one of only those, or back.
void copy_sampled(const Conv& conv, int64_t pixel_bytes, const char* from, char* to, bool back) {
  for_each(pixel_bytes > 0 ? conv.n * conv.out_h : 0, [&](int64_t i) {
    const int64_t row = (i / conv.out_h * conv.h + i % conv.out_h * conv.window.stride_h) * conv.w;
    for (int64_t ow = 0; ow < conv.out_w; ++ow) {
      const int64_t whole = (row + ow * conv.window.stride_w) * pixel_bytes,
                    sampled = (i * conv.out_w + ow) * pixel_bytes;
      std::memcpy(to + (back ? whole : sampled), from + (back ? sampled : whole), pixel_bytes);
    }
  });
}

bool dense(const Conv& conv) { return conv.window.stride_h == 1 && conv.window.stride_w == 1; }

Tensor sampled(const Conv& conv, const Tensor& x) {
  if (dense(conv)) return x;
  const Tensor y = empty_channels_last(x, conv.n, conv.c, conv.out_h, conv.out_w, x.scalar_type());
  copy_sampled(conv, conv.c * static_cast<int64_t>(x.element_size()), bytes_of(x), mutable_bytes_of(y), false);
  return y;
}

// The gradient of x from that of its sampled pixels; the others are zeros.
Tensor spread(const Conv& conv, const Tensor& dx) {
  if (dense(conv)) return dx;
  Tensor whole = empty_channels_last(dx, conv.n, conv.c, conv.h, conv.w, dx.scalar_type());
  torch::stable::zero_(whole);
  copy_sampled(conv, conv.c * static_cast<int64_t>(dx.element_size()), bytes_of(dx), mutable_bytes_of(whole), true);
  return whole;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight,
                                                                             Maybe bias, Maybe gate, Maybe residual,
                                                                             Ints stride, int64_t activation_code,
                                                                             int64_t output_mask, int64_t backend) {
  check_backend(backend);
  const Conv conv = conv_of(x, 1, 1, stride, {0, 0, 0, 0}, {1, 1});
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == conv.c, "weight must have ", conv.c, " input channels");
  check_residual(grad, grad, conv.n, weight.size(0), conv.out_h, conv.out_w);
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const auto wanted = [&](int bit) { return (output_mask >> bit & 1) != 0; };
  Tensor g = channels_last(grad), input = channels_last(x);
  PointwiseGradients gradients{};
  gradients.x_wanted = wanted(0) || (gate && wanted(3));
  gradients.weight_wanted = wanted(1);
  gradients.bias_wanted = wanted(2) && bias;
  if (activation_code != 0) {
    const Tensor z = pointwise_conv2d(to_dtype(input, dtype), to_dtype(weight, dtype), to_dtype(bias, dtype), gate,
                                      to_dtype(residual, dtype), stride, 0, 0);
    Tensor sums;
    g = activation_backward(to_dtype(g, dtype), z, activation_code, gradients.bias_wanted ? &sums : nullptr);
    if (gradients.bias_wanted) gradients.bias = sums;
    gradients.bias_wanted = false;
  }
  const Maybe gates = gated(gate, x).scale;
  if (gate) input = to_dtype(input, dtype);
  const Tensor product_input = gate ? scaled_channels(input, gates, std::nullopt, std::nullopt, 0) : input;
  pointwise_backward({g, {}, {}, {}, sampled(conv, product_input), weight, {}, {}, 0, false}, gradients);
  Tensor dx = no_gradient(x), dgate = no_gradient(gate ? *gate : x), dresidual = no_gradient(residual ? *residual : x);
  if (gradients.x_wanted) {
    const Tensor whole = spread(conv, *gradients.x);
    if (gate && wanted(3)) dgate = weight_gradient(*gate, channel_sums(whole, input, 1));
    if (wanted(0)) dx = image_gradient(x, gate ? scaled_channels(whole, gates, std::nullopt, std::nullopt, 0) : whole);
  }
  if (wanted(4) && residual) dresidual = image_gradient(*residual, g);
  using G = PointwiseGradients;
  return {dx, G::of(weight, gradients.weight), G::of(bias ? *bias : weight, gradients.bias), dgate, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_conv2d_stats_backward(
    Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
    Tensor y, Ints stride, int64_t pre_activation, int64_t output_mask, int64_t backend) {
  check_backend(backend);
  check_scale_shift(scale, shift, x);
  const Conv conv = conv_of(x, 1, 1, stride, {0, 0, 0, 0}, {1, 1});
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == conv.c, "weight must have ", conv.c, " input channels");
  for (const Tensor& image : {grad, y}) check_residual(image, x, conv.n, weight.size(0), conv.out_h, conv.out_w);
  PointwiseGradientsOf of{
      channels_last(grad), {},  {}, {}, sampled(conv, channels_last(x)), weight, contiguous(scale), contiguous(shift),
      pre_activation,      true};
  of.with_sums(grad_sum, grad_squares, y);
  PointwiseGradients gradients{};
  gradients.x_wanted = output_mask & 1;
  gradients.weight_wanted = output_mask & 2;
  gradients.bias_wanted = output_mask & 4 && bias;
  gradients.scale_wanted = output_mask & 8 && scale;
  gradients.shift_wanted = output_mask & 16 && shift;
  pointwise_backward(of, gradients);
  using G = PointwiseGradients;
  return {gradients.x_wanted ? image_gradient(x, spread(conv, *gradients.x)) : no_gradient(x),
          G::of(weight, gradients.weight), G::of(bias ? *bias : x, gradients.bias),
          G::of(scale ? *scale : x, gradients.scale), G::of(shift ? *shift : x, gradients.shift)};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("pointwise_conv2d_backward", TORCH_BOX(&cnnfast::cpu::pointwise_conv2d_backward));
  m.impl("pointwise_conv2d_stats_backward", TORCH_BOX(&cnnfast::cpu::pointwise_conv2d_stats_backward));
}
