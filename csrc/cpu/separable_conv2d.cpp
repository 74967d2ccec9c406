// separable_conv2d on the CPU: depthwise -> pointwise, the intermediate only ever a tile in L2.
// Tiling: a band of output rows. Many bands: each thread takes its own through both stages. Few (one small image): the
// threads share each band, its rows in the first stage, its pixels or output channels in the second.
// Bytes: x read once (and a halo of kernel_h - stride_h rows a band), y written once, the weights read once a band.
#include "separable_conv2d.h"

namespace cnnfast::cpu {

Separable separable_of(const Tensor& packed, Storage storage, Storage y_storage, const Conv& conv, int64_t out_channels,
                       int64_t pre_activation, int64_t mid_activation, int64_t activation_code) {
  const Window& window = conv.window;
  PackedReader reader(packed, PackedOp::separable_conv2d, storage, -1, out_channels, window.kernel_h, window.kernel_w);
  const int64_t mid = reader.header().mid_channels;
  STD_TORCH_CHECK(conv.c > 0 && mid % conv.c == 0, "packed has ", mid, " depthwise channels, not a multiple of x's ",
                  conv.c);
  const DepthwiseWeights dw = reader.depthwise(mid);
  const PointwiseWeights pw = reader.pointwise(mid, out_channels);
  Separable op{storage,
               &kernels(storage),
               conv,
               depthwise_tile(conv, dw, pre_activation, mid_activation),
               packed_gemm(pw, y_storage, activation_code),
               padded_row(mid, compute_size(storage))};
  op.depthwise.multiplier = mid / conv.c;
  op.depthwise.x_pixel = conv.c;
  op.depthwise.x_row = conv.w * conv.c;
  op.depthwise.y_pixel = op.row;
  op.depthwise.y_row = conv.out_w * op.row;
  op.pointwise.a_row = op.row;
  op.pointwise.y_row = op.pointwise.residual_row = out_channels;
  return op;
}

namespace {

// All channels_last.
void run(const Separable& op, const Tensor& x, const Maybe& residual, Tensor& y) {
  const Conv& conv = op.conv;
  const Bands bands = bands_of(conv, op.tile_bytes(1), 0);
  const int64_t stored = static_cast<int64_t>(x.element_size());
  const int64_t x_bytes = conv.h * op.depthwise.x_row * stored;  // of an image
  const int64_t y_row_bytes = conv.out_w * op.pointwise.y_row * stored;
  const auto first_stage = [&](int64_t n, int64_t begin, int64_t end, char* tile) {
    op.first_stage(bytes_of(x) + n * x_bytes, 0, begin, end, tile);
  };
  const auto second_stage = [&](int64_t n, int64_t begin, int64_t end, const char* tile) {
    const int64_t first = (n * conv.out_h + begin) * y_row_bytes;
    return op.second_stage(end - begin, tile, mutable_bytes_of(y) + first,
                           residual ? bytes_of(*residual) + first : nullptr);
  };
  const auto band = [&](int64_t i) {
    const int64_t begin = i % bands.per_image * bands.rows;
    return std::tuple(i / bands.per_image, begin, std::min(begin + bands.rows, conv.out_h));
  };
  if (!bands.shared) {
    for_each(bands.count, [&](int64_t i) {
      const auto [n, begin, end] = band(i);
      char* tile = scratch(Slot::depthwise, op.tile_bytes(bands.rows));
      first_stage(n, begin, end, tile);
      op.table->gemm[compute_index(op.storage)](second_stage(n, begin, end, tile));
    });
    return;
  }
  char* tile = scratch(Slot::depthwise, op.tile_bytes(bands.rows));
  for (int64_t i = 0; i < bands.count; ++i) {
    const auto [image, first, last] = band(i);
    const int64_t n = image, begin = first, end = last;
    const int64_t rows = std::max<int64_t>(1, (end - begin) / (2 * torch::stable::get_num_threads()));
    for_each(ceil_div(end - begin, rows), [&](int64_t k) {
      const int64_t from = begin + k * rows;
      first_stage(n, from, std::min(from + rows, end), tile + k * op.tile_bytes(rows));
    });
    gemm_on_threads(*op.table, second_stage(n, begin, end, tile), op.itemsize());
  }
}

}  // namespace

Tensor separable_conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints kernel_size,
                               Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t mid_activation,
                               int64_t activation_code, int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size[0], kernel_size[1], stride, padding, dilation);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  const Separable op =
      separable_of(packed, storage, storage, conv, out_channels, pre_activation, mid_activation, activation_code);
  Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
  if (y.numel() > 0) run(op, channels_last(x), residual ? Maybe(channels_last(*residual)) : std::nullopt, y);
  return in_format_of(x, y);
}

