// csrc/cuda/depthwise_conv2d.cu on CPU tensors.
#include "library.h"

#include "cuda/depthwise_conv2d.cu"

HOST_LIBRARY(CNNFAST_HOST, m) {
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
      " int pre_activation, int activation) -> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
      " int[] dilation, int pre_activation, int activation, int output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "depthwise_conv2d_packed(Tensor x, Tensor packed, int out_channels, int[] kernel_size, int[] stride,"
      " int[] padding, int[] dilation, int pre_activation, int activation) -> Tensor");
}

HOST_LIBRARY_IMPL(CNNFAST_HOST, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_op));
  m.impl("depthwise_conv2d_packed", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_packed_op));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_backward_op));
}

template <template <int, int> class Traits, int K, int S>
std::string promise(const std::string& kernel) {
  using P = Traits<K, S>;
  return kernel + " " + std::to_string(K) + " " + std::to_string(S) + " strip=" + std::to_string(P::kStrip) +
         " loads_per_strip=" + std::to_string(P::kLoadsPerStrip) +
         " sectors_per_request=" + std::to_string(P::kSectorsPerRequest) +
         " registers=" + std::to_string(P::kMaxRegisters) + "\n";
}
template <template <int, int> class Traits>
std::string promises(const std::string& kernel) {
  return promise<Traits, 3, 1>(kernel) + promise<Traits, 3, 2>(kernel) + promise<Traits, 5, 1>(kernel) +
         promise<Traits, 5, 2>(kernel);
}

const char* host_promises() {
  using namespace cnnfast::cuda;
  static const std::string text = promises<ForwardTraits>("depthwise_conv2d_forward_kernel") +
                                  promises<InputGradientTraits>("depthwise_conv2d_input_gradient_kernel") +
                                  promises<WeightGradientTraits>("depthwise_conv2d_weight_gradient_kernel");
  return text.c_str();
}
