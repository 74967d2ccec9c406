// Dense conv2d on the CPU: y = activation(conv(x) + bias + residual).
// Plain form: ATen's convolution (oneDNN), then residual and activation in one pass over y, in place; none where there is
// neither. What ATen could only do on a padded copy of x, or oneDNN does wrongly, is the packed form's.
// Packed form: a product of pixels x (taps x channels) whose left side is the image itself: the kernel reads windows where
// they lie.
// Product: in bfloat16 where x and the packing are and the ISA multiplies it, else in the compute type.
// Tiling: a band of output rows a task. Its input rows, with the zeros around them, are copied into a tile in L2 (not where
// there are none and x is of the product's type); idle threads help with rows, then with blocks of the product.
// Bytes: x read once (and a halo of kernel_h - stride_h rows a band), y written once, the weights read once a band.
#include <cstring>

#include "channels.h"
#include "conv2d_aten.h"
#include "conv2d_winograd.h"
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

// An image's rows with the zeros around them that windows reach: lines of the product's type, from which the kernel reads
// windows where they lie.
struct Lines {
  const KernelTable& table;
  Storage storage, to;  // of x, of the lines
  Conv conv;
  Tensor x;          // channels_last
  int64_t overhang;  // scalars that the kernel reads, and multiplies by zeros, after a window's row

  int64_t itemsize() const { return storage_size(to); }
  int64_t width() const {
    const Window& w = conv.window;
    return reach(conv.out_w, w.kernel_w, w.stride_w, w.dilation_w);
  }
  int64_t count(int64_t out_rows) const {
    const Window& w = conv.window;
    return reach(out_rows, w.kernel_h, w.stride_h, w.dilation_h);
  }
  int64_t bytes() const { return width() * conv.c * itemsize(); }
  // x's own rows are such lines.
  bool in_place() const {
    const Window& w = conv.window;
    return overhang == 0 && to == storage && w.pad_top == 0 && w.pad_left == 0 && width() <= conv.w &&
           count(conv.out_h) <= conv.h;
  }

  // Line `line` of image n (below 0 or beyond its height: zeros) to `to`.
  void copy(int64_t n, int64_t line, char* to) const {
    const int64_t pixel = conv.c * itemsize(), begin = conv.window.pad_left;
    const int64_t valid = line < 0 || line >= conv.h ? 0 : std::clamp<int64_t>(width() - begin, 0, conv.w);
    const int64_t before = valid ? begin : 0;
    std::memset(to, 0, before * pixel);
    if (valid) {
      const char* from = bytes_of(x) + (n * conv.h + line) * conv.w * conv.c * storage_size(storage);
      if (this->to == storage)
        std::memcpy(to + before * pixel, from, valid * pixel);
      else
        table.widen[static_cast<int>(storage)](from, to + before * pixel, valid * conv.c);
    }
    std::memset(to + (before + valid) * pixel, 0, (width() - before - valid) * pixel);
  }
};

// Weights as floats, without the zeros at the ends of a window's rows that pairs have; the panels are in `memory`.
PointwiseWeights in_floats(const KernelTable& table, const PointwiseWeights& weights, int64_t rows, int64_t scalars,
                           Tensor& memory) {
  const int64_t panels = ceil_div(weights.out, kPanel), row = weights.in / rows;
  memory = torch::stable::empty(Ints{panels * rows * scalars * kPanel}, ScalarType::Float);
  float* to = static_cast<float*>(memory.mutable_data_ptr());
  float* const panel = reinterpret_cast<float*>(scratch(Slot::panels, weights.panel() * 4));
  for (int64_t p = 0; p < panels; ++p) {
    table.unpair(weights.panels + p * weights.panel() * 2, weights.scale + p * kPanel * 4, panel, weights.in / 2);
    for (int64_t r = 0; r < rows; ++r, to += scalars * kPanel)
      std::memcpy(to, panel + r * row * kPanel, scalars * kPanel * 4);
  }
  return {weights.bias, nullptr, bytes_of(memory), rows * scalars, weights.out, Storage::f32};
}

}  // namespace