Tensor separable_conv2d(Tensor x, Tensor dw_weight, Maybe dw_bias, Tensor pw_weight, Maybe pw_bias, Maybe residual,
                        Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t mid_activation,
                        int64_t activation_code, int64_t backend) {
  STD_TORCH_CHECK(dw_weight.scalar_type() == x.scalar_type() && pw_weight.scalar_type() == x.scalar_type(),
                  "dw_weight and pw_weight must have x's dtype");
  const Tensor packed = pack_separable_conv2d(dw_weight, dw_bias, pw_weight, pw_bias);
  return separable_conv2d_packed(x, packed, residual, pw_weight.size(0), {dw_weight.size(2), dw_weight.size(3)}, stride,
                                 padding, dilation, pre_activation, mid_activation, activation_code, backend);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_conv2d_backward(
    Tensor grad, Tensor x, Tensor dw_weight, Maybe dw_bias, Tensor pw_weight, Maybe pw_bias, Maybe residual,
    Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t mid_activation, int64_t activation_code,
    int64_t output_mask, int64_t backend) {
  // The intermediate is computed again, not kept. Everything in the compute type: it is never rounded to x's dtype.
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const Ints unit{1, 1};
  const Tensor xs = to_dtype(x, dtype), dws = to_dtype(dw_weight, dtype), pws = to_dtype(pw_weight, dtype);
  const Maybe dbs = to_dtype(dw_bias, dtype), pbs = to_dtype(pw_bias, dtype), rs = to_dtype(residual, dtype);
  const Tensor mid = depthwise_conv2d(xs, dws, dbs, stride, padding, dilation, pre_activation, mid_activation, backend);
  const int64_t pointwise_mask = (output_mask & 7 ? 1 : 0) | (output_mask >> 3 & 1) << 1 | (output_mask >> 4 & 1) << 2 |
                                 (output_mask >> 5 & 1) << 3;
  const auto [dmid, dpw, dpb, dres] = pointwise_conv2d_backward(to_dtype(grad, dtype), mid, pws, pbs, rs, unit,
                                                                activation_code, pointwise_mask, backend);
  const auto [dx, ddw, ddb] = output_mask & 7
                                  ? depthwise_conv2d_backward(dmid, xs, dws, dbs, stride, padding, dilation,
                                                              pre_activation, mid_activation, output_mask & 7, backend)
                                  : std::tuple(no_gradient(xs), no_gradient(dws), no_gradient(dws));
  const auto wanted = [&](int bit) { return (output_mask >> bit & 1) != 0; };
  return {wanted(0) ? image_gradient(x, channels_last(dx)) : no_gradient(x),
          to_dtype(ddw, dw_weight.scalar_type()),
          to_dtype(ddb, dw_bias ? dw_bias->scalar_type() : dw_weight.scalar_type()),
          to_dtype(dpw, pw_weight.scalar_type()),
          to_dtype(dpb, pw_bias ? pw_bias->scalar_type() : pw_weight.scalar_type()),
          wanted(5) && residual ? image_gradient(*residual, channels_last(dres)) : no_gradient(x)};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&cnnfast::cpu::separable_conv2d));
  m.impl("separable_conv2d_backward", TORCH_BOX(&cnnfast::cpu::separable_conv2d_backward));
  m.impl("separable_conv2d_packed", TORCH_BOX(&cnnfast::cpu::separable_conv2d_packed));
  m.impl("pack_separable_conv2d", TORCH_BOX(&cnnfast::cpu::pack_separable_conv2d));
}
