// inverted_residual on the CPU: expand -> depthwise -> project, the expanded tensor only ever a tile in L2.
// Tiling: a band of output rows goes through the stages in chunks of expanded channels: expand the chunk for the band's
// input rows (a halo of kernel_h - stride_h rows is computed by both neighbours), depthwise it into the band's tile;
// when all chunks are there, project the tile. Idle threads (one small image is one band) help with chunks, then with the
// projection's output channels or pixels.
// Bytes: x read once a band, y written once, the weights read once a band.
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kChunk = 4 * kPanel;  // expanded channels at a time: one group of panels of the micro-kernel

// Input rows that output rows [begin, end) read.
std::pair<int64_t, int64_t> input_rows(const Conv& conv, int64_t begin, int64_t end) {
  const Window& w = conv.window;
  const int64_t first = begin * w.stride_h - w.pad_top;
  const int64_t last = (end - 1) * w.stride_h - w.pad_top + (w.kernel_h - 1) * w.dilation_h;
  return {std::clamp<int64_t>(first, 0, conv.h), std::clamp<int64_t>(last + 1, 0, conv.h)};
}

}  // namespace

Tensor inverted_residual_packed(Tensor x, Tensor packed, Maybe residual, int64_t expanded_channels,
                                int64_t out_channels, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                                int64_t activation_code, int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size[0], kernel_size[1], stride, padding, dilation);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  PackedReader reader(packed, PackedOp::inverted_residual, x, expanded_channels, out_channels, kernel_size[0],
                      kernel_size[1]);
  STD_TORCH_CHECK(reader.header().in_channels == conv.c, "packed has ", reader.header().in_channels,
                  " input channels, x has ", conv.c);
  const PointwiseWeights expand = reader.pointwise(conv.c, expanded_channels);
  const DepthwiseWeights dw = reader.depthwise(expanded_channels);
  const PointwiseWeights project = reader.pointwise(expanded_channels, out_channels);

  const int64_t itemsize = compute_size(storage), stored = static_cast<int64_t>(x.element_size());
  // The expansion reads compute-type rows; low precision is widened first, an eighth or so of the expanded tensor.
  const Tensor xs = channels_last(to_dtype(x, compute_dtype(storage)));
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);

  const int64_t row = padded_row(expanded_channels, itemsize);
  const int64_t halo = (conv.window.kernel_h - 1) * conv.window.dilation_h + 1 - conv.window.stride_h;
  const Bands bands = bands_of(conv, conv.out_w * row * itemsize, std::max<int64_t>(halo, 0),
                               expanded_channels * out_channels * itemsize);
  const KernelTable& table = kernels(storage);
  const Storage compute = compute_storage(storage);

  GemmTile expansion = packed_gemm(expand, compute, activation_code);
  expansion.a_row = conv.c;
  expansion.y_row = kChunk;
  DepthwiseTile depthwise = depthwise_tile(conv, dw, compute, 0, activation_code);
  depthwise.x_pixel = kChunk;
  depthwise.x_row = conv.w * kChunk;
  depthwise.y_pixel = row;
  depthwise.y_row = conv.out_w * row;
  GemmTile projection = packed_gemm(project, storage, 0);
  projection.a_row = row;
  projection.y_row = projection.residual_row = out_channels;

  // Expanded channels [c, c + kChunk) of output rows [begin, end) of image n, through expansion and depthwise.
  const auto chunk = [&](int64_t n, int64_t begin, int64_t end, int64_t c, char* tile) {
    const auto [first, last] = input_rows(conv, begin, end);
    const int64_t channels = std::min(kChunk, expanded_channels - c);
    char* e = scratch(Slot::expanded, std::max<int64_t>(1, last - first) * conv.w * kChunk * itemsize);
    GemmTile g = expansion;
    g.a = bytes_of(xs) + (n * conv.h + first) * conv.w * conv.c * itemsize;
    g.b = expand.panels + c / kPanel * expansion.b_panel * itemsize;
    g.bias = expand.bias + c * itemsize;
    g.y = e;
    g.rows = (last - first) * conv.w;
    g.cols = channels;
    table.gemm[compute_index(storage)](g);
    DepthwiseTile t = depthwise;
    t.x = e;
    t.x_first_row = first;
    t.weight = dw.taps + c * itemsize;
    t.bias = dw.bias + c * itemsize;
    t.y = tile + c * itemsize;
    t.row_begin = begin;
    t.row_end = end;
    t.channels = channels;
    table.depthwise[static_cast<int>(compute)](t);
  };
  const auto projected = [&](int64_t n, int64_t begin, int64_t end, const char* tile) {
    GemmTile g = projection;
    const int64_t first = (n * conv.out_h + begin) * conv.out_w * out_channels * stored;
    g.a = tile;
    g.rows = (end - begin) * conv.out_w;
    g.y = mutable_bytes_of(y) + first;
    g.residual = rs ? bytes_of(*rs) + first : nullptr;
    return g;
  };

  const int64_t chunks = ceil_div(expanded_channels, kChunk), tile_bytes = bands.rows * conv.out_w * row * itemsize;
  for_each(bands.count, [&](const Worker& worker, int64_t i) {
    const int64_t n = i / bands.per_image, begin = i % bands.per_image * bands.rows;
    const int64_t end = std::min(begin + bands.rows, conv.out_h);
    char* tile = scratch(Slot::depthwise, tile_bytes);
    worker.each_part(chunks, [&](int64_t k) { chunk(n, begin, end, k * kChunk, tile); });
    gemm_in_parts(worker, table, projected(n, begin, end, tile), itemsize);
  });
  return in_format_of(x, y);
}

