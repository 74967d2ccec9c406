// Dense conv2d on the CPU: y = activation(conv(x) + bias + residual).
// Plain form: ATen's convolution (oneDNN), then residual and activation in one pass over y, in place; none where there is
// neither. What ATen could only do on a padded copy of x, or oneDNN does wrongly, is the packed form's.
// Packed form: a product of pixels x (taps x channels) whose left side is the image itself: the kernel reads windows where
// they lie.
// Product: in bfloat16 where x and the packing are and the ISA multiplies it, else in the compute type.
// Tiling: a band of output rows a task. Its input rows, with the zeros around them, are copied into a tile in L2 (not where
// there are none and x is of the product's type); idle threads help with rows, then with blocks of the product.
// Bytes: x read once (and a halo of kernel_h - stride_h rows a band), y written once, the weights read once a band.
#include <array>
#include <cstring>

#include "channels.h"
#include "conv2d_winograd.h"
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

// Of `out` windows side by side, from the first scalar to the last.
int64_t reach(int64_t out, int64_t kernel, int64_t stride, int64_t dilation) {
  return (out - 1) * stride + (kernel - 1) * dilation + 1;
}

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

namespace {

// An op of ATen's through the dispatcher, by the stable ABI; what it returns is at the front.
template <class... Arguments>
std::array<StableIValue, sizeof...(Arguments)> aten(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor tensor_of(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

// A convolution as ATen takes it: the same zeros on both sides, or of an x that has been padded or cropped to the windows.
struct AtenConv {
  explicit AtenConv(const Conv& conv)
      : stride{conv.window.stride_h, conv.window.stride_w}, dilation{conv.window.dilation_h, conv.window.dilation_w} {
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
    direct = alike(w.pad_top, below, w.stride_h) && alike(w.pad_left, right, w.stride_w) && sees_x &&
             (conv.out_w > 1 || w.stride_w == 1);
    padding = direct ? Ints{w.pad_top, w.pad_left} : Ints{0, 0};
    edges = {w.pad_left, right, w.pad_top, below};
    if (conv.out_w == 1) stride[1] = 1;
  }

  Tensor forward(const Tensor& x, const Tensor& weight, const Maybe& bias) const {
    return tensor_of(
        aten("aten::convolution", x, weight, bias, stride, padding, dilation, false, Ints{0, 0}, int64_t{1})[0]);
  }

  // The gradient of x (padded, where it has to be) or of the weight.
  Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool of_weight) const {
    const std::array<bool, 3> mask{!of_weight, of_weight, false};
    const auto gradients =
        aten("aten::convolution_backward", grad, x, weight, std::optional<Ints>(), stride, padding, dilation, false,
             Ints{0, 0}, int64_t{1}, torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()));
    const std::array<Tensor, 3> owned{tensor_of(gradients[0]), tensor_of(gradients[1]), tensor_of(gradients[2])};
    return owned[of_weight];
  }

  // x with the windows' zeros around it, and the gradient of that back to x's size.
  Tensor pad(const Tensor& x) const { return direct ? x : channels_last(torch::stable::pad(x, edges)); }
  Tensor unpad(const Tensor& dx) const {
    return direct ? dx : torch::stable::pad(dx, Ints{-edges[0], -edges[1], -edges[2], -edges[3]});
  }

  Ints stride, dilation, padding;
  Ints edges;   // left, right, top, bottom
  bool direct;  // on x itself
};

// Whether oneDNN, ATen's engine, can be left a convolution of this type. With PyTorch 2.13 it returned garbage or crashed
// for an output of one column at a stride above 1, and in bfloat16 and float16 for windows with gaps in or between them
// (docs/decisions.md).
bool trusted(const AtenConv& aten_conv, const Window& w, Storage storage) {
  if (!aten_conv.direct || storage_size(storage) == compute_size(storage)) return aten_conv.direct;
  return w.dilation_h == 1 && w.dilation_w == 1 && w.stride_h <= std::min<int64_t>(2, w.kernel_h) &&
         w.stride_w <= std::min<int64_t>(2, w.kernel_w);
}

// A result of ATen's in x's memory format, with the strides that torch::empty gives: ATen's may differ in dimensions of
// size 1.
Tensor as_if_empty(const Tensor& x, const Tensor& result) {
  const Tensor y = in_format_of(x, channels_last(result));
  const int64_t c = y.size(1), h = y.size(2), w = y.size(3);
  const Ints strides = is_channels_last(x) ? Ints{c * h * w, 1, w * c, c} : Ints{c * h * w, h * w, w, 1};
  for (int64_t d = 0; d < 4; ++d)
    if (y.stride(d) != strides[d])
      return tensor_of(aten("aten::as_strided", y, Ints{y.size(0), c, h, w}, strides, std::optional<int64_t>())[0]);
  return y;
}

void check_weight(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  STD_TORCH_CHECK(weight.dim() == 4 && x.dim() == 4 && weight.size(1) == x.size(1) && weight.numel() > 0,
                  "weight must have shape (K, C, kh, kw) for x's channels");
}

}  // namespace

