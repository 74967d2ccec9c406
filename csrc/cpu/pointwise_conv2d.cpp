// pointwise_conv2d on the CPU: y = activation(x W^T + bias + residual), a GEMM of pixels x channels.
// Tiling: float at stride 1 multiplies x where it lies, rows or output channels split among the threads; so it does at
// larger strides, a row of the output at a time, where rows are long and the weights stay in L2. Else, and in low
// precision, a tile of pixels is gathered into scratch first.
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

Window pointwise_window(const Ints& stride) {
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "stride must have 2 positive elements");
  return {1, 1, stride[0], stride[1], 1, 1, 0, 0};
}

namespace {

constexpr int64_t kWideRow = 28;  // pixels: four blocks of the micro-kernel

// Rows of pixels [first, first + count) of the output's, as the tile's left side in this thread's scratch.
const char* gather(const KernelTable& table, Storage storage, const Conv& conv, const char* x, int64_t first,
                   int64_t count, const GemmTile& tile) {
  const int64_t row_bytes = tile.a_row * storage_size(tile.a_storage), stored = storage_size(storage);
  char* to = scratch(Slot::gathered, count * row_bytes);
  for (int64_t p = 0; p < count; ++p) {
    const int64_t pixel = first + p, ow = pixel % conv.out_w, oh = pixel / conv.out_w % conv.out_h;
    const int64_t n = pixel / (conv.out_w * conv.out_h);
    const int64_t source = (n * conv.h + oh * conv.window.stride_h) * conv.w + ow * conv.window.stride_w;
    const char* from = x + source * conv.c * stored;
    if (tile.a_storage == Storage::bf16)
      copy_padded(tile, from, to + p * row_bytes, 1);
    else
      table.widen[static_cast<int>(storage)](from, to + p * row_bytes, conv.c);
  }
  return to;
}

}  // namespace

Tensor pointwise_conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints stride,
                               int64_t activation_code, int64_t backend) {
  check_backend(backend);
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, 1, 1, stride, {0, 0, 0, 0}, {1, 1});
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  PackedReader reader(packed, PackedOp::pointwise_conv2d, x, conv.c, out_channels, 1, 1);
  const PointwiseWeights weights = reader.pointwise(conv.c, out_channels);

  const Tensor xs = channels_last(x);
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);
  const KernelTable& table = kernels(storage);
  GemmTile whole = packed_gemm(weights, operand_storage(table, storage, weights), storage, activation_code);
  const int64_t stored = storage_size(storage), operand = storage_size(whole.a_storage);
  whole.rows = conv.n * conv.out_h * conv.out_w;
  whole.y = y.mutable_data_ptr();
  whole.y_row = whole.residual_row = out_channels;
  whole.residual = rs ? rs->const_data_ptr() : nullptr;
  const bool in_place = whole.a_storage == storage && (storage != Storage::bf16 || conv.c % kPairDepth == 0);
  if (in_place && stride[0] == 1 && stride[1] == 1) {
    whole.a = xs.const_data_ptr();
    whole.a_row = conv.c;
    gemm_on_threads(table, whole);
    return in_format_of(x, y);
  }
  if (in_place && conv.out_w >= kWideRow && conv.c * out_channels * operand <= kTileBytes) {
    // A row of the output reads pixels that are equally far apart: no copy.
    for_each(conv.n * conv.out_h, [&](int64_t i) {
      const int64_t n = i / conv.out_h, ih = i % conv.out_h * stride[0], first = i * conv.out_w * out_channels * stored;
      GemmTile g = whole;
      g.rows = conv.out_w;
      g.a = bytes_of(xs) + (n * conv.h + ih) * conv.w * conv.c * stored;
      g.a_row = stride[1] * conv.c;
      g.y = static_cast<char*>(whole.y) + first;
      if (g.residual) g.residual = static_cast<const char*>(whole.residual) + first;
      multiply(table, g);
    });
    return in_format_of(x, y);
  }
  whole.a_row = padded_row(conv.c, operand);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fitting = std::max<int64_t>(1, kTileBytes / 2 / (whole.a_row * operand));
  const int64_t tiles = round_up(ceil_div(whole.rows, fitting), threads);
  const int64_t pixels = round_up(ceil_div(whole.rows, tiles), operand == 2 ? kPairDepth : table.gemm_rows);
  for_each(ceil_div(whole.rows, pixels), [&](int64_t i) {
    GemmTile g = whole;
    const int64_t first = i * pixels;
    g.rows = std::min(pixels, whole.rows - first);
    g.a = gather(table, storage, conv, bytes_of(xs), first, g.rows, whole);
    g.y = static_cast<char*>(whole.y) + first * out_channels * stored;
    if (g.residual) g.residual = static_cast<const char*>(whole.residual) + first * out_channels * stored;
    multiply(table, g);
  });
  return in_format_of(x, y);
}

Tensor pointwise_conv2d(Tensor x, Tensor weight, Maybe bias, Maybe residual, Ints stride, int64_t activation_code,
                        int64_t backend) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  const Tensor packed = pack_pointwise_conv2d(weight, bias);
  return pointwise_conv2d_packed(x, packed, residual, weight.size(0), stride, activation_code, backend);
}

