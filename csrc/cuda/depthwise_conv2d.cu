// cnnfast_cuda::depthwise_conv2d, its gradients and its packed form: checks, device guard, stream, dtype -> launcher.
#include "depthwise_conv2d.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "tensors.h"

namespace cnnfast::cuda {
namespace {

DepthwiseShape make_shape(const Tensor& x, int64_t out_channels, const Ints& kernel, const Ints& stride,
                          const Ints& padding, const Ints& dilation) {
  check_image(x, "x");
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && dilation.size() == 2,
                  "kernel_size, stride and dilation are [vertical, horizontal]");
  STD_TORCH_CHECK(padding.size() <= 1 || padding.size() == 4,
                  "padding is [top, bottom, left, right], or [-1] for 'same'");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(channels > 0 && out_channels > 0 && out_channels % channels == 0 && out_channels < (1 << 29),
                  "weight has ", out_channels, " output channels; a multiple of x's ", channels, " is wanted");
  const int64_t* pads = padding.size() <= 1 ? nullptr : padding.data();
  const Axis vertical = output_axis(x.size(2), kernel[0], stride[0], dilation[0], pads);
  const Axis horizontal = output_axis(x.size(3), kernel[1], stride[1], dilation[1], pads ? pads + 2 : nullptr);
  STD_TORCH_CHECK(kernel[0] * kernel[1] < (1 << 29), "the kernel has ", kernel[0] * kernel[1], " taps");
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };  // output_axis has checked the range
  DepthwiseShape s{};
  s.batch = x.size(0);
  s.channels = narrow(channels);
  s.multiplier = narrow(out_channels / channels);
  s.height = narrow(x.size(2));
  s.width = narrow(x.size(3));
  s.out_height = vertical.out;
  s.out_width = horizontal.out;
  s.kernel_h = narrow(kernel[0]);
  s.kernel_w = narrow(kernel[1]);
  s.stride_h = narrow(stride[0]);
  s.stride_w = narrow(stride[1]);
  s.pad_top = vertical.before;
  s.pad_left = horizontal.before;
  s.dilation_h = narrow(dilation[0]);
  s.dilation_w = narrow(dilation[1]);
  s.channels_last = image_format(x) == MemoryFormat::ChannelsLast;
  return s;
}

void check_activation(int64_t code, const char* name) {
  STD_TORCH_CHECK(code >= kIdentity && code <= kRelu6, name, " is ", code, "; 0 identity, 1 relu or 2 relu6 is wanted");
}

// A weight as PyTorch has it, (C * multiplier, 1, kh, kw), contiguous.
struct Weights {
  Tensor weight;
  std::optional<Tensor> bias;

  Weights(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b) : weight(torch::stable::contiguous(w)) {
    check_parameter(w, x, "weight", false);
    STD_TORCH_CHECK(w.dim() == 4 && w.size(1) == 1, "weight has to be (C * multiplier, 1, kh, kw)");
    if (!b) return;
    check_parameter(*b, x, "bias", true);
    STD_TORCH_CHECK(b->dim() == 1 && b->size(0) == w.size(0), "bias has to be (C * multiplier)");
    bias = torch::stable::contiguous(*b);
  }

  Parameter weight_parameter() const {
    return {weight.data_ptr(), weight.scalar_type() == ScalarType::Float, weight.size(2) * weight.size(3), 1};
  }
  Parameter bias_parameter() const {
    if (!bias) return {};
    return {bias->data_ptr(), bias->scalar_type() == ScalarType::Float, 1, 0};
  }
};

// Calls f with a value of the C++ type that x's dtype stores.
template <class F>
void with_type(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "x's dtype has to be float32, float64, bfloat16 or float16");
  }
}

Tensor forward(const Tensor& x_any, const DepthwiseShape& s, const Parameter& weight, const Parameter& bias,
               const PackedCheck& packed, int64_t pre_activation, int64_t activation) {
  check_activation(pre_activation, "pre_activation");
  check_activation(activation, "activation");
  const DeviceGuard guard(x_any.get_device_index());
  const MemoryFormat format = image_format(x_any);
  const Tensor x = torch::stable::contiguous(x_any, format);
  const Tensor y = empty_like(x, {s.batch, s.out_channels(), s.out_height, s.out_width}, format);
  with_type(x, [&]<class T>(T) {
    depthwise_conv2d_forward<T>(
        {static_cast<const T*>(x.data_ptr()), weight, bias, packed, nullptr, static_cast<T*>(y.data_ptr()), s,
         static_cast<int>(pre_activation), static_cast<int>(activation)},
        current_stream(x));
  });
  return y;
}