Tensor conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints kernel_size, Ints stride,
                     Ints padding, Ints dilation, int64_t activation_code, int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size[0], kernel_size[1], stride, padding, dilation);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  PackedReader reader(packed, PackedOp::conv2d, x, conv.c, out_channels, kernel_size[0], kernel_size[1]);
  const bool winograd = reader.header().winograd != 0;
  STD_TORCH_CHECK(!winograd || (stride[0] == 1 && stride[1] == 1 && dilation[0] == 1 && dilation[1] == 1),
                  "packed was made with winograd=True, which wants stride 1 and dilation 1");
  const int64_t scalars = kernel_size[1] * conv.c, row = window_row(scalars, reader.header().itemsize);
  PointwiseWeights weights =
      reader.pointwise(winograd ? kWinogradTile * kWinogradTile * conv.c : kernel_size[0] * row, out_channels);
  const Tensor xs = channels_last(x);
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);

  if (winograd) {
    conv2d_winograd(conv, xs, weights, rs, activation_code, y);
    return in_format_of(x, y);
  }
  const KernelTable& table = kernels(storage);
  const Window& w = conv.window;
  // A window's row is one tap, where its pixels are neighbours.
  const bool dense = w.dilation_w == 1;
  const bool pairs = reader.header().itemsize == 2;  // multiplied by kPairDepth: no tap ends between
  Tensor memory;
  if (pairs && !dense && conv.c % kPairDepth != 0) weights = in_floats(table, weights, w.kernel_h, scalars, memory);
  const Lines lines{table, storage, operand_storage(table, storage, weights), conv, xs, dense ? row - scalars : 0};
  const bool in_place = lines.in_place();
  const int64_t line = (in_place ? conv.w : lines.width()) * conv.c;
  GemmTile whole = packed_gemm(weights, lines.to, storage, activation_code);
  whole.y_row = pixel_of(y);
  whole.residual_row = out_channels;
  whole.a_row = w.stride_w * conv.c;
  whole.a_line = w.stride_h * line;
  // Lines that follow on each other are one.
  whole.line = whole.a_line == conv.out_w * whole.a_row ? 0 : conv.out_w;
  whole.taps = dense ? 1 : w.kernel_w;
  whole.tap_depth = dense ? row : conv.c;
  whole.a_tap = w.dilation_w * conv.c;
  whole.a_tap_line = w.dilation_h * line;

  whole.in_planes = conv.c % kPairDepth == 0 && pays_in_planes(table, whole, conv.out_h * conv.out_w);
  whole.b_stays = stays_in_l2(whole, conv.n * conv.out_h * conv.out_w);

  const int64_t itemsize = lines.itemsize();
  const Bands bands = bands_of(conv, w.stride_h * lines.bytes(), halo_of(conv), weights.in * out_channels * itemsize);
  for_each(bands.count, [&](const Worker& worker, int64_t i) {
    const auto [n, begin, end] = bands[i];
    const int64_t rows = end - begin, first = begin * w.stride_h - w.pad_top;
    GemmTile g = whole;
    g.rows = rows * conv.out_w;
    if (in_place) {
      g.a = bytes_of(xs) + (n * conv.h + first) * line * itemsize;
    } else {
      const int64_t bytes = lines.count(rows) * lines.bytes(), beyond = lines.overhang * itemsize;
      char* const tile = scratch(Slot::gathered, bytes + beyond);
      std::memset(tile + bytes, 0, beyond);
      worker.each_part(lines.count(rows),
                       [&, n = n](int64_t k) { lines.copy(n, first + k, tile + k * lines.bytes()); });
      g.a = tile;
    }
    const int64_t to = (n * conv.out_h + begin) * conv.out_w * storage_size(storage);
    g.y = mutable_bytes_of(y) + to * g.y_row;
    g.residual = rs ? bytes_of(*rs) + to * g.residual_row : nullptr;
    if (g.in_planes) g = windows_in_planes(worker, table, g, lines.count(rows), line, conv.out_w);
    gemm_in_parts(worker, table, g);
  });
  return in_format_of(x, y);
}

Tensor conv2d(Tensor x, Tensor weight, Maybe bias, Maybe residual, Ints stride, Ints padding, Ints dilation,
              int64_t activation_code, int64_t backend) {
  check_backend(backend);
  check_conv2d_weight(weight, x);
  const int64_t out_channels = weight.size(0);
  const Conv conv = conv_of(x, weight.size(2), weight.size(3), stride, padding, dilation);
  const AtenConv aten_conv(conv);
  if (!aten_conv.trusted(storage_of(x, "x")) || conv.n == 0)
    return conv2d_packed(x, pack_conv2d(weight, bias), residual, out_channels, {weight.size(2), weight.size(3)}, stride,
                         padding, dilation, activation_code, backend);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out_channels), "bias must have shape (", out_channels,
                  ")");
  const bool added_here = bias && bias->scalar_type() != x.scalar_type();  // which ATen refuses
  const Tensor y = channels_last(aten_conv.forward(channels_last(x), weight, added_here ? std::nullopt : bias));
  if (added_here || residual || activation_code != 0) {
    const Maybe shift = added_here ? per_channel(to_dtype(bias, compute_dtype(storage_of(x, "x")))) : std::nullopt;
    scale_channels(y, std::nullopt, shift, residual ? Maybe(channels_last(*residual)) : std::nullopt, activation_code,
                   y);
  }
  return as_if_empty(x, y);
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&cnnfast::cpu::conv2d));
  m.impl("conv2d_packed", TORCH_BOX(&cnnfast::cpu::conv2d_packed));
  m.impl("pack_conv2d", TORCH_BOX(&cnnfast::cpu::pack_conv2d));
}