namespace {

// dweight (K, C) = sum over pixels of grad (pixels, K)^T x (pixels, C). Blocks of pixels are summed one after another:
// the same bits on any number of threads, operands that stay in the cache, and short chains of additions.
Tensor pointwise_grad_weight(const Tensor& grad, const Tensor& x, Storage storage) {
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3), in = x.size(1), out = grad.size(1), block = 256;
  const int64_t itemsize = compute_size(storage);
  const Ints shape{out, in, 1, 1};
  Tensor dw = torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device());
  torch::stable::zero_(dw);
  const KernelTable& table = kernels(storage);
  for_each(ceil_div(out, 14), [&](int64_t i) {
    GemmTile g{};
    g.a_row = 1;
    g.a_depth = out;
    g.b_panel = kPanel;
    g.b_depth = in;
    g.residual = g.y = mutable_bytes_of(dw) + i * 14 * in * itemsize;
    g.residual_row = g.y_row = in;
    g.y_storage = storage;
    g.rows = std::min<int64_t>(14, out - i * 14);
    g.cols = in;
    g.activation = activation(0);
    for (int64_t p = 0; p < pixels; p += block) {
      g.a = bytes_of(grad) + (p * out + i * 14) * itemsize;
      g.b = bytes_of(x) + p * in * itemsize;
      g.depth = std::min(block, pixels - p);
      table.gemm[compute_index(storage)](g);
    }
  });
  return dw;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> pointwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                                     Maybe residual, Ints stride,
                                                                     int64_t activation_code, int64_t output_mask,
                                                                     int64_t backend) {
  check_backend(backend);
  const Storage storage = compute_storage(storage_of(x, "x"));
  const ScalarType dtype = compute_dtype(storage);
  const Conv conv = conv_of(x, 1, 1, stride, {0, 0, 0, 0}, {1, 1});
  const int64_t out_channels = weight.size(0), itemsize = compute_size(storage);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == conv.c, "weight must have ", conv.c, " input channels");
  check_residual(grad, grad, conv.n, out_channels, conv.out_h, conv.out_w);
  const Tensor xs = channels_last(to_dtype(x, dtype)), ws = to_dtype(weight, dtype);
  Tensor g = channels_last(to_dtype(grad, dtype));
  if (activation_code != 0) {
    const Tensor z = pointwise_conv2d(xs, ws, to_dtype(bias, dtype), to_dtype(residual, dtype), stride, 0, 0);
    g = activation_backward(g, z, activation_code);
  }
  const bool dense = stride[0] == 1 && stride[1] == 1;
  const KernelTable& table = kernels(storage);
  Tensor dx = no_gradient(x), dweight = no_gradient(weight), dbias = no_gradient(bias ? *bias : weight);
  Tensor dresidual = no_gradient(residual ? *residual : x);
  if (output_mask & 1) {
    // dx = grad W: a pointwise conv with the transposed weight; at stride 2 the pixels between get zeros.
    const Tensor packed = pack_pointwise_conv2d(torch::stable::transpose(ws, 0, 1), std::nullopt);
    PackedReader reader(packed, PackedOp::pointwise_conv2d, xs, out_channels, conv.c, 1, 1);
    GemmTile tile = packed_gemm(reader.pointwise(out_channels, conv.c), storage, storage, 0);
    Tensor out = empty_channels_last(x, conv.n, conv.c, conv.h, conv.w, dtype);
    tile.a_row = out_channels;
    if (dense) {
      tile.a = g.const_data_ptr();
      tile.rows = conv.n * conv.h * conv.w;
      tile.y = out.mutable_data_ptr();
      tile.y_row = conv.c;
      gemm_on_threads(table, tile);
    } else {
      torch::stable::zero_(out);
      for_each(g.numel() ? conv.n * conv.out_h : 0, [&](int64_t i) {
        GemmTile t = tile;
        const int64_t n = i / conv.out_h, ih = i % conv.out_h * stride[0];
        t.a = bytes_of(g) + i * conv.out_w * out_channels * itemsize;
        t.rows = conv.out_w;
        t.y = mutable_bytes_of(out) + (n * conv.h + ih) * conv.w * conv.c * itemsize;
        t.y_row = stride[1] * conv.c;
        table.gemm[compute_index(storage)](t);
      });
    }
    dx = image_gradient(x, out);
  }
  if (output_mask & 2) {
    Tensor sampled = xs;
    if (!dense) {
      sampled = empty_channels_last(x, conv.n, conv.c, conv.out_h, conv.out_w, dtype);
      GemmTile dense_rows{};
      dense_rows.a_row = conv.c;
      dense_rows.a_storage = storage;
      for_each(sampled.numel() ? conv.n * conv.out_h : 0, [&](int64_t i) {
        const int64_t first = i * conv.out_w;
        const char* rows = gather(table, storage, conv, bytes_of(xs), first, conv.out_w, dense_rows);
        std::copy_n(rows, conv.out_w * conv.c * itemsize, mutable_bytes_of(sampled) + first * conv.c * itemsize);
      });
    }
    dweight = weight_gradient(weight, pointwise_grad_weight(g, sampled, storage));
  }
  if (output_mask & 4 && bias) {
    const Ints dims{0, 2, 3};
    dbias = weight_gradient(*bias, torch::stable::sum(g, dims));
  }
  if (output_mask & 8 && residual) dresidual = image_gradient(*residual, g);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("pointwise_conv2d", TORCH_BOX(&cnnfast::cpu::pointwise_conv2d));
  m.impl("pointwise_conv2d_backward", TORCH_BOX(&cnnfast::cpu::pointwise_conv2d_backward));
  m.impl("pointwise_conv2d_packed", TORCH_BOX(&cnnfast::cpu::pointwise_conv2d_packed));
  m.impl("pack_pointwise_conv2d", TORCH_BOX(&cnnfast::cpu::pack_pointwise_conv2d));
}
