// pointwise_conv2d on the CPU: y = activation(x W^T + bias + residual), a GEMM of pixels x channels.
// Tiling: float at stride 1 multiplies x where it lies, rows or output channels split among the threads; so it does at
// larger strides, a row of the output at a time, where rows are long and the weights stay in L2. Else, and in low
// precision, or with a gate or scale on x, a tile of pixels is gathered into scratch first.
#include <cstring>

#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

Window pointwise_window(const Ints& stride) {
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "stride must have 2 positive elements");
  return {1, 1, stride[0], stride[1], 1, 1, 0, 0};
}

namespace {

constexpr int64_t kWideRow = 28;  // pixels: four blocks of the micro-kernel

// The op up to its output, whose pixels are computed in any order.
struct Pointwise {
  Storage storage;
  const KernelTable& table;
  Conv conv;
  Tensor x;  // channels_last
  Prologue prologue;
  Tensor y;
  GemmTile whole;

  Pointwise(const Tensor& image, const Tensor& packed, const Maybe& residual, int64_t out_channels, const Ints& stride,
            const Prologue& before, int64_t activation_code)
      : storage(storage_of(image, "x")),
        table(kernels(storage)),
        conv(conv_of(image, 1, 1, stride, {0, 0, 0, 0}, {1, 1})),
        x(channels_last(image)),
        prologue(before),
        y(empty_channels_last(image, conv.n, out_channels, conv.out_h, conv.out_w, image.scalar_type())) {
    PackedReader reader(packed, PackedOp::pointwise_conv2d, image, conv.c, out_channels, 1, 1);
    const PointwiseWeights weights = reader.pointwise(conv.c, out_channels);
    whole = packed_gemm(weights, operand_storage(table, storage, weights), storage, activation_code);
    whole.in_planes = pays_in_planes(table, whole, conv.out_h * conv.out_w);
    whole.rows = conv.n * conv.out_h * conv.out_w;
    whole.a = x.const_data_ptr();
    whole.a_row = conv.c;
    whole.y = y.mutable_data_ptr();
    whole.y_row = pixel_of(y);
    whole.residual_row = out_channels;
    whole.residual = residual ? residual->const_data_ptr() : nullptr;
  }

  bool dense() const { return conv.window.stride_h == 1 && conv.window.stride_w == 1; }
  // x can be multiplied where it lies.
  bool in_place() const {
    return !prologue.any() && whole.a_storage == storage && (storage != Storage::bf16 || conv.c % kPairDepth == 0);
  }
  int64_t scratch_row() const { return padded_row(conv.c, storage_size(whole.a_storage)); }
  // Pixels whose rows fill a tile.
  int64_t fitting() const {
    return std::max<int64_t>(1, block_bytes(whole) / (scratch_row() * storage_size(whole.a_storage)));
  }

  // Output pixels [first, first + count), their part of x copied into this thread's scratch unless it is fit as it is.
  void pixels(int64_t first, int64_t count) const {
    GemmTile g = whole;
    g.rows = count;
    if (in_place() && dense()) {
      g.a = bytes_of(x) + first * conv.c * storage_size(storage);
    } else {
      g.a_row = scratch_row();
      g.a = gather(first, count, g);
    }
    to_pixel(g, first);
    multiply(table, g);
  }

  // The input of output pixels [first, first + count), as the left side `tile`.
  const char* gather(int64_t first, int64_t count, const GemmTile& tile) const {
    const int64_t stored = storage_size(storage), row_bytes = tile.a_row * storage_size(tile.a_storage);
    char* const to = scratch(Slot::gathered, count * row_bytes);
    const int64_t image = conv.out_h * conv.out_w;
    for (int64_t done = 0, run = 0; done < count; done += run) {
      // Pixels equally far apart: up to the end of the row, or of the image where rows follow on each other.
      const int64_t n = (first + done) / image, pixel = (first + done) % image, oh = pixel / conv.out_w,
                    ow = pixel % conv.out_w;
      run = std::min(count - done, dense() ? image - pixel : conv.out_w - ow);
      const int64_t from = (n * conv.h + oh * conv.window.stride_h) * conv.w + ow * conv.window.stride_w;
      const char* const pixels = bytes_of(x) + from * conv.c * stored;
      if (!prologue.any() && tile.a_storage == storage) {
        for (int64_t p = 0; p < run; ++p)
          std::memcpy(to + (done + p) * row_bytes, pixels + p * conv.window.stride_w * conv.c * stored,
                      conv.c * stored);
        continue;
      }
      prologue.apply(table, storage, n, pixels, conv.window.stride_w * conv.c, run, conv.c, to + done * row_bytes,
                     tile.a_storage, tile.a_row);
    }
    clear_tail(tile, to, count);
    return to;
  }

