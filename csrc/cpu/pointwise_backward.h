// The gradients of conv1x1(activation(x * scale + shift), weight), with those of the sums of its result on the way in.
#pragma once
#include "channels.h"
#include "common.h"

namespace cnnfast::cpu {

// What comes in. Images are channels_last; scale, shift and what sums have are (C) or (K), of the compute type.
struct PointwiseGradientsOf {
  Tensor grad;  // of y
  // Where y's sums have gradients: g = grad + grad_sum + y * twice_grad_squares; y of grad's dtype.
  Maybe y, grad_sum, twice_grad_squares;
  Tensor x;       // as large as grad
  Tensor weight;  // (K, C, 1, 1)
  Maybe scale, shift;
  int64_t pre_activation;
  // Whether g and the product's input may be rounded to bfloat16 where all are.
  bool may_round;

  // The gradients of y's sums, as the ops take them.
  void with_sums(const Tensor& sum, const Tensor& squares, const Tensor& image);
};

// Which are wanted, and then they themselves: x's of x's dtype, the others of the compute type.
struct PointwiseGradients {
  bool x_wanted, weight_wanted, bias_wanted, scale_wanted, shift_wanted;
  Maybe x, weight, bias, scale, shift;

  // What an op returns for a parameter: the gradient in its dtype, or none.
  static Tensor of(const Tensor& parameter, const Maybe& gradient);
};
void pointwise_backward(const PointwiseGradientsOf& of, PointwiseGradients& gradients);

}  // namespace cnnfast::cpu