Tensor depthwise_conv2d_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                           Ints padding, Ints dilation, int64_t pre_activation, int64_t activation) {
  const Weights w(x, weight, bias);
  const DepthwiseShape s = make_shape(x, weight.size(0), {weight.size(2), weight.size(3)}, stride, padding, dilation);
  return forward(x, s, w.weight_parameter(), w.bias_parameter(), {}, pre_activation, activation);
}

Tensor depthwise_conv2d_packed_op(const Tensor& x, const Tensor& packed, int64_t out_channels, Ints kernel_size,
                                  Ints stride, Ints padding, Ints dilation, int64_t pre_activation,
                                  int64_t activation) {
  const DepthwiseShape s = make_shape(x, out_channels, kernel_size, stride, padding, dilation);
  const int itemsize = x.scalar_type() == ScalarType::Double ? 8 : 4;
  const int64_t bytes = packed_bytes(PackedOp::depthwise_conv2d, s.channels, out_channels, out_channels, s.kernel_h,
                                     s.kernel_w, itemsize);
  STD_TORCH_CHECK(on_device(packed) && packed.get_device_index() == x.get_device_index() &&
                      packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(),
                  "packed has to be what pack_depthwise_conv2d returned, on x's device");
  STD_TORCH_CHECK(packed.numel() == bytes, "packed has ", packed.numel(), " bytes; weights of ", out_channels,
                  " channels and ", s.taps(), " taps take ", bytes);
  const PackedWeights p = packed_weights(packed.data_ptr(), s, itemsize);
  return forward(x, s, p.weight, p.bias, p.check, pre_activation, activation);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_op(const Tensor& grad_any, const Tensor& x_any,
                                                                const Tensor& weight, const std::optional<Tensor>& bias,
                                                                Ints stride, Ints padding, Ints dilation,
                                                                int64_t pre_activation, int64_t activation,
                                                                int64_t output_mask) {
  const Weights w(x_any, weight, bias);
  const DepthwiseShape s =
      make_shape(x_any, weight.size(0), {weight.size(2), weight.size(3)}, stride, padding, dilation);
  check_activation(pre_activation, "pre_activation");
  check_activation(activation, "activation");
  check_image(grad_any, "grad");
  check_parameter(grad_any, x_any, "grad", false);
  STD_TORCH_CHECK(grad_any.size(0) == s.batch && grad_any.size(1) == s.out_channels() &&
                      grad_any.size(2) == s.out_height && grad_any.size(3) == s.out_width,
                  "grad has to be of the output's shape");
  const DeviceGuard guard(x_any.get_device_index());
  const MemoryFormat format = image_format(x_any);
  const Tensor x = torch::stable::contiguous(x_any, format);
  const Tensor grad = torch::stable::contiguous(grad_any, format);
  const bool want_x = output_mask & 1, want_weight = output_mask & 2, want_bias = (output_mask & 4) && bias;

  const Tensor none = empty_1d(x, 0, x.scalar_type());  // not wanted
  const Tensor dx = want_x ? empty_like(x, {s.batch, s.channels, s.height, s.width}, format) : none;
  const Tensor dweight =
      want_weight ? empty_like(x, {weight.size(0), 1, s.kernel_h, s.kernel_w}, MemoryFormat::Contiguous) : none;
  const Tensor dbias = bias ? empty_1d(x, want_bias ? s.out_channels() : 0, bias->scalar_type()) : none;
  with_type(x, [&]<class T>(T) {
    const Workspace<T> workspace = depthwise_conv2d_workspace<T>(s, static_cast<int>(activation));
    const Tensor masked =
        workspace.masked ? empty_like(grad, {s.batch, s.out_channels(), s.out_height, s.out_width}, format) : none;
    const Tensor partial = empty_1d(x, want_weight || want_bias ? workspace.sums : 0,
                                    sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
    BackwardArguments<T> a;
    a.gradient = static_cast<const T*>(grad.data_ptr());
    a.x = static_cast<const T*>(x.data_ptr());
    a.weight = w.weight_parameter();
    a.bias = w.bias_parameter();
    a.shape = s;
    a.pre_activation = static_cast<int>(pre_activation);
    a.activation = static_cast<int>(activation);
    a.masked = static_cast<T*>(masked.data_ptr());
    a.partial = static_cast<Accumulate<T>*>(partial.data_ptr());
    if (want_x) a.dx = static_cast<T*>(dx.data_ptr());
    if (want_weight) a.dweight = static_cast<T*>(dweight.data_ptr());
    if (want_bias) a.dbias = dbias.data_ptr();
    depthwise_conv2d_backward(a, current_stream(x));
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace cnnfast::cuda

#ifndef CNNFAST_CUDA_HOST
STABLE_TORCH_LIBRARY_IMPL(cnnfast_cuda, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_op));
  m.impl("depthwise_conv2d_packed", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_packed_op));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_backward_op));
}
#endif
