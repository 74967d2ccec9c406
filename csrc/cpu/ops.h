// The ops on the CPU as plain functions: registered in their own files, and called by one another's backward.
#pragma once
#include "channels.h"
#include "common.h"

namespace cnnfast::cpu {

Tensor conv2d(Tensor x, Tensor weight, Maybe bias, Maybe residual, Ints stride, Ints padding, Ints dilation,
              int64_t activation, int64_t backend);
std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                           Maybe residual, Ints stride, Ints padding, Ints dilation,
                                                           int64_t activation, int64_t output_mask, int64_t backend);
Tensor depthwise_conv2d(Tensor x, Tensor weight, Maybe bias, Ints stride, Ints padding, Ints dilation,
                        int64_t pre_activation, int64_t activation, int64_t backend);
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                             Ints stride, Ints padding, Ints dilation,
                                                             int64_t pre_activation, int64_t activation,
                                                             int64_t output_mask, int64_t backend);
// Of prologue(x), rows of which are only ever in scratch.
Tensor depthwise_conv2d_scaled(const Tensor& x, const Tensor& weight, const Maybe& bias, const Prologue& prologue,
                               const Ints& stride, const Ints& padding, const Ints& dilation);
Tensor pointwise_conv2d(Tensor x, Tensor weight, Maybe bias, Maybe gate, Maybe residual, Ints stride,
                        int64_t activation, int64_t backend);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight,
                                                                             Maybe bias, Maybe gate, Maybe residual,
                                                                             Ints stride, int64_t activation,
                                                                             int64_t output_mask, int64_t backend);
std::tuple<Tensor, Tensor, Tensor> pointwise_conv2d_stats(Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
                                                          Ints stride, int64_t pre_activation, int64_t backend);
Tensor conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints kernel_size, Ints stride,
                     Ints padding, Ints dilation, int64_t activation, int64_t backend);
Tensor depthwise_conv2d_packed(Tensor x, Tensor packed, int64_t out_channels, Ints kernel_size, Ints stride,
                               Ints padding, Ints dilation, int64_t pre_activation, int64_t activation,
                               int64_t backend);
Tensor pointwise_conv2d_packed(Tensor x, Tensor packed, Maybe gate, Maybe residual, int64_t out_channels, Ints stride,
                               int64_t activation, int64_t backend);
Tensor separable_conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints kernel_size,
                               Ints stride, Ints padding, Ints dilation, bool pointwise_first, int64_t pre_activation,
                               int64_t mid_activation, int64_t activation, Ints max_pool, int64_t backend);
Tensor inverted_residual_packed(Tensor x, Tensor packed, Maybe residual, int64_t expanded_channels,
                                int64_t out_channels, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                                int64_t activation, int64_t se_activation, int64_t gate_activation, int64_t backend);
Tensor squeeze_excite_packed(Tensor x, Tensor packed, Maybe residual, int64_t activation, int64_t gate_activation,
                             int64_t post_activation, int64_t backend);
Tensor local_response_norm(Tensor x, int64_t size, double alpha, double beta, double k, int64_t backend);
// As PyTorch's, without dilation; steps of packed_sequence, no ops by themselves.
Tensor max_pool2d(Tensor x, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode);
Tensor avg_pool2d(Tensor x, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode, bool count_include_pad);
ImageSize pooled_size(const ImageSize& x, const Ints& kernel_size, const Ints& stride, const Ints& padding,
                      bool ceil_mode);
// Of separable_conv2d's max_pool: a kernel, a stride, a padding.
ImageSize max_pooled_size(const ImageSize& x, const Ints& max_pool);
// separable_conv2d with the pointwise stage first.
Tensor separable_conv2d_pointwise_first(const Tensor& x, const Tensor& packed, const Maybe& residual,
                                        int64_t out_channels, const Ints& kernel_size, const Ints& stride,
                                        const Ints& padding, const Ints& dilation, int64_t pre_activation,
                                        int64_t mid_activation, int64_t activation);

// A gradient computed in the compute type, in the dtype (and for images the format) of the tensor that it belongs to.
Tensor image_gradient(const Tensor& of, const Tensor& gradient);
Tensor weight_gradient(const Tensor& of, const Tensor& gradient);

}  // namespace cnnfast::cpu
