#include "stages.h"

namespace cnnfast::cpu {

Bands bands_of(const Conv& conv, int64_t row_bytes, int64_t halo, int64_t weight_bytes) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t out_h = std::max<int64_t>(conv.out_h, 1), n = std::max<int64_t>(conv.n, 1);
  const auto bands_within = [&](int64_t bytes) {
    return ceil_div(out_h, std::clamp<int64_t>(bytes / std::max<int64_t>(row_bytes, 1), 1, out_h));
  };
  const auto rows_of = [&](int64_t per_image) { return ceil_div(out_h, per_image); };
  // Rows that two bands both compute: up to two of seven, of bands that are nearly alike.
  const auto may_be = [&](int64_t per_image) {
    return 7 * (per_image - 1) * halo <= 2 * conv.h && 8 * rows_of(per_image) * per_image <= 9 * out_h;
  };
  const auto uneven = [&](int64_t per_image) {
    const int64_t count = n * ceil_div(out_h, rows_of(per_image));
    return count % threads != 0 && count < 4 * threads;
  };
  // Weights that are many times the image: rather a larger tile than to read them again for each band.
  const int64_t image_bytes = out_h * row_bytes;
  if (weight_bytes > 8 * image_bytes && image_bytes <= 4 * kTileBytes) return {out_h, 1, conv.n, conv.out_h};
  int64_t per_image = bands_within(kTileBytes);
  // Bands that a halo dominates: rather a larger tile.
  if (8 * (per_image - 1) * halo > conv.h) per_image = bands_within(4 * kTileBytes);
  // Bands that leave threads idle at the end: rather a few more or fewer.
  if (uneven(per_image)) {
    for (int64_t change : {1, -1, 2, -2, 3}) {
      const int64_t other = per_image + change;
      if (other > 1 && other <= out_h && may_be(other) && !uneven(other)) {
        per_image = other;
        break;
      }
    }
  }
  const int64_t rows = rows_of(per_image);
  per_image = ceil_div(out_h, rows);
  return {rows, per_image, conv.n * per_image, conv.out_h};
}

// Input rows that output rows [begin, end) read.
std::pair<int64_t, int64_t> input_rows(const Conv& conv, int64_t begin, int64_t end) {
  const Window& w = conv.window;
  const int64_t first = begin * w.stride_h - w.pad_top;
  const int64_t last = (end - 1) * w.stride_h - w.pad_top + (w.kernel_h - 1) * w.dilation_h;
  return {std::clamp<int64_t>(first, 0, conv.h), std::clamp<int64_t>(last + 1, 0, conv.h)};
}

DepthwiseTile depthwise_tile(const Conv& conv, const DepthwiseWeights& weights, Storage y_storage,
                             int64_t pre_activation, int64_t activation_code) {
  DepthwiseTile t{};
  t.y_storage = y_storage;
  t.height = conv.h;
  t.width = conv.w;
  t.weight = weights.taps;
  t.weight_tap = weights.padded;
  t.bias = weights.bias;
  t.out_width = conv.out_w;
  t.channels = weights.channels;
  t.multiplier = 1;
  t.window = conv.window;
  t.pre_activation = activation(pre_activation);
  t.activation = activation(activation_code);
  return t;
}

DepthwiseStage::DepthwiseStage(const Conv& conv, const Tensor& x, const DepthwiseWeights& weights, Storage y_storage,
                               const Prologue& prologue, int64_t activation_code)
    : storage(storage_of(x, "x")),
      table(kernels(storage)),
      conv(conv),
      x(x),
      prologue(prologue),
      tile(depthwise_tile(conv, weights, y_storage, prologue.scale ? 0 : prologue.activation, activation_code)) {
  tile.multiplier = weights.channels / conv.c;
  tile.x_pixel = conv.c;
  tile.x_row = conv.w * conv.c;
}

void DepthwiseStage::rows(int64_t n, int64_t begin, int64_t end, char* y) const {
  const char* const image = bytes_of(x) + n * conv.h * tile.x_row * storage_size(storage);
  DepthwiseTile t = tile;
  if (!prologue.scale) {
    t.x = image;
    t.row_begin = begin;
    t.row_end = end;
    t.y = y;
    table.depthwise[static_cast<int>(storage)](t);
    return;
  }
  const int64_t scalar = compute_size(storage), fitting = kTileBytes / std::max<int64_t>(1, tile.x_row * scalar);
  const int64_t step = std::max<int64_t>(4, fitting / conv.window.stride_h);
  for (int64_t from = begin; from < end; from += step) {
    t.row_begin = from;
    t.row_end = std::min(from + step, end);
    const auto [first, last] = input_rows(conv, t.row_begin, t.row_end);
    char* const scaled = scratch(Slot::gathered, std::max<int64_t>(1, (last - first) * tile.x_row * scalar));
    prologue.apply(table, storage, n, image + first * tile.x_row * storage_size(storage), conv.c,
                   (last - first) * conv.w, conv.c, scaled, compute_storage(storage), conv.c);
    t.x = scaled;
    t.x_first_row = first;
    t.y = y + (from - begin) * tile.y_row * storage_size(tile.y_storage);
    table.depthwise[static_cast<int>(compute_storage(storage))](t);
  }
}

}  // namespace cnnfast::cpu
