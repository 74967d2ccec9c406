// Dense conv2d on the CPU, packed form: y = activation(conv(x) + bias), a GEMM of pixels x (taps x channels).
// Tiling: a run of output pixels a task, in any order; each pixel's window is copied into a row of a tile in L2 (kernel_h
// pieces, contiguous in channels_last), zeros where it leaves the image.
// Bytes: x read about kernel_h times from L2 and once from memory, y written once, the weights read once a tile.
// Meant for first layers, few channels and many pixels, whose padding ATen has no form of (docs/decisions.md).
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

Tensor conv2d_packed(Tensor x, Tensor packed, int64_t out_channels, Ints kernel_size, Ints stride, Ints padding,
                     Ints dilation, int64_t activation_code, int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size[0], kernel_size[1], stride, padding, dilation);
  PackedReader reader(packed, PackedOp::conv2d, x, conv.c, out_channels, kernel_size[0], kernel_size[1]);
  const PointwiseWeights weights = reader.pointwise(conv.c * kernel_size[0] * kernel_size[1], out_channels);
  const Tensor xs = channels_last(x);
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
    g.y_row = out_channels;
    multiply(table, g);
  });
  return in_format_of(x, y);
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("conv2d_packed", TORCH_BOX(&cnnfast::cpu::conv2d_packed));
  m.impl("pack_conv2d", TORCH_BOX(&cnnfast::cpu::pack_conv2d));
}
