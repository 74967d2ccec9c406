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
  const Conv& conv = op.conv;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rows =
      std::max<int64_t>(1, conv.out_h / std::max<int64_t>(1, ceil_div(4 * threads, std::max<int64_t>(1, conv.n))));
  const int64_t bands = ceil_div(conv.out_h, rows);
  for_each(op.y.numel() ? conv.n * bands : 0, [&](int64_t i) {
    const int64_t begin = i % bands * rows;
    op.rows(i / bands, begin, std::min(begin + rows, conv.out_h));
  });
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

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                             Ints stride, Ints padding, Ints dilation,
                                                             int64_t pre_activation, int64_t activation_code,
                                                             int64_t output_mask, int64_t backend) {
  check_backend(backend);
  const Storage storage = storage_of(x, "x");
  const ScalarType dtype = compute_dtype(storage);
  const int index = compute_index(storage);
  const int64_t itemsize = compute_size(storage), out_channels = weight.size(0);
  const Conv conv = conv_of(x, weight.size(2), weight.size(3), stride, padding, dilation);
  STD_TORCH_CHECK(conv.c > 0 && out_channels % conv.c == 0, "weight must have a multiple of x's channels ", conv.c);
  const int64_t multiplier = out_channels / conv.c;
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == conv.n && grad.size(1) == out_channels &&
                      grad.size(2) == conv.out_h && grad.size(3) == conv.out_w,
                  "grad must have the output's shape");
  // Low precision is widened as a whole: right, and no slower than PyTorch's own; a later kernel reads it in place.
  const Tensor xs = channels_last(to_dtype(x, dtype)), ws = to_dtype(weight, dtype);
  Tensor g = channels_last(to_dtype(grad, dtype));
  if (activation_code != 0) {
    const Tensor z = depthwise_conv2d(xs, ws, to_dtype(bias, dtype), stride, padding, dilation, pre_activation, 0, 0);
    g = activation_backward(g, z, activation_code);
  }

  const KernelTable& table = kernels(compute_storage(storage));
  Tensor dx = no_gradient(x), dweight = no_gradient(weight), dbias = no_gradient(bias ? *bias : weight);
  if (output_mask & 1) {
    const Tensor packed = pack_depthwise_conv2d(ws, std::nullopt);
    const int64_t padded = round_up(out_channels, kPanel);
    Tensor out = empty_channels_last(x, conv.n, conv.c, conv.h, conv.w, dtype);
    const int64_t rows = std::max<int64_t>(1, conv.h / 8), bands = ceil_div(conv.h, rows);
    for_each(out.numel() ? conv.n * bands : 0, [&](int64_t i) {
      const int64_t n = i / bands;
      DepthwiseGradInputTile t{};
      t.grad = bytes_of(g) + n * conv.out_h * conv.out_w * out_channels * itemsize;
      t.out_height = conv.out_h;
      t.out_width = conv.out_w;
      t.x = pre_activation ? bytes_of(xs) + n * conv.h * conv.w * conv.c * itemsize : nullptr;
      t.weight = bytes_of(packed) + sizeof(PackedHeader) + padded * itemsize;
      t.weight_tap = padded;
      t.row_begin = i % bands * rows;
      t.row_end = std::min(t.row_begin + rows, conv.h);
      t.dx = mutable_bytes_of(out) + (n * conv.h + t.row_begin) * conv.w * conv.c * itemsize;
      t.width = conv.w;
      t.channels = conv.c;
      t.multiplier = multiplier;
      t.window = conv.window;
      t.pre_activation = activation(pre_activation);
      table.depthwise_grad_input[index](t);
    });
    dx = image_gradient(x, out);
  }
  if (output_mask & 6) {
    const Ints shape{out_channels, 1, weight.size(2), weight.size(3)}, bias_shape{out_channels};
    Tensor dw = torch::stable::empty(shape, dtype, std::nullopt, x.device());
    Tensor db = torch::stable::empty(bias_shape, dtype, std::nullopt, x.device());
    for_each(ceil_div(out_channels, kPanel), [&](int64_t i) {
      DepthwiseGradWeightTile t{};
      t.grad = g.const_data_ptr();
      t.x = xs.const_data_ptr();
      t.dweight = dw.mutable_data_ptr();
      t.dbias = output_mask & 4 ? db.mutable_data_ptr() : nullptr;
      t.images = conv.n;
      t.height = conv.h;
      t.width = conv.w;
      t.out_height = conv.out_h;
      t.out_width = conv.out_w;
      t.channels = conv.c;
      t.multiplier = multiplier;
      t.channel_begin = i * kPanel;
      t.channel_count = std::min<int64_t>(kPanel, out_channels - t.channel_begin);
      t.window = conv.window;
      t.pre_activation = activation(pre_activation);
      table.depthwise_grad_weight[index](t);
    });
    if (output_mask & 2) dweight = weight_gradient(weight, dw);
    if (output_mask & 4 && bias) dbias = weight_gradient(*bias, db);
  }
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_squeeze_backward(Tensor grad, Tensor grad_squeezed, Tensor x,
                                                                     Tensor weight, Maybe bias, Ints stride,
                                                                     Ints padding, Ints dilation,
                                                                     int64_t pre_activation, int64_t activation_code,
                                                                     int64_t output_mask, int64_t backend) {
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  check_residual(grad_squeezed, grad_squeezed, grad.size(0), grad.size(1), 1, 1);
  // A mean hands the same share of its gradient to each pixel.
  const Tensor share = channel_sums(channels_last(to_dtype(grad_squeezed, dtype)), std::nullopt,
                                    1.0 / static_cast<double>(grad.size(2) * grad.size(3)));
  const Tensor g = scaled_channels(channels_last(to_dtype(grad, dtype)), std::nullopt, share, std::nullopt, 0);
  return depthwise_conv2d_backward(g, x, weight, bias, stride, padding, dilation, pre_activation, activation_code,
                                   output_mask, backend);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_conv2d_stats_backward(
    Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
    Tensor y, Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t output_mask, int64_t backend) {
  // The kernels apply pre_activation themselves.
  return stats_backward(grad, grad_sum, grad_squares, x, weight, bias, scale, shift, y, 0, output_mask,
                        [&](const Tensor& g, const Tensor& input, const Tensor& w, const Maybe& b, int64_t mask) {
                          return depthwise_conv2d_backward(g, input, w, b, stride, padding, dilation, pre_activation, 0,
                                                           mask, backend);
                        });
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_backward));
  m.impl("depthwise_conv2d_packed", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_packed));
  m.impl("depthwise_conv2d_squeeze", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_squeeze));
  m.impl("depthwise_conv2d_squeeze_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_squeeze_backward));
  m.impl("depthwise_conv2d_squeeze_packed", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_squeeze_packed));
  m.impl("depthwise_conv2d_stats", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_stats));
  m.impl("depthwise_conv2d_stats_backward", TORCH_BOX(&cnnfast::cpu::depthwise_conv2d_stats_backward));
  m.impl("pack_depthwise_conv2d", TORCH_BOX(&cnnfast::cpu::pack_depthwise_conv2d));
}
