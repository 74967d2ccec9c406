// cnnfast_cuda::inverted_residual: checks, device guard, stream, dtype -> launcher.
#include "inverted_residual.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "tensors.h"

namespace cnnfast::cuda {
namespace {

using Maybe = std::optional<Tensor>;

void check_code(int64_t code, const char* name) {
  STD_TORCH_CHECK(code >= kIdentity && code <= kLastActivation, name, " is ", code, "; 0 to ", int{kLastActivation},
                  " is wanted");
}

// A contiguous weight of the shape (out, in, kh, kw), and its bias.
struct Stage {
  Tensor weight;
  Maybe bias;

  Stage(const Tensor& x, const Tensor& w, const Maybe& b, int64_t in, const char* name) : weight(w) {
    check_parameter(w, x, name, false);
    STD_TORCH_CHECK(w.dim() == 4 && w.size(1) == in && w.size(0) > 0 && w.size(0) < (1 << 29), name, " has ", w.dim(),
                    " dimensions and ", w.size(1), " input channels; (out, ", in, ", kh, kw) is wanted");
    weight = torch::stable::contiguous(w);
    if (!b) return;
    check_parameter(*b, x, name, true);
    STD_TORCH_CHECK(b->dim() == 1 && b->size(0) == w.size(0), name, "'s bias has to be (", w.size(0), ")");
    bias = torch::stable::contiguous(*b);
  }

  Parameter bias_parameter() const {
    if (!bias) return {};
    return {bias->data_ptr(), bias->scalar_type() == ScalarType::Float, 1, 0};
  }
};

InvertedResidualShape make_shape(const Tensor& x, int64_t expanded, int64_t out_channels, const Tensor& dw_weight,
                                 const Ints& stride, const Ints& padding, const Ints& dilation, bool expands) {
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2, "stride and dilation are [vertical, horizontal]");
  STD_TORCH_CHECK(padding.size() <= 1 || padding.size() == 4,
                  "padding is [top, bottom, left, right], or [-1] for 'same'");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(1) < (1 << 29), "x has ", x.size(1), " channels");
  const int64_t kernel_h = dw_weight.size(2), kernel_w = dw_weight.size(3);
  const int64_t* pads = padding.size() <= 1 ? nullptr : padding.data();
  const Axis vertical = output_axis(x.size(2), kernel_h, stride[0], dilation[0], pads);
  const Axis horizontal = output_axis(x.size(3), kernel_w, stride[1], dilation[1], pads ? pads + 2 : nullptr);
  STD_TORCH_CHECK(kernel_h * kernel_w < (1 << 20), "the kernel has ", kernel_h * kernel_w, " taps");
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };  // output_axis has checked the range
  InvertedResidualShape s{};
  s.batch = x.size(0);
  s.channels = narrow(x.size(1));
  s.expanded = narrow(expanded);
  s.out_channels = narrow(out_channels);
  s.height = narrow(x.size(2));
  s.width = narrow(x.size(3));
  s.out_height = vertical.out;
  s.out_width = horizontal.out;
  s.kernel_h = narrow(kernel_h);
  s.kernel_w = narrow(kernel_w);
  s.stride_h = narrow(stride[0]);
  s.stride_w = narrow(stride[1]);
  s.pad_top = vertical.before;
  s.pad_left = horizontal.before;
  s.dilation_h = narrow(dilation[0]);
  s.dilation_w = narrow(dilation[1]);
  s.expands = expands;
  return s;
}

// Calls f with a value of the C++ type that x's dtype stores, and whether its products are TF32.
template <class F>
void with_type(const Tensor& x, bool tf32, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return tf32 ? f(float{}, std::true_type{}) : f(float{}, std::false_type{});
    case ScalarType::Half: return f(__half{}, std::false_type{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{}, std::false_type{});
    default: STD_TORCH_CHECK(false, "x's dtype has to be float32, bfloat16 or float16");
  }
}

