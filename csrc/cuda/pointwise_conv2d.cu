// cnnfast_cuda::pointwise_conv2d: checks, memory formats, device guard, stream, dtype -> launcher.
#include "pointwise_conv2d.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "tensors.h"

namespace cnnfast::cuda {
namespace {

PointwiseShape make_shape(const Tensor& x, const Tensor& weight, const Ints& stride) {
  check_image(x, "x");
  check_parameter(weight, x, "weight", false);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1,
                  "weight has to be (out_channels, ", x.size(1), ", 1, 1)");
  STD_TORCH_CHECK(stride.size() == 2, "stride has ", stride.size(), " numbers; [vertical, horizontal] is wanted");
  constexpr int64_t kLargest = 1 << 29;
  const auto checked = [](int64_t value, const char* name) {
    STD_TORCH_CHECK(value >= 1 && value <= kLargest, name, " is ", value, "; 1 to 2^29 is wanted");
    return static_cast<int>(value);
  };
  PointwiseShape s{};
  s.batch = x.size(0);
  s.channels = checked(x.size(1), "x's number of channels");
  s.out_channels = checked(weight.size(0), "weight's number of output channels");
  s.height = checked(x.size(2), "x's height");
  s.width = checked(x.size(3), "x's width");
  s.stride_h = checked(stride[0], "stride[0]");
  s.stride_w = checked(stride[1], "stride[1]");
  s.out_height = ceil_div(s.height, s.stride_h);
  s.out_width = ceil_div(s.width, s.stride_w);
  return s;
}

// A tensor as the kernels take it; none where there is none.
using Optional = std::optional<Tensor>;
template <class T>
const T* data_of(const Optional& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

template <class T>
void run(const PointwiseShape& s, const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& gate,
         const Optional& residual, const Tensor& y, int64_t activation, bool tf32) {
  PointwiseArguments<T> a;
  a.x = static_cast<const T*>(x.data_ptr());
  a.weight = static_cast<const T*>(weight.data_ptr());
  a.bias = data_of<void>(bias);
  a.bias_float32 = bias && bias->scalar_type() == ScalarType::Float;
  a.gate = data_of<T>(gate);
  a.residual = data_of<T>(residual);
  a.y = static_cast<T*>(y.data_ptr());
  a.shape = s;
  a.activation = static_cast<int>(activation);
  a.tf32 = tf32;
  pointwise_conv2d_forward(a, current_stream(x));
}

Tensor pointwise_conv2d_op(const Tensor& x_any, const Tensor& weight_any, const Optional& bias_any,
                           const Optional& gate_any, const Optional& residual_any, Ints stride, int64_t activation,
                           bool tf32) {
  const PointwiseShape s = make_shape(x_any, weight_any, stride);
  STD_TORCH_CHECK(activation >= kIdentity && activation <= kLastActivation, "activation is ", activation,
                  "; a code from 0 to ", static_cast<int>(kLastActivation), " is wanted");
  if (bias_any) {
    check_parameter(*bias_any, x_any, "bias", true);
    STD_TORCH_CHECK(bias_any->dim() == 1 && bias_any->size(0) == s.out_channels, "bias has to be (", s.out_channels,
                    ")");
  }
  const auto check_like = [&](const Optional& tensor, const char* name, const Ints& size) {
    if (!tensor) return;
    check_parameter(*tensor, x_any, name, false);
    STD_TORCH_CHECK(tensor->dim() == 4 && tensor->size(0) == size[0] && tensor->size(1) == size[1] &&
                        tensor->size(2) == size[2] && tensor->size(3) == size[3],
                    name, " has to be (", size[0], ", ", size[1], ", ", size[2], ", ", size[3], ")");
  };
  const Ints y_size{s.batch, s.out_channels, s.out_height, s.out_width};
  check_like(gate_any, "gate", {s.batch, s.channels, 1, 1});
  check_like(residual_any, "residual", y_size);

  const DeviceGuard guard(x_any.get_device_index());
  const auto contiguous = [](const Optional& tensor, MemoryFormat format) {
    return tensor ? Optional(torch::stable::contiguous(*tensor, format)) : std::nullopt;
  };
  const Tensor x = torch::stable::contiguous(x_any, MemoryFormat::ChannelsLast);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const Optional bias = contiguous(bias_any, MemoryFormat::Contiguous),
                 gate = contiguous(gate_any, MemoryFormat::Contiguous),
                 residual = contiguous(residual_any, MemoryFormat::ChannelsLast);
  const MemoryFormat format = image_format(x_any);
  Tensor y = empty_like(x, y_size, format);
  // NHWC is what the kernels write; where it isn't what is wanted, and not the same either, through a copy.
  const bool copied = format != MemoryFormat::ChannelsLast && s.image() > 1 && s.out_channels > 1;
  const Tensor written = copied ? empty_like(x, y_size, MemoryFormat::ChannelsLast) : y;
  const auto run_as = [&]<class T>(T) { run<T>(s, x, weight, bias, gate, residual, written, activation, tf32); };
  switch (x.scalar_type()) {
    case ScalarType::Float: run_as(float{}); break;
    case ScalarType::Half: run_as(__half{}); break;
    case ScalarType::BFloat16: run_as(__nv_bfloat16{}); break;
    default: STD_TORCH_CHECK(false, "x's dtype has to be float32, bfloat16 or float16");
  }
  if (copied) torch::stable::copy_(y, written);
  return y;
}

}  // namespace
}  // namespace cnnfast::cuda

#ifndef CNNFAST_CUDA_HOST
STABLE_TORCH_LIBRARY_IMPL(cnnfast_cuda, CUDA, m) {
  m.impl("pointwise_conv2d", TORCH_BOX(&cnnfast::cuda::pointwise_conv2d_op));
}
#endif
