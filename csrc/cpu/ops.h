// The ops on the CPU as plain functions: registered in their own files, and called by one another's backward.
#pragma once
#include "common.h"

namespace cnnfast::cpu {

Tensor depthwise_conv2d(Tensor x, Tensor weight, Maybe bias, Ints stride, Ints padding, Ints dilation,
                        int64_t pre_activation, int64_t activation, int64_t backend);
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                             Ints stride, Ints padding, Ints dilation,
                                                             int64_t pre_activation, int64_t activation,
                                                             int64_t output_mask, int64_t backend);
Tensor pointwise_conv2d(Tensor x, Tensor weight, Maybe bias, Maybe residual, Ints stride, int64_t activation,
                        int64_t backend);
std::tuple<Tensor, Tensor, Tensor, Tensor> pointwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                                     Maybe residual, Ints stride, int64_t activation,
                                                                     int64_t output_mask, int64_t backend);

// grad * activation'(z), a new tensor in channels_last; both of the compute type.
Tensor activation_backward(const Tensor& grad, const Tensor& z, int64_t activation);
// A gradient computed in the compute type, in the dtype (and for images the format) of the tensor that it belongs to.
Tensor image_gradient(const Tensor& of, const Tensor& gradient);
Tensor weight_gradient(const Tensor& of, const Tensor& gradient);

}  // namespace cnnfast::cpu
