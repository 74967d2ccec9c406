#include "stages.h"

#include <cstring>

namespace cnnfast::cpu {

Bands bands_of(const Conv& conv, int64_t row_bytes, int64_t halo, int64_t weight_bytes) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t out_h = std::max<int64_t>(conv.out_h, 1), n = std::max<int64_t>(conv.n, 1);
  const auto bands_within = [&](int64_t bytes) {
    return ceil_div(out_h, std::clamp<int64_t>(bytes / std::max<int64_t>(row_bytes, 1), 1, out_h));
  };
  const auto rows_of = [&](int64_t per_image) { return ceil_div(out_h, per_image); };
  const auto halo_is_small = [&](int64_t per_image) { return rows_of(per_image) * conv.window.stride_h >= 4 * halo; };
  const auto uneven = [&](int64_t per_image) {
    const int64_t count = n * ceil_div(out_h, rows_of(per_image));
    return count % threads != 0 && count < 4 * threads;
  };
  // Weights that are many times the image: rather a larger tile than to read them again for each band.
  const int64_t image_bytes = out_h * row_bytes;
  if (weight_bytes > 8 * image_bytes && image_bytes <= 4 * kTileBytes) return {out_h, 1, conv.n, conv.out_h};
  int64_t per_image = bands_within(kTileBytes);
  // Bands that a halo dominates: rather a larger tile.
  if (!halo_is_small(per_image)) per_image = bands_within(4 * kTileBytes);
  // Bands that leave threads idle at the end: rather a few more or fewer.
  if (per_image > 1 && uneven(per_image)) {
    for (int64_t change : {1, -1, 2, -2, 3}) {
      const int64_t other = per_image + change;
      if (other > 1 && other <= out_h && halo_is_small(other) && !uneven(other)) {
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

GemmTile packed_gemm(const PointwiseWeights& weights, Storage a_storage, Storage y_storage, int64_t activation_code) {
  GemmTile g{};
  g.a_depth = 1;
  g.b = weights.panels;
  g.b_panel = weights.panel();
  g.b_depth = kPanel;
  g.bias = weights.bias;
  g.scale = weights.scale;
  g.a_storage = a_storage;
  g.b_storage = weights.storage;
  g.y_storage = y_storage;
  g.depth = weights.in;
  g.cols = weights.out;
  g.packed = true;
  g.activation = activation(activation_code);
  return g;
}

Storage operand_storage(const KernelTable& table, Storage storage, const PointwiseWeights& weights) {
  return weights.storage == Storage::bf16 && table.gemm_bf16 ? Storage::bf16 : compute_storage(storage);
}

void clear_tail(const GemmTile& tile, char* rows, int64_t pixels) {
  const int64_t tail = round_up(tile.depth, kPairDepth) - tile.depth;
  if (tile.a_storage != Storage::bf16 || tail == 0) return;
  for (int64_t i = 0; i < pixels; ++i) std::memset(rows + (i * tile.a_row + tile.depth) * 2, 0, tail * 2);
}

void copy_padded(const GemmTile& tile, const char* from, char* rows, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i)
    std::memcpy(rows + i * tile.a_row * 2, from + i * tile.depth * 2, tile.depth * 2);
  clear_tail(tile, rows, pixels);
}

namespace {

template <class P>
P* offset(P* p, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return p ? static_cast<Byte*>(p) + bytes : p;
}

}  // namespace

void multiply(const KernelTable& table, const GemmTile& tile) {
  if (tile.a_storage == Storage::bf16) return table.gemm_bf16(tile);
  const auto gemm = table.gemm[compute_index(tile.b_storage)];
  if (tile.b_storage != Storage::bf16) return gemm(tile);
  // Panels as floats, times their scales, a few at a time.
  constexpr int64_t kTogether = 4;
  const int64_t panels = ceil_div(tile.cols, kPanel);
  for (int64_t panel = 0; panel < panels; panel += kTogether) {
    const int64_t count = std::min(kTogether, panels - panel),
                  cols = std::min(count * kPanel, tile.cols - panel * kPanel);
    GemmTile g = columns_of(tile, panel * kPanel, cols);
    char* const floats = scratch(Slot::panels, count * tile.b_panel * 4);
    for (int64_t p = 0; p < count; ++p)
      table.unpair(static_cast<const char*>(g.b) + p * tile.b_panel * 2, offset(g.scale, p * kPanel * 4),
                   floats + p * tile.b_panel * 4, tile.b_panel / kPanel / 2);
    g.b = floats;
    g.b_storage = Storage::f32;
    gemm(g);
  }
}

namespace {

GemmTile rows_of(const GemmTile& whole, int64_t row, int64_t rows) {
  GemmTile g = whole;
  const int64_t stored = storage_size(whole.y_storage);
  const int64_t scalars = whole.line ? row / whole.line * whole.a_line : row * whole.a_row;
  g.a = offset(whole.a, scalars * storage_size(whole.a_storage));
  g.residual = offset(whole.residual, row * whole.residual_row * stored);
  g.y = offset(whole.y, row * whole.y_row * stored);
  g.rows = rows;
  return g;
}

// Parts of a job: equal shares, one a thread, each in pieces of `most` units or less.
struct Pieces {
  Pieces(int64_t all, int64_t shares, int64_t most)
      : units(all), per_share(ceil_div(all, shares)), per_piece(ceil_div(per_share, most)), count(shares * per_piece) {}
  // The units of part k; none at the end of a short last share.
  std::pair<int64_t, int64_t> operator[](int64_t k) const {
    const int64_t begin = k / per_piece * per_share, piece = k % per_piece;
    const auto at = [&](int64_t i) { return std::min(units, begin + i * per_share / per_piece); };
    return {at(piece), at(piece + 1)};
  }
  int64_t units, per_share, per_piece, count;
};

}  // namespace

GemmTile columns_of(const GemmTile& whole, int64_t col, int64_t cols) {
  GemmTile g = whole;
  const int64_t stored = storage_size(whole.y_storage);
  g.b = offset(whole.b, col / kPanel * whole.b_panel * storage_size(whole.b_storage));
  g.bias = offset(whole.bias, col * compute_size(whole.b_storage));
  g.scale = offset(whole.scale, col * 4);
  g.residual = offset(whole.residual, col * stored);
  g.y = offset(whole.y, col * stored);
  g.cols = cols;
  return g;
}

void gemm_in_parts(const Worker& worker, const KernelTable& table, const GemmTile& whole) {
  const int64_t threads = torch::stable::get_num_threads();
  // Parts of the larger operand; the smaller one is read for each of them.
  const bool by_rows = whole.rows >= whole.cols, bf16 = whole.a_storage == Storage::bf16;
  const int64_t row_unit = whole.line ? whole.line : bf16 ? kPairDepth : table.gemm_rows;
  const int64_t unit = by_rows ? row_unit : bf16 ? 2 * kPanel : kPanel, size = by_rows ? whole.rows : whole.cols;
  const int64_t units = ceil_div(size, unit), most = by_rows ? std::max<int64_t>(8, units / (4 * threads)) : 4;
  const Pieces pieces(units, std::clamp<int64_t>(units / (bf16 ? 1 : 4), 1, threads), most);
  worker.each_part(pieces.count, [&](int64_t k) {
    const auto [begin, end] = pieces[k];
    if (begin == end) return;
    const int64_t first = begin * unit, count = std::min(end * unit, size) - first;
    multiply(table, by_rows ? rows_of(whole, first, count) : columns_of(whole, first, count));
  });
}

void gemm_on_threads(const KernelTable& table, const GemmTile& whole) {
  if (whole.rows == 0 || whole.cols == 0) return;
  // Blocks of rows, one a thread or as many as fill a tile; all rows in one where the weights are the larger operand, so
  // that those are read once.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t unit = whole.a_storage == Storage::bf16 ? 32 : table.gemm_rows, units = ceil_div(whole.rows, unit);
  const int64_t row_bytes = std::max<int64_t>(1, whole.depth * storage_size(whole.a_storage));
  const int64_t fitting = std::max<int64_t>(1, kTileBytes / 2 / (row_bytes * unit));
  int64_t block = ceil_div(units, threads);
  if (block > fitting) block = ceil_div(units, round_up(ceil_div(units, fitting), threads));
  if (whole.cols > whole.rows && whole.cols >= 4 * threads * kPanel) block = units;
  for_each(ceil_div(units, block), [&](const Worker& worker, int64_t i) {
    const int64_t row = i * block * unit, rows = std::min(block * unit, whole.rows - row);
    gemm_in_parts(worker, table, rows_of(whole, row, rows));
  });
}

}  // namespace cnnfast::cpu