Tensor inverted_residual_op(const Tensor& x_any, const Maybe& expand_weight, const Maybe& expand_bias,
                            const Tensor& dw_weight, const Maybe& dw_bias, const Maybe& se_reduce_weight,
                            const Maybe& se_reduce_bias, const Maybe& se_expand_weight, const Maybe& se_expand_bias,
                            const Tensor& project_weight, const Maybe& project_bias, const Maybe& residual, Ints stride,
                            Ints padding, Ints dilation, int64_t activation, int64_t se_activation,
                            int64_t gate_activation, bool tf32) {
  check_image(x_any, "x");
  check_code(activation, "activation");
  check_code(se_activation, "se_activation");
  check_code(gate_activation, "gate_activation");
  STD_TORCH_CHECK(se_reduce_weight.has_value() == se_expand_weight.has_value(),
                  "se_reduce_weight and se_expand_weight are given together");
  const int64_t channels = x_any.size(1), expanded = expand_weight ? expand_weight->size(0) : channels;
  const std::optional<Stage> expansion =
      expand_weight ? std::optional(Stage(x_any, *expand_weight, expand_bias, channels, "expand_weight"))
                    : std::nullopt;
  const Stage dw(x_any, dw_weight, dw_bias, 1, "dw_weight");
  const Stage project(x_any, project_weight, project_bias, expanded, "project_weight");
  STD_TORCH_CHECK(dw_weight.size(0) == expanded, "dw_weight has to be (", expanded, ", 1, kh, kw)");
  const int64_t out_channels = project_weight.size(0);
  std::optional<Stage> reduce, excitation;
  if (se_reduce_weight) {
    reduce.emplace(x_any, *se_reduce_weight, se_reduce_bias, expanded, "se_reduce_weight");
    excitation.emplace(x_any, *se_expand_weight, se_expand_bias, se_reduce_weight->size(0), "se_expand_weight");
    STD_TORCH_CHECK(se_expand_weight->size(0) == expanded, "se_expand_weight has to be (", expanded, ", R, 1, 1)");
  }
  const InvertedResidualShape s =
      make_shape(x_any, expanded, out_channels, dw_weight, stride, padding, dilation, expand_weight.has_value());

  const DeviceGuard guard(x_any.get_device_index());
  const MemoryFormat format = image_format(x_any);
  const Tensor x = torch::stable::contiguous(x_any, MemoryFormat::ChannelsLast);
  Maybe added;
  if (residual) {
    check_image(*residual, "residual");
    check_parameter(*residual, x, "residual", false);
    STD_TORCH_CHECK(residual->size(0) == s.batch && residual->size(1) == out_channels &&
                        residual->size(2) == s.out_height && residual->size(3) == s.out_width,
                    "residual has to be of the output's shape");
    added = torch::stable::contiguous(*residual, MemoryFormat::ChannelsLast);
  }
  // Where both formats are one, what was asked for: so that strides of sizes of 1 are as they should be.
  const bool one = out_channels == 1 || s.batch == 0 || static_cast<int64_t>(s.out_height) * s.out_width == 1;
  const Tensor y =
      empty_like(x, {s.batch, out_channels, s.out_height, s.out_width}, one ? format : MemoryFormat::ChannelsLast);
  with_type(x, tf32, [&]<class T, bool by_tf32>(T, std::bool_constant<by_tf32>) {
    const std::string reason = inverted_residual_reason<T>(reduce ? squeeze_shape(s) : s);
    STD_TORCH_CHECK(reason.empty(), reason);
    InvertedResidualArguments<T> a;
    a.x = static_cast<const T*>(x.data_ptr());
    if (expansion) {
      a.expand_weight = static_cast<const T*>(expansion->weight.data_ptr());
      a.expand_bias = expansion->bias_parameter();
    }
    a.dw_weight = static_cast<const T*>(dw.weight.data_ptr());
    a.dw_bias = dw.bias_parameter();
    a.project_weight = static_cast<const T*>(project.weight.data_ptr());
    a.project_bias = project.bias_parameter();
    if (added) a.residual = static_cast<const T*>(added->data_ptr());
    a.y = static_cast<T*>(y.data_ptr());
    a.shape = s;
    a.activation = static_cast<int>(activation);
    if (!reduce) return inverted_residual_forward<T, by_tf32>(a, current_stream(x));
    ExciteArguments<T> excite;
    excite.squeezed = static_cast<int>(reduce->weight.size(0));
    excite.reduce_weight = static_cast<const T*>(reduce->weight.data_ptr());
    excite.reduce_bias = reduce->bias_parameter();
    excite.expand_weight = static_cast<const T*>(excitation->weight.data_ptr());
    excite.expand_bias = excitation->bias_parameter();
    excite.activation = static_cast<int>(se_activation);
    excite.gate_activation = static_cast<int>(gate_activation);
    if (takes_one_pass<T, by_tf32>(a, excite))
      return inverted_residual_one_pass<T, by_tf32>(a, excite, current_stream(x));
    const Tensor d = empty_like(x, {s.batch, expanded, s.out_height, s.out_width}, MemoryFormat::ChannelsLast);
    const Tensor gates = empty_1d(x, s.batch * expanded, x.scalar_type());
    const Tensor workspace = empty_1d(x, inverted_residual_workspace(s, excite), ScalarType::Float);
    a.d = static_cast<T*>(d.data_ptr());
    excite.gates = static_cast<T*>(gates.data_ptr());
    excite.workspace = static_cast<float*>(workspace.data_ptr());
    inverted_residual_excited<T, by_tf32>(a, excite, current_stream(x));
  });
  return format == MemoryFormat::ChannelsLast || one ? y : torch::stable::contiguous(y, format);
}

}  // namespace
}  // namespace cnnfast::cuda

#ifndef CNNFAST_CUDA_HOST
STABLE_TORCH_LIBRARY_IMPL(cnnfast_cuda, CUDA, m) {
  m.impl("inverted_residual", TORCH_BOX(&cnnfast::cuda::inverted_residual_op));
}
#endif