Tensor conv2d(Tensor x, Tensor weight, Maybe bias, Maybe residual, Ints stride, Ints padding, Ints dilation,
              int64_t activation_code, int64_t backend) {
  check_backend(backend);
  check_weight(weight, x);
  const int64_t out_channels = weight.size(0);
  const Conv conv = conv_of(x, weight.size(2), weight.size(3), stride, padding, dilation);
  const AtenConv aten_conv(conv);
  if (!trusted(aten_conv, conv.window, storage_of(x, "x")) || conv.n == 0)
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

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                           Maybe residual, Ints stride, Ints padding, Ints dilation,
                                                           int64_t activation_code, int64_t output_mask,
                                                           int64_t backend) {
  check_backend(backend);
  check_weight(weight, x);
  const bool bias_wanted = output_mask & 4 && bias;
  // In bfloat16 ATen adds up in float32; what else there is to compute isn't rounded.
  const bool as_stored = storage_of(x, "x") == Storage::bf16 && activation_code == 0 && !bias_wanted;
  const ScalarType dtype = as_stored ? x.scalar_type() : compute_dtype(storage_of(x, "x"));
  const Conv conv = conv_of(x, weight.size(2), weight.size(3), stride, padding, dilation);
  const AtenConv aten_conv(conv);
  check_residual(grad, grad, conv.n, weight.size(0), conv.out_h, conv.out_w);
  const Tensor xs = channels_last(to_dtype(x, dtype)), ws = to_dtype(weight, dtype);
  Tensor g = channels_last(to_dtype(grad, dtype));
  Tensor bias_sums;
  if (activation_code != 0 || bias_wanted) {
    const Tensor z = activation_code == 0 ? g
                                          : conv2d(xs, ws, to_dtype(bias, dtype), to_dtype(residual, dtype), stride,
                                                   padding, dilation, 0, 0);
    g = activation_backward(g, z, activation_code, bias_wanted ? &bias_sums : nullptr);
  }
  Tensor dx = no_gradient(x), dweight = no_gradient(weight), dbias = no_gradient(bias ? *bias : weight);
  Tensor dresidual = no_gradient(residual ? *residual : x);
  const Tensor padded = output_mask & 3 ? aten_conv.pad(xs) : xs;
  if (output_mask & 1)
    dx = as_if_empty(x, to_dtype(aten_conv.unpad(aten_conv.backward(g, padded, ws, false)), x.scalar_type()));
  if (output_mask & 2)
    dweight = weight_gradient(weight, torch::stable::contiguous(aten_conv.backward(g, padded, ws, true)));
  if (bias_wanted) dbias = weight_gradient(*bias, bias_sums);
  if (output_mask & 8 && residual) dresidual = image_gradient(*residual, g);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&cnnfast::cpu::conv2d));
  m.impl("conv2d_backward", TORCH_BOX(&cnnfast::cpu::conv2d_backward));
  m.impl("conv2d_packed", TORCH_BOX(&cnnfast::cpu::conv2d_packed));
  m.impl("pack_conv2d", TORCH_BOX(&cnnfast::cpu::pack_conv2d));
}
