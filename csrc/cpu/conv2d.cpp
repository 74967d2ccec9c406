// Dense conv2d on the CPU: y = activation(conv(x) + bias + residual).
// Plain form: ATen's convolution (oneDNN), then residual and activation in one pass over y, in place; none where there is
// neither. What ATen could only do on a padded copy of x, or oneDNN does wrongly, is the packed form's.
// Packed form: a GEMM of pixels x (taps x channels). Meant for first layers, few channels and many pixels, whose padding
// ATen has no form of (docs/decisions.md).
// Tiling: a run of output pixels a task, in any order; each pixel's window is copied into a row of a tile in L2 (kernel_h
// pieces, contiguous in channels_last), zeros where it leaves the image.
// Bytes: x read about kernel_h times from L2 and once from memory, y written once, the weights read once a tile.
#include <array>
#include <cstring>

#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kPiece = 64;  // bytes that are copied where fewer are wanted: one fixed-size move, no loop

// Copies windows of one x, whose last byte is before `end`.
struct Gather {
  const KernelTable& table;
  Storage storage;
  Conv conv;
  const char *x, *end;
  int64_t row;  // of the tile, in scalars

  // `count` channels side by side. What is written beyond them is overwritten by the next piece, or lies past the tile.
  void copy(const char* from, char* to, int64_t count) const {
    const int64_t bytes = count * compute_size(storage);
    if (compute_size(storage) != storage_size(storage))
      table.widen[static_cast<int>(storage)](from, to, count);
    else if (bytes <= kPiece && end - from >= kPiece)
      std::memcpy(to, from, kPiece);
    else
      std::memcpy(to, from, bytes);
  }

  void window(int64_t n, int64_t oh, int64_t ow, char* to) const {
    const Window& w = conv.window;
    const int64_t c = conv.c, bytes = c * compute_size(storage), pixel = c * storage_size(storage);
    const int64_t ih0 = oh * w.stride_h - w.pad_top, iw0 = ow * w.stride_w - w.pad_left;
    const bool whole = w.dilation_w == 1 && iw0 >= 0 && iw0 + w.kernel_w <= conv.w;
    for (int64_t i = 0; i < w.kernel_h; ++i, to += w.kernel_w * bytes) {
      const int64_t ih = ih0 + i * w.dilation_h;
      const char* line = x + (n * conv.h + ih) * conv.w * pixel;
      if (ih < 0 || ih >= conv.h)
        std::memset(to, 0, w.kernel_w * bytes);
      else if (whole)
        copy(line + iw0 * pixel, to, w.kernel_w * c);
      else
        for (int64_t j = 0; j < w.kernel_w; ++j) {
          const int64_t iw = iw0 + j * w.dilation_w;
          if (iw < 0 || iw >= conv.w)
            std::memset(to + j * bytes, 0, bytes);
          else
            copy(line + iw * pixel, to + j * bytes, c);
        }
    }
  }

  // The windows of output pixels [first, first + count), as compute-type rows in this thread's scratch.
  const char* windows(int64_t first, int64_t count) const {
    const int64_t row_bytes = row * compute_size(storage);
    char* const tile = scratch(Slot::gathered, count * row_bytes + kPiece);
    int64_t ow = first % conv.out_w, oh = first / conv.out_w % conv.out_h, n = first / (conv.out_w * conv.out_h);
    for (int64_t p = 0; p < count; ++p) {
      window(n, oh, ow, tile + p * row_bytes);
      if (++ow < conv.out_w) continue;
      ow = 0;
      if (++oh < conv.out_h) continue;
      oh = 0;
      ++n;
    }
    return tile;
  }
};

}  // namespace

Tensor conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints kernel_size, Ints stride,
                     Ints padding, Ints dilation, int64_t activation_code, int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size[0], kernel_size[1], stride, padding, dilation);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  PackedReader reader(packed, PackedOp::conv2d, x, conv.c, out_channels, kernel_size[0], kernel_size[1]);
  const PointwiseWeights weights = reader.pointwise(conv.c * kernel_size[0] * kernel_size[1], out_channels);
  const Tensor xs = channels_last(x);
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);

  const KernelTable& table = kernels(storage);
  const int64_t itemsize = compute_size(storage), row = padded_row(weights.in, itemsize);
  const int64_t pixels = conv.n * conv.out_h * conv.out_w, threads = torch::stable::get_num_threads();
  const int64_t fitting = std::max<int64_t>(1, kTileBytes / (row * itemsize));
  const int64_t tile = round_up(std::min(fitting, ceil_div(pixels, 4 * threads)), table.gemm_rows);
  const Gather gather{table, storage, conv, bytes_of(xs), bytes_of(xs) + xs.numel() * storage_size(storage), row};
  for_each(ceil_div(pixels, tile), [&](int64_t i) {
    GemmTile g = packed_gemm(weights, compute_storage(storage), storage, activation_code);
    const int64_t first = i * tile;
    g.rows = std::min(tile, pixels - first);
    g.a = gather.windows(first, g.rows);
    g.a_row = row;
    g.y = mutable_bytes_of(y) + first * out_channels * storage_size(storage);
    g.residual = rs ? bytes_of(*rs) + first * out_channels * storage_size(storage) : nullptr;
    g.y_row = g.residual_row = out_channels;
    multiply(table, g);
  });
  return in_format_of(x, y);
}

