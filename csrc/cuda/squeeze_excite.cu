// cnnfast_cuda::squeeze_excite: checks, device guard, stream, dtype -> launcher.
#include "squeeze_excite.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "tensors.h"

namespace cnnfast::cuda {
namespace {

constexpr int64_t kLargestSize = 1 << 21;  // of C and R: what a grid holds

ExciteShape make_shape(const Tensor& x, const Tensor& reduce_weight) {
  check_image(x, "x");
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  STD_TORCH_CHECK(reduce_weight.dim() == 4 && reduce_weight.size(0) > 0 && reduce_weight.size(1) == channels &&
                      reduce_weight.size(2) == 1 && reduce_weight.size(3) == 1,
                  "reduce_weight has to be (R, C, 1, 1) with x's ", channels, " channels");
  const int64_t squeezed = reduce_weight.size(0);
  STD_TORCH_CHECK(channels <= kLargestSize && squeezed <= kLargestSize && pixels < (1 << 30), "x has ", channels,
                  " channels of ", pixels, " pixels, squeezed to ", squeezed, "; at most ", kLargestSize,
                  " channels and less than 2^30 pixels are wanted");
  ExciteShape s{};
  s.batch = x.size(0);
  s.channels = static_cast<int>(channels);
  s.squeezed = static_cast<int>(squeezed);
  s.pixels = static_cast<int>(pixels);
  s.channels_last = image_format(x) == MemoryFormat::ChannelsLast || pixels == 1;  // one pixel is in both formats
  return s;
}

// Dense, and what has to be kept while its pointer is in use.
struct Bias {
  std::optional<Tensor> tensor;

  Bias(const std::optional<Tensor>& b, const Tensor& x, const char* name, int64_t count) {
    if (!b) return;
    check_parameter(*b, x, name, true);
    STD_TORCH_CHECK(b->dim() == 1 && b->size(0) == count, name, " has to have ", count, " elements");
    tensor = torch::stable::contiguous(*b);
  }
  GateBias gate() const {
    if (!tensor) return {};
    return {tensor->data_ptr(), tensor->scalar_type() == ScalarType::Float};
  }
};

// Calls f with a value of the C++ type that x's dtype stores.
template <class F>
void with_type(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "x's dtype has to be float32, bfloat16 or float16");
  }
}

void check_code(int64_t code, const char* name) {
  STD_TORCH_CHECK(code >= kIdentity && code <= kLastActivation, name, " is ", code, "; 0 to ",
                  static_cast<int>(kLastActivation), " is wanted");
}

Tensor squeeze_excite_op(const Tensor& x_any, const Tensor& reduce_weight_any,
                         const std::optional<Tensor>& reduce_bias_any, const Tensor& expand_weight_any,
                         const std::optional<Tensor>& expand_bias_any, const std::optional<Tensor>& residual_any,
                         int64_t activation, int64_t gate_activation, int64_t post_activation) {
  const ExciteShape s = make_shape(x_any, reduce_weight_any);
  check_parameter(reduce_weight_any, x_any, "reduce_weight", false);
  check_parameter(expand_weight_any, x_any, "expand_weight", false);
  STD_TORCH_CHECK(expand_weight_any.dim() == 4 && expand_weight_any.size(0) == s.channels &&
                      expand_weight_any.size(1) == s.squeezed && expand_weight_any.size(2) == 1 &&
                      expand_weight_any.size(3) == 1,
                  "expand_weight has to be (C, R, 1, 1), C = ", s.channels, " and R = ", s.squeezed);
  const Bias reduce_bias(reduce_bias_any, x_any, "reduce_bias", s.squeezed);
  const Bias expand_bias(expand_bias_any, x_any, "expand_bias", s.channels);
  check_code(activation, "activation");
  check_code(gate_activation, "gate_activation");
  check_code(post_activation, "post_activation");

  const DeviceGuard guard(x_any.get_device_index());
  const MemoryFormat format = image_format(x_any);
  const Tensor x = torch::stable::contiguous(x_any, format);
  const Tensor reduce_weight = torch::stable::contiguous(reduce_weight_any);
  const Tensor expand_weight = torch::stable::contiguous(expand_weight_any);
  std::optional<Tensor> residual;
  if (residual_any) {
    check_parameter(*residual_any, x, "residual", false);
    STD_TORCH_CHECK(residual_any->dim() == 4 && residual_any->size(0) == x.size(0) &&
                        residual_any->size(1) == x.size(1) && residual_any->size(2) == x.size(2) &&
                        residual_any->size(3) == x.size(3),
                    "residual has to be of x's shape");
    residual = torch::stable::contiguous(*residual_any, format);
  }
  const Tensor y = empty_like(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, format);
  if (s.elements() == 0) return y;
  with_type(x, [&]<class T>(T) {
    SqueezeExciteArguments<T> a;
    a.x = static_cast<const T*>(x.data_ptr());
    if (residual) a.residual = static_cast<const T*>(residual->data_ptr());
    a.y = static_cast<T*>(y.data_ptr());
    a.shape = s;
    a.reduce_weight = static_cast<const T*>(reduce_weight.data_ptr());
    a.reduce_bias = reduce_bias.gate();
    a.expand_weight = static_cast<const T*>(expand_weight.data_ptr());
    a.expand_bias = expand_bias.gate();
    a.activation = static_cast<int>(activation);
    a.gate_activation = static_cast<int>(gate_activation);
    a.post_activation = static_cast<int>(post_activation);
    const Tensor workspace = empty_1d(x, squeeze_excite_workspace(a), ScalarType::Float);
    a.workspace = static_cast<float*>(workspace.data_ptr());
    squeeze_excite(a, current_stream(x));
  });
  return y;
}

}  // namespace
}  // namespace cnnfast::cuda

#ifndef CNNFAST_CUDA_HOST
STABLE_TORCH_LIBRARY_IMPL(cnnfast_cuda, CUDA, m) {
  m.impl("squeeze_excite", TORCH_BOX(&cnnfast::cuda::squeeze_excite_op));
}
#endif
