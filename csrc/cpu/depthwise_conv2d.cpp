// depthwise_conv2d on the CPU: y = activation(depthwise(pre_activation(x), weight) + bias).
// Tiling: a few output rows of one image a task; the plain form packs its weights first (taps * C scalars).
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

// The op up to its output: what the packed form, the squeeze and the statistics are made of.
struct Depthwise {
  Depthwise(const Tensor& x, const Tensor& packed, int64_t out_channels, const Ints& kernel_size, const Ints& stride,
            const Ints& padding, const Ints& dilation, const Prologue& prologue, int64_t activation_code)
      : conv(conv_of(x, kernel_size.at(0), kernel_size.at(1), stride, padding, dilation)),
        stage(conv, channels_last(x), weights(x, packed, out_channels, kernel_size), storage_of(x, "x"), prologue,
              activation_code),
        y(empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type())) {
    stage.tile.y_pixel = out_channels;
    stage.tile.y_row = conv.out_w * out_channels;
  }

  DepthwiseWeights weights(const Tensor& x, const Tensor& packed, int64_t out_channels, const Ints& kernel_size) const {
    STD_TORCH_CHECK(conv.c > 0 && out_channels % conv.c == 0, "out_channels ", out_channels,
                    " must be a multiple of x's channels ", conv.c);
    PackedReader reader(packed, PackedOp::depthwise_conv2d, x, -1, out_channels, kernel_size[0], kernel_size[1]);
    return reader.depthwise(out_channels);
  }

  // Rows [begin, end) of image n of y.
  void rows(int64_t n, int64_t begin, int64_t end) const {
    const int64_t first = (n * conv.out_h + begin) * stage.tile.y_row * storage_size(stage.storage);
    stage.rows(n, begin, end, mutable_bytes_of(y) + first);
  }

  // y.
  void write() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t together =
        std::max<int64_t>(1, conv.out_h / std::max<int64_t>(1, ceil_div(4 * threads, std::max<int64_t>(1, conv.n))));
    const int64_t bands = ceil_div(conv.out_h, together);
    for_each(y.numel() ? conv.n * bands : 0, [&](int64_t i) {
      const int64_t begin = i % bands * together;
      rows(i / bands, begin, std::min(begin + together, conv.out_h));
    });
  }

  // y and its sums.
  BandSums with_sums(bool squares) const {
    BandSums sums(y, squares);
    for_each(sums.count(), [&](int64_t i) {
      const auto [begin, end] = sums.rows(i);
      rows(sums.image(i), begin, end);
      sums.add(i);
    });
    return sums;
  }

  Conv conv;
  DepthwiseStage stage;
  Tensor y;
};

}  // namespace

Tensor depthwise_conv2d_packed(Tensor x, Tensor packed, int64_t out_channels, Ints kernel_size, Ints stride,
                               Ints padding, Ints dilation, int64_t pre_activation, int64_t activation_code,
                               int64_t backend) {
  check_backend(backend);
  const Depthwise op(x, packed, out_channels, kernel_size, stride, padding, dilation, {{}, {}, pre_activation},
                     activation_code);
  op.write();
  return in_format_of(x, op.y);
}

Tensor depthwise_conv2d(Tensor x, Tensor weight, Maybe bias, Ints stride, Ints padding, Ints dilation,
                        int64_t pre_activation, int64_t activation_code, int64_t backend) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  const Tensor packed = pack_depthwise_conv2d(weight, bias);
  return depthwise_conv2d_packed(x, packed, weight.size(0), {weight.size(2), weight.size(3)}, stride, padding, dilation,
                                 pre_activation, activation_code, backend);
}

std::tuple<Tensor, Tensor> depthwise_conv2d_squeeze_packed(Tensor x, Tensor packed, int64_t out_channels,
                                                           Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                                                           int64_t pre_activation, int64_t activation_code,
                                                           int64_t backend) {
  check_backend(backend);
  const Depthwise op(x, packed, out_channels, kernel_size, stride, padding, dilation, {{}, {}, pre_activation},
                     activation_code);
  const Tensor means = op.with_sums(false).means();
  return {in_format_of(x, op.y), means};
}

std::tuple<Tensor, Tensor> depthwise_conv2d_squeeze(Tensor x, Tensor weight, Maybe bias, Ints stride, Ints padding,
                                                    Ints dilation, int64_t pre_activation, int64_t activation_code,
                                                    int64_t backend) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  const Tensor packed = pack_depthwise_conv2d(weight, bias);
  return depthwise_conv2d_squeeze_packed(x, packed, weight.size(0), {weight.size(2), weight.size(3)}, stride, padding,
                                         dilation, pre_activation, activation_code, backend);
}

Tensor depthwise_conv2d_scaled(const Tensor& x, const Tensor& weight, const Maybe& bias, const Prologue& prologue,
                               const Ints& stride, const Ints& padding, const Ints& dilation) {
  const Tensor packed = pack_depthwise_conv2d(weight, bias);
  const Depthwise op(x, packed, weight.size(0), {weight.size(2), weight.size(3)}, stride, padding, dilation, prologue,
                     0);
  op.write();
  return in_format_of(x, op.y);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_stats(Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
                                                          Ints stride, Ints padding, Ints dilation,
                                                          int64_t pre_activation, int64_t backend) {
  check_backend(backend);
  check_scale_shift(scale, shift, x);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  const Tensor packed = pack_depthwise_conv2d(weight, bias);
  const Depthwise op(x, packed, weight.size(0), {weight.size(2), weight.size(3)}, stride, padding, dilation,
                     prologue_of(scale, shift, pre_activation), 0);
  const BandSums sums = op.with_sums(true);
  return {in_format_of(x, op.y), sums.sum(), sums.squares()};
}

Tensor image_gradient(const Tensor& of, const Tensor& gradient) {
  return in_format_of(of, to_dtype(gradient, of.scalar_type()));
}

Tensor weight_gradient(const Tensor& of, const Tensor& gradient) { return to_dtype(gradient, of.scalar_type()); }

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d));
  m.impl("depthwise_conv2d_packed", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_packed));
  m.impl("depthwise_conv2d_squeeze", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_squeeze));
  m.impl("depthwise_conv2d_squeeze_packed", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_squeeze_packed));
  m.impl("depthwise_conv2d_stats", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_stats));
  m.impl("pack_depthwise_conv2d", TORCH_BOX(&cnnfast::cpu::pack_depthwise_conv2d));
}
