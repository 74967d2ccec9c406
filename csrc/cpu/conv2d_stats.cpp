// conv2d_stats on the CPU: ATen's convolution of pre_activation(x * scale + shift), then the sums of its channels.
// Bytes: with a prologue its result is a tensor of x's size, since ATen can't be handed a tile; the sums read y once more,
// band by band.
#include "channels.h"
#include "ops.h"

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
  return stats_backward(grad, grad_sum, grad_squares, x, weight, bias, scale, shift, y, pre_activation, output_mask,
                        [&](const Tensor& g, const Tensor& input, const Tensor& w, const Maybe& b, int64_t mask) {
                          const auto [dinput, dw, db, dresidual] = conv2d_backward(g, input, w, b, std::nullopt, stride,
                                                                                   padding, dilation, 0, mask, backend);
                          return std::tuple(dinput, dw, db);
                        });
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("conv2d_stats", TORCH_BOX(&cnnfast::cpu::conv2d_stats));
  m.impl("conv2d_stats_backward", TORCH_BOX(&cnnfast::cpu::conv2d_stats_backward));
}
