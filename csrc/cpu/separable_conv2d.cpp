// separable_conv2d on the CPU: depthwise -> pointwise, the intermediate only ever a tile in L2.
// Tiling: a band of output rows. Many bands: each thread takes its own through both stages. Few (one small image): the
// threads share each band, its rows in the first stage, its pixels or output channels in the second.
// Bytes: x read once (and a halo of kernel_h - stride_h rows a band), y written once, the weights read once a band.
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

Tensor separable_conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints kernel_size,
                               Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t mid_activation,
                               int64_t activation_code, int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size[0], kernel_size[1], stride, padding, dilation);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  PackedReader reader(packed, PackedOp::separable_conv2d, x, -1, out_channels, kernel_size[0], kernel_size[1]);
  const int64_t mid = reader.header().mid_channels;
  STD_TORCH_CHECK(conv.c > 0 && mid % conv.c == 0, "packed has ", mid, " depthwise channels, not a multiple of x's ",
                  conv.c);
  const DepthwiseWeights dw = reader.depthwise(mid);
  const PointwiseWeights pw = reader.pointwise(mid, out_channels);

  const Tensor xs = channels_last(x);
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);

  const int64_t itemsize = compute_size(storage), stored = static_cast<int64_t>(x.element_size());
  const int64_t row = padded_row(mid, itemsize);
  const Bands bands = bands_of(conv, conv.out_w * row * itemsize, 0);
  const KernelTable& table = kernels(storage);

  DepthwiseTile depthwise = depthwise_tile(conv, dw, pre_activation, mid_activation);
  depthwise.multiplier = mid / conv.c;
  depthwise.x_pixel = conv.c;
  depthwise.x_row = conv.w * conv.c;
  depthwise.y_pixel = row;
  depthwise.y_row = conv.out_w * row;
  GemmTile pointwise = packed_gemm(pw, storage, activation_code);
  pointwise.a_row = row;
  pointwise.y_row = pointwise.residual_row = out_channels;

  // Rows [begin, end) of image n, into `tile` whose first row is tile_begin.
  const auto first_stage = [&](int64_t n, int64_t tile_begin, int64_t begin, int64_t end, char* tile) {
    DepthwiseTile t = depthwise;
    t.x = bytes_of(xs) + n * conv.h * depthwise.x_row * stored;
    t.row_begin = begin;
    t.row_end = end;
    t.y = tile + (begin - tile_begin) * depthwise.y_row * itemsize;
    table.depthwise_to_compute[static_cast<int>(storage)](t);
  };
  const auto second_stage = [&](int64_t n, int64_t begin, int64_t end, const char* tile) {
    GemmTile g = pointwise;
    const int64_t first = (n * conv.out_h + begin) * conv.out_w * out_channels * stored;
    g.a = tile;
    g.rows = (end - begin) * conv.out_w;
    g.y = mutable_bytes_of(y) + first;
    g.residual = rs ? bytes_of(*rs) + first : nullptr;
    return g;
  };

  const int64_t tile_bytes = bands.rows * conv.out_w * row * itemsize;
  if (!bands.shared) {
    for_each(bands.count, [&](int64_t i) {
      const int64_t n = i / bands.per_image, begin = i % bands.per_image * bands.rows;
      const int64_t end = std::min(begin + bands.rows, conv.out_h);
      char* tile = scratch(Slot::depthwise, tile_bytes);
      first_stage(n, begin, begin, end, tile);
      table.gemm[compute_index(storage)](second_stage(n, begin, end, tile));
    });
    return in_format_of(x, y);
  }
  char* tile = scratch(Slot::depthwise, tile_bytes);
  for (int64_t i = 0; i < bands.count; ++i) {
    const int64_t n = i / bands.per_image, begin = i % bands.per_image * bands.rows;
    const int64_t end = std::min(begin + bands.rows, conv.out_h);
    const int64_t rows = std::max<int64_t>(1, (end - begin) / (2 * torch::stable::get_num_threads()));
    for_each(ceil_div(end - begin, rows), [&](int64_t k) {
      const int64_t from = begin + k * rows;
      first_stage(n, begin, from, std::min(from + rows, end), tile);
    });
    gemm_on_threads(table, second_stage(n, begin, end, tile), itemsize);
  }
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