namespace {

constexpr int64_t kFinishedBytes = 64 * 1024;  // of y, that a thread finishes at a time

// An op of ATen's through the dispatcher, by the stable ABI; what it returns is at the front.
template <class... Arguments>
std::array<StableIValue, sizeof...(Arguments)> aten(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor tensor_of(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

// Zeros after x (below or right) for windows to end where the padded x does; negative: rows or columns that none reaches.
int64_t padding_after(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t out) {
  return (out - 1) * stride + (kernel - 1) * dilation + 1 - size - before;
}

// A convolution as ATen takes it: the same zeros on both sides, or of an x that has been padded or cropped to the windows.
struct AtenConv {
  explicit AtenConv(const Conv& conv)
      : stride{conv.window.stride_h, conv.window.stride_w}, dilation{conv.window.dilation_h, conv.window.dilation_w} {
    const Window& w = conv.window;
    const int64_t below = padding_after(conv.h, w.kernel_h, w.stride_h, w.dilation_h, w.pad_top, conv.out_h);
    const int64_t right = padding_after(conv.w, w.kernel_w, w.stride_w, w.dilation_w, w.pad_left, conv.out_w);
    // Zeros before an x that is padded alike may be more than the windows need after it, by less than a stride.
    const auto alike = [](int64_t before, int64_t after, int64_t step) {
      return after <= before && before < after + step;
    };
    direct = alike(w.pad_top, below, w.stride_h) && alike(w.pad_left, right, w.stride_w) &&
             (conv.out_w > 1 || w.stride_w == 1);  // oneDNN: see trusted()
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
// for an output of one column at a stride above 1, and in bfloat16 for windows with gaps in or between them
// (docs/decisions.md).
bool trusted(const AtenConv& aten_conv, const Window& w, Storage storage) {
  if (!aten_conv.direct || storage != Storage::bf16) return aten_conv.direct;
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

// y = activation(y + bias + residual) in place; y in channels_last.
void finish(Tensor& y, const Maybe& bias, const Maybe& residual, int64_t activation_code) {
  const Storage storage = storage_of(y, "y");
  const KernelTable& table = kernels(storage);
  const int64_t c = y.size(1), pixels = y.numel() / c, pixel = c * storage_size(storage);
  const int64_t block = std::max<int64_t>(1, kFinishedBytes / pixel);
  const Maybe shift = bias ? Maybe(torch::stable::contiguous(to_dtype(*bias, compute_dtype(storage)))) : std::nullopt;
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  for_each(ceil_div(pixels, block), [&](int64_t i) {
    ScaleTile t{};
    t.x = t.y = mutable_bytes_of(y) + i * block * pixel;
    t.x_pixel = t.y_pixel = t.channels = c;
    t.shift = shift ? bytes_of(*shift) : nullptr;
    t.residual = rs ? bytes_of(*rs) + i * block * pixel : nullptr;
    t.y_storage = storage;
    t.pixels = std::min(block, pixels - i * block);
    t.activation = activation(activation_code);
    table.scale_channels[static_cast<int>(storage)](t);
  });
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
  Tensor y = channels_last(aten_conv.forward(channels_last(x), weight, added_here ? std::nullopt : bias));
  if (added_here || residual || activation_code != 0)
    finish(y, added_here ? bias : std::nullopt, residual, activation_code);
  return as_if_empty(x, y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_backward(Tensor grad, Tensor x, Tensor weight, Maybe bias,
                                                           Maybe residual, Ints stride, Ints padding, Ints dilation,
                                                           int64_t activation_code, int64_t output_mask,
                                                           int64_t backend) {
  check_backend(backend);
  check_weight(weight, x);
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const Conv conv = conv_of(x, weight.size(2), weight.size(3), stride, padding, dilation);
  const AtenConv aten_conv(conv);
  check_residual(grad, grad, conv.n, weight.size(0), conv.out_h, conv.out_w);
  const Tensor xs = channels_last(to_dtype(x, dtype)), ws = to_dtype(weight, dtype);
  Tensor g = channels_last(to_dtype(grad, dtype));
  if (activation_code != 0) {
    const Tensor z = conv2d(xs, ws, to_dtype(bias, dtype), to_dtype(residual, dtype), stride, padding, dilation, 0, 0);
    g = activation_backward(g, z, activation_code);
  }
  Tensor dx = no_gradient(x), dweight = no_gradient(weight), dbias = no_gradient(bias ? *bias : weight);
  Tensor dresidual = no_gradient(residual ? *residual : x);
  const Tensor padded = output_mask & 3 ? aten_conv.pad(xs) : xs;
  if (output_mask & 1)
    dx = as_if_empty(x, to_dtype(aten_conv.unpad(aten_conv.backward(g, padded, ws, false)), x.scalar_type()));
  if (output_mask & 2)
    dweight = weight_gradient(weight, torch::stable::contiguous(aten_conv.backward(g, padded, ws, true)));
  if (output_mask & 4 && bias) {
    const Ints dims{0, 2, 3};
    dbias = weight_gradient(*bias, torch::stable::sum(g, dims));
  }
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
