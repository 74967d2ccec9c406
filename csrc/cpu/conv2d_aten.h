// conv2d by ATen's convolution.
#pragma once
#include "common.h"

namespace cnnfast::cpu {

void check_conv2d_weight(const Tensor& weight, const Tensor& x);

// A convolution as ATen takes it: the same zeros on both sides, or of an x that has been padded or cropped to the windows.
class AtenConv {
 public:
  explicit AtenConv(const Conv& conv);
  // Whether oneDNN, ATen's engine, can be left it, of this type. With PyTorch 2.13 it returned garbage or crashed for an
  // output of one column at a stride above 1, and in bfloat16 and float16 for windows with gaps in or between them
  // (docs/decisions.md).
  bool trusted(Storage storage) const;

  Tensor forward(const Tensor& x, const Tensor& weight, const Maybe& bias) const;
  // The gradient of x (padded, where it has to be) or of the weight.
  Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool of_weight) const;
  // x with the windows' zeros around it, and the gradient of that back to x's size.
  Tensor pad(const Tensor& x) const;
  Tensor unpad(const Tensor& dx) const;

 private:
  Window window_;
  Ints stride_, dilation_, padding_;
  Ints edges_;   // left, right, top, bottom
  bool direct_;  // on x itself
};

// A result of ATen's in x's memory format, with the strides that torch::empty gives: ATen's may differ in dimensions of
// size 1.
Tensor as_if_empty(const Tensor& x, const Tensor& result);

}  // namespace cnnfast::cpu