Tensor inverted_residual(Tensor x, Tensor expand_weight, Maybe expand_bias, Tensor dw_weight, Maybe dw_bias,
                         Tensor project_weight, Maybe project_bias, Maybe residual, Ints stride, Ints padding,
                         Ints dilation, int64_t activation_code, int64_t backend) {
  STD_TORCH_CHECK(expand_weight.scalar_type() == x.scalar_type() && dw_weight.scalar_type() == x.scalar_type() &&
                      project_weight.scalar_type() == x.scalar_type(),
                  "expand_weight, dw_weight and project_weight must have x's dtype");
  const Tensor packed =
      pack_inverted_residual(expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias);
  return inverted_residual_packed(x, packed, residual, expand_weight.size(0), project_weight.size(0),
                                  {dw_weight.size(2), dw_weight.size(3)}, stride, padding, dilation, activation_code,
                                  backend);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inverted_residual_backward(
    Tensor grad, Tensor x, Tensor expand_weight, Maybe expand_bias, Tensor dw_weight, Maybe dw_bias,
    Tensor project_weight, Maybe project_bias, Maybe residual, Ints stride, Ints padding, Ints dilation,
    int64_t activation_code, int64_t output_mask, int64_t backend) {
  // Both expanded tensors are computed again, not kept, and never rounded to x's dtype.
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const Ints unit{1, 1};
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  const Tensor xs = to_dtype(x, dtype), ews = to_dtype(expand_weight, dtype), dws = to_dtype(dw_weight, dtype);
  const Tensor pws = to_dtype(project_weight, dtype);
  const Maybe ebs = to_dtype(expand_bias, dtype), dbs = to_dtype(dw_bias, dtype), pbs = to_dtype(project_bias, dtype);
  const Maybe rs = to_dtype(residual, dtype);
  const Tensor e = pointwise_conv2d(xs, ews, ebs, std::nullopt, unit, activation_code, backend);
  const Tensor d = depthwise_conv2d(e, dws, dbs, stride, padding, dilation, 0, activation_code, backend);
  const int64_t expand_mask = bit(0) | bit(1) << 1 | bit(2) << 2;
  const int64_t depthwise_mask = (expand_mask ? 1 : 0) | bit(3) << 1 | bit(4) << 2;
  const int64_t project_mask = (depthwise_mask ? 1 : 0) | bit(5) << 1 | bit(6) << 2 | bit(7) << 3;
  const auto [dd, dpw, dpb, dres] =
      pointwise_conv2d_backward(to_dtype(grad, dtype), d, pws, pbs, rs, unit, 0, project_mask, backend);
  const auto [de, ddw, ddb] = depthwise_mask ? depthwise_conv2d_backward(dd, e, dws, dbs, stride, padding, dilation, 0,
                                                                         activation_code, depthwise_mask, backend)
                                             : std::tuple(no_gradient(e), no_gradient(dws), no_gradient(dws));
  const auto [dx, dew, deb, unused] =
      expand_mask
          ? pointwise_conv2d_backward(de, xs, ews, ebs, std::nullopt, unit, activation_code, expand_mask, backend)
          : std::tuple(no_gradient(xs), no_gradient(ews), no_gradient(ews), no_gradient(xs));
  const auto like = [](const Tensor& gradient, const Maybe& of, const Tensor& otherwise) {
    return to_dtype(gradient, of ? of->scalar_type() : otherwise.scalar_type());
  };
  return {bit(0) ? image_gradient(x, channels_last(dx)) : no_gradient(x),
          to_dtype(dew, expand_weight.scalar_type()),
          like(deb, expand_bias, expand_weight),
          to_dtype(ddw, dw_weight.scalar_type()),
          like(ddb, dw_bias, dw_weight),
          to_dtype(dpw, project_weight.scalar_type()),
          like(dpb, project_bias, project_weight),
          bit(7) && residual ? image_gradient(*residual, channels_last(dres)) : no_gradient(x)};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&cnnfast::cpu::inverted_residual));
  m.impl("inverted_residual_backward", TORCH_BOX(&cnnfast::cpu::inverted_residual_backward));
  m.impl("inverted_residual_packed", TORCH_BOX(&cnnfast::cpu::inverted_residual_packed));
  m.impl("pack_inverted_residual", TORCH_BOX(&cnnfast::cpu::pack_inverted_residual));
}
