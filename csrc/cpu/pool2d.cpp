// Max and average pooling of an image on the CPU, for networks that are one call (packed_sequence.cpp).
// Tiling: a row of the output a task.
#include "ops.h"

namespace cnnfast::cpu {

namespace {

using Kernel = void (*)(const Pool2dTile&);

// Windows of one dimension, as PyTorch counts them: with ceil_mode also one that reaches beyond the padding, if it begins
// before that.
int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  STD_TORCH_CHECK(kernel > 0 && stride > 0 && padding >= 0 && 2 * padding <= kernel,
                  "pooling must have a positive kernel and stride, and a padding of at most half the kernel");
  const int64_t beyond = size + 2 * padding - kernel;
  STD_TORCH_CHECK(size > 0 && beyond >= 0, "pooling's kernel is larger than the padded input");
  const int64_t count = (ceil_mode ? ceil_div(beyond, stride) : beyond / stride) + 1;
  return ceil_mode && (count - 1) * stride >= size + padding ? count - 1 : count;
}

Tensor pooled(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding, bool ceil_mode,
              bool count_include_pad, Kernel (KernelTable::*of)[kStorages]) {
  const Storage storage = storage_of(x, "x");
  const Kernel kernel = (kernels(storage).*of)[static_cast<int>(storage)];
  const auto [n, c, h, w] = size_of(x);
  const ImageSize size = pooled_size(size_of(x), kernel_size, stride, padding, ceil_mode);
  const int64_t out_h = size.h, out_w = size.w;
  const Tensor xs = channels_last(x), y = empty_channels_last(x, n, c, out_h, out_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);
  const int64_t itemsize = storage_size(storage), y_pixel = pixel_of(y);
  for_each(n * out_h, [&](int64_t i) {
    const int64_t row = i % out_h;
    kernel({.x = bytes_of(xs) + i / out_h * h * w * c * itemsize,
            .x_first_row = 0,
            .height = h,
            .width = w,
            .channels = c,
            .y = mutable_bytes_of(y) + i * out_w * y_pixel * itemsize,
            .y_storage = storage,
            .y_pixel = y_pixel,
            .row_begin = row,
            .row_end = row + 1,
            .out_width = out_w,
            .window = {kernel_size[0], kernel_size[1], stride[0], stride[1], 1, 1, padding[0], padding[1]},
            .count_include_pad = count_include_pad});
  });
  return in_format_of(x, y);
}

}  // namespace

ImageSize pooled_size(const ImageSize& x, const Ints& kernel_size, const Ints& stride, const Ints& padding,
                      bool ceil_mode) {
  STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2,
                  "pooling must be by pairs of sizes");
  return {x.n, x.c, windows(x.h, kernel_size[0], stride[0], padding[0], ceil_mode),
          windows(x.w, kernel_size[1], stride[1], padding[1], ceil_mode)};
}

Tensor max_pool2d(Tensor x, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode) {
  return pooled(x, kernel_size, stride, padding, ceil_mode, false, &KernelTable::max_pool2d);
}

Tensor avg_pool2d(Tensor x, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode, bool count_include_pad) {
  return pooled(x, kernel_size, stride, padding, ceil_mode, count_include_pad, &KernelTable::avg_pool2d);
}

}  // namespace cnnfast::cpu
