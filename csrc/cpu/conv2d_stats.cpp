// conv2d_stats on the CPU: ATen's convolution of pre_activation(x * scale + shift), then the sums of its channels.
// Bytes: with a prologue its result is a tensor of x's size, since ATen can't be handed a tile; the sums read y once more,
// band by band. Backward what comes to y is a tensor of y's size, in y's dtype, as PyTorch's batch normalisation makes it.
#include "ops.h"
#include "scale_shift.h"

namespace cnnfast::cpu {

std::tuple<Tensor, Tensor, Tensor> conv2d_stats(Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
                                                Ints stride, Ints padding, Ints dilation, int64_t pre_activation,
                                                int64_t backend) {
  check_scale_shift(scale, shift, x);
  const Prologue prologue = prologue_of(scale, shift, pre_activation);
  const Tensor input = prologue.any() && x.numel() > 0 ? scaled_channels(channels_last(x), prologue.scale,
                                                                         prologue.shift, std::nullopt, pre_activation)
                                                       : x;
  const Tensor y = conv2d(in_format_of(x, input), weight, bias, std::nullopt, stride, padding, dilation, 0, backend);
  BandSums sums(channels_last(y), true);
  for_each(sums.count(), [&](int64_t i) { sums.add(i); });
  return {y, sums.sum(), sums.squares()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv2d_stats_backward(
    Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
    Tensor y, Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t output_mask, int64_t backend) {
  const Scaled of(x, scale, shift, pre_activation);
  const Prologue prologue = prologue_of(scale, shift, pre_activation);
  const Tensor input =
      prologue.any() ? scaled_channels(of.x, prologue.scale, prologue.shift, std::nullopt, pre_activation) : of.x;
  const Tensor g =
      scaled_channels(channels_last(y), twice(grad_squares), per_channel(Maybe(grad_sum)), channels_last(grad), 0);
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  const bool wants_input = bit(0) || bit(3) || bit(4);
  auto [dx, dweight, dbias, dresidual] = conv2d_backward(g, input, weight, bias, std::nullopt, stride, padding,
                                                         dilation, 0, (output_mask & 6) | wants_input, backend);
  Tensor dscale = no_gradient(scale ? *scale : x), dshift = no_gradient(shift ? *shift : x);
  if (prologue.any() && wants_input) {
    const ScaledGradients gradients =
        scale_shift_gradients(channels_last(dx), of, std::nullopt, std::nullopt, std::nullopt, bit(0), false);
    dx = gradients.x;
    if (bit(3) && scale) dscale = gradients.scale;
    if (bit(4) && shift) dshift = gradients.shift;
  }
  return {bit(0) ? image_gradient(x, dx) : no_gradient(x), dweight, dbias, dscale, dshift};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("conv2d_stats", TORCH_BOX(&cnnfast::cpu::conv2d_stats));
  m.impl("conv2d_stats_backward", TORCH_BOX(&cnnfast::cpu::conv2d_stats_backward));
}
