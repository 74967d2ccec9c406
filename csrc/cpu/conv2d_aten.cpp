#include "conv2d_aten.h"

#include <array>

namespace cnnfast::cpu {

namespace {

// An op of ATen's through the dispatcher, by the stable ABI; what it returns is at the front.
template <class... Arguments>
std::array<StableIValue, sizeof...(Arguments)> aten(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor tensor_of(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

}  // namespace

void check_conv2d_weight(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  STD_TORCH_CHECK(weight.dim() == 4 && x.dim() == 4 && weight.size(1) == x.size(1) && weight.numel() > 0,
                  "weight must have shape (K, C, kh, kw) for x's channels");
}

AtenConv::AtenConv(const Conv& conv)
    : window_(conv.window),
      stride_{conv.window.stride_h, conv.window.stride_w},
      dilation_{conv.window.dilation_h, conv.window.dilation_w} {
  const Window& w = conv.window;
  // Zeros after x for windows to end where the padded x does; negative: rows or columns that none reaches.
  const int64_t below = reach(conv.out_h, w.kernel_h, w.stride_h, w.dilation_h) - conv.h - w.pad_top;
  const int64_t right = reach(conv.out_w, w.kernel_w, w.stride_w, w.dilation_w) - conv.w - w.pad_left;
  // Zeros before an x that is padded alike may be more than the windows need after it, by less than a stride.
  const auto alike = [](int64_t before, int64_t after, int64_t step) {
    return after <= before && before < after + step;
  };
  // oneDNN: see trusted(). Windows of nothing but zeros made it crash in float32, too.
  const bool sees_x = w.pad_top <= (w.kernel_h - 1) * w.dilation_h && w.pad_left <= (w.kernel_w - 1) * w.dilation_w;
  direct_ = alike(w.pad_top, below, w.stride_h) && alike(w.pad_left, right, w.stride_w) && sees_x &&
            (conv.out_w > 1 || w.stride_w == 1);
  padding_ = direct_ ? Ints{w.pad_top, w.pad_left} : Ints{0, 0};
  edges_ = {w.pad_left, right, w.pad_top, below};
  if (conv.out_w == 1) stride_[1] = 1;
}

bool AtenConv::trusted(Storage storage) const {
  if (!direct_ || storage_size(storage) == compute_size(storage)) return direct_;
  const Window& w = window_;
  return w.dilation_h == 1 && w.dilation_w == 1 && w.stride_h <= std::min<int64_t>(2, w.kernel_h) &&
         w.stride_w <= std::min<int64_t>(2, w.kernel_w);
}

Tensor AtenConv::forward(const Tensor& x, const Tensor& weight, const Maybe& bias) const {
  return tensor_of(
      aten("aten::convolution", x, weight, bias, stride_, padding_, dilation_, false, Ints{0, 0}, int64_t{1})[0]);
}

Tensor AtenConv::backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool of_weight) const {
  const std::array<bool, 3> mask{!of_weight, of_weight, false};
  const auto gradients =
      aten("aten::convolution_backward", grad, x, weight, std::optional<Ints>(), stride_, padding_, dilation_, false,
           Ints{0, 0}, int64_t{1}, torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()));
  const std::array<Tensor, 3> owned{tensor_of(gradients[0]), tensor_of(gradients[1]), tensor_of(gradients[2])};
  return owned[of_weight];
}

Tensor AtenConv::pad(const Tensor& x) const { return direct_ ? x : channels_last(torch::stable::pad(x, edges_)); }

Tensor AtenConv::unpad(const Tensor& dx) const {
  return direct_ ? dx : torch::stable::pad(dx, Ints{-edges_[0], -edges_[1], -edges_[2], -edges_[3]});
}

Tensor as_if_empty(const Tensor& x, const Tensor& result) {
  const Tensor y = in_format_of(x, channels_last(result));
  const int64_t c = y.size(1), h = y.size(2), w = y.size(3);
  const Ints strides = is_channels_last(x) ? Ints{c * h * w, 1, w * c, c} : Ints{c * h * w, h * w, w, 1};
  for (int64_t d = 0; d < 4; ++d)
    if (y.stride(d) != strides[d])
      return tensor_of(aten("aten::as_strided", y, Ints{y.size(0), c, h, w}, strides, std::optional<int64_t>())[0]);
  return y;
}

}  // namespace cnnfast::cpu