  void to_pixel(GemmTile& g, int64_t first) const {
    const int64_t bytes = first * storage_size(storage);
    g.y = static_cast<char*>(whole.y) + bytes * g.y_row;
    if (g.residual) g.residual = static_cast<const char*>(whole.residual) + bytes * g.residual_row;
  }
};

void run(const Pointwise& op) {
  const Conv& conv = op.conv;
  const GemmTile& whole = op.whole;
  const int64_t stored = storage_size(op.storage);
  if (whole.rows == 0 || whole.cols == 0) return;
  if (op.in_place() && op.dense()) return gemm_on_threads(op.table, whole);
  if (op.in_place() && !whole.in_planes && conv.out_w >= kWideRow && conv.c * whole.cols * stored <= kTileBytes) {
    // A row of the output reads pixels that are equally far apart: no copy.
    for_each(conv.n * conv.out_h, [&](int64_t i) {
      const int64_t n = i / conv.out_h, ih = i % conv.out_h * conv.window.stride_h;
      GemmTile g = whole;
      g.rows = conv.out_w;
      g.a = bytes_of(op.x) + (n * conv.h + ih) * conv.w * conv.c * stored;
      g.a_row = conv.window.stride_w * conv.c;
      op.to_pixel(g, i * conv.out_w);
      multiply(op.table, g);
    });
    return;
  }
  const int64_t tiles = round_up(ceil_div(whole.rows, op.fitting()), torch::stable::get_num_threads());
  const int64_t pixels = round_up(ceil_div(whole.rows, tiles), rows_together(op.table, whole));
  for_each(ceil_div(whole.rows, pixels),
           [&](int64_t i) { op.pixels(i * pixels, std::min(pixels, whole.rows - i * pixels)); });
}

}  // namespace

Prologue gated(const Maybe& gate, const Tensor& x) {
  if (!gate) return {std::nullopt, std::nullopt, 0};
  STD_TORCH_CHECK(gate->dim() == 4 && gate->size(0) == x.size(0) && gate->size(1) == x.size(1) && gate->size(2) == 1 &&
                      gate->size(3) == 1,
                  "gate must have shape (", x.size(0), ", ", x.size(1), ", 1, 1)");
  return {torch::stable::contiguous(to_dtype(*gate, compute_dtype(storage_of(x, "x")))), std::nullopt, 0};
}

Tensor pointwise_conv2d_packed(Tensor x, Tensor packed, Maybe gate, Maybe residual, int64_t out_channels, Ints stride,
                               int64_t activation_code, int64_t backend) {
  check_backend(backend);
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  const Pointwise op(x, packed, rs, out_channels, stride, gated(gate, x), activation_code);
  check_residual(residual, x, op.conv.n, out_channels, op.conv.out_h, op.conv.out_w);
  run(op);
  return in_format_of(x, op.y);
}

Tensor pointwise_conv2d(Tensor x, Tensor weight, Maybe bias, Maybe gate, Maybe residual, Ints stride,
                        int64_t activation_code, int64_t backend) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  const Tensor packed = pack_pointwise_conv2d(weight, bias);
  return pointwise_conv2d_packed(x, packed, gate, residual, weight.size(0), stride, activation_code, backend);
}

std::tuple<Tensor, Tensor, Tensor> pointwise_conv2d_stats(Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift,
                                                          Ints stride, int64_t pre_activation, int64_t backend) {
  check_backend(backend);
  check_scale_shift(scale, shift, x);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  const Tensor packed = pack_pointwise_conv2d(weight, bias);
  const Pointwise op(x, packed, std::nullopt, weight.size(0), stride, prologue_of(scale, shift, pre_activation), 0);
  // A tile's result stays in L2 until it is summed.
  constexpr int64_t kPixels = 256;
  const int64_t unit = rows_together(op.table, op.whole);
  PixelSums sums(op.y, std::max(unit, std::min(op.fitting(), kPixels) / unit * unit));
  for_each(sums.count(), [&](int64_t i) {
    const auto [begin, end] = sums[i];
    op.pixels(begin, end - begin);
    sums.add(i);
  });
  return {in_format_of(x, op.y), sums.sum(), sums.squares()};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("pointwise_conv2d", TORCH_BOX(&cnnfast::cpu::pointwise_conv2d));
  m.impl("pointwise_conv2d_packed", TORCH_BOX(&cnnfast::cpu::pointwise_conv2d_packed));
  m.impl("pointwise_conv2d_stats", TORCH_BOX(&cnnfast::cpu::pointwise_conv2d_stats));
  m.impl("pack_pointwise_conv2d", TORCH_BOX(&cnnfast::cpu::pack_pointwise_conv2d));
}
