#include "products.h"

#include <algorithm>
#include <cstring>

namespace cnnfast::cpu {

GemmTile packed_gemm(const PointwiseWeights& weights, Storage a_storage, Storage y_storage, int64_t activation_code) {
  GemmTile g{};
  g.a_depth = 1;
  g.b = weights.panels;
  g.b_panel = weights.panel();
  g.bias = weights.bias;
  g.scale = weights.scale;
  g.a_storage = a_storage;
  g.b_storage = weights.storage;
  g.y_storage = y_storage;
  g.depth = weights.in;
  g.cols = weights.out;
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

// Rows [row, row + rows): of whole lines, where a has lines.
GemmTile rows_of(const GemmTile& whole, int64_t row, int64_t rows) {
  GemmTile g = whole;
  const int64_t stored = storage_size(whole.y_storage);
  const int64_t scalars = whole.line ? row / whole.line * whole.a_line : row * whole.a_row;
  g.a = offset(whole.a, scalars * storage_size(whole.a_storage));
  g.floats = offset(whole.floats, (whole.line ? scalars : row * whole.float_row) * 4);
  if (whole.odd) g.odd += row;
  g.residual = offset(whole.residual, row * whole.residual_row * stored);
  g.y = offset(whole.y, row * whole.y_row * stored);
  g.rows = rows;
  return g;
}

// The product with b in floats, times their scales; a few panels at a time.
void multiply_unpaired(const KernelTable& table, const GemmTile& tile) {
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
    table.gemm[0](g);
  }
}

// The product with b in planes, two panels at a time; what is odd is FMA's.
void multiply_planes(const KernelTable& table, const GemmTile& tile) {
  constexpr int64_t kTogether = 2 * kPanel;
  GemmTile floats = tile;
  floats.a = tile.floats;
  floats.a_row = tile.float_row;
  floats.a_storage = Storage::f32;
  const int64_t panel = round_up(tile.depth, kPairDepth) * kPlanesOfDepth;
  char* const planes = scratch(Slot::panels, 4 * panel);  // of these panels, of the next
  const auto panels_from = [&](int64_t col) {
    const int64_t count = std::clamp<int64_t>(ceil_div(tile.cols - col, kPanel), 0, 2);
    return PanelsTile{offset(tile.b, col / kPanel * tile.b_panel * 4), tile.b_panel, count, tile.depth,
                      planes + col / kTogether % 2 * 2 * panel,        panel};
  };
  // Rows that are odd, or those that aren't. Every sum is finished once only: y may be the residual.
  const auto by_fma = [&](const GemmTile& of, uint8_t which) {
    const uint8_t* const end = tile.odd + tile.rows;
    for (const uint8_t* begin = tile.odd; (begin = std::find(begin, end, which)) != end;) {
      const uint8_t* const after = std::find(begin, end, !which);
      table.gemm[0](rows_of(of, begin - tile.odd, after - begin));
      begin = after;
    }
  };
  bool split = table.split_panels(panels_from(0));
  for (int64_t col = 0; col < tile.cols; col += kTogether) {
    GemmTile g = columns_of(tile, col, std::min(kTogether, tile.cols - col));
    g.b = panels_from(col).to;
    g.b_panel = panel / 2;
    if (split) {
      split = table.gemm_planes(g, panels_from(col + kTogether));
    } else {
      by_fma(columns_of(floats, col, g.cols), 0);
      split = table.split_panels(panels_from(col + kTogether));
    }
  }
  by_fma(floats, 1);
}

// A matrix of floats and its planes, in this thread's scratch until the next such.
struct Planes {
  // row, plane: from one to the next. bytes: of all planes.
  Planes(const void* floats, int64_t float_row, int64_t rows, int64_t depth, int64_t row, int64_t plane, int64_t bytes)
      : to(scratch(Slot::planes, bytes + rows)),
        odd(reinterpret_cast<uint8_t*>(to + bytes)),
        all{floats, float_row, rows, depth, to, row, plane, odd} {}

  void fill(const KernelTable& table, int64_t begin, int64_t end) const {
    RowsTile t = all;
    t.from = static_cast<const float*>(all.from) + begin * all.from_row;
    t.rows = end - begin;
    t.to = to + begin * 2 * all.to_row;
    t.odd = odd + begin;
    table.split_rows(t);
  }
  void fill(const Worker& worker, const KernelTable& table, int64_t rows_of_a_part) const {
    worker.each_part(ceil_div(all.rows, rows_of_a_part),
                     [&](int64_t k) { fill(table, k * rows_of_a_part, std::min((k + 1) * rows_of_a_part, all.rows)); });
  }
  GemmTile tile(const GemmTile& floats) const {
    GemmTile g = floats;
    g.a = to;
    g.a_storage = Storage::bf16;
    g.a_plane = all.to_plane;
    g.floats = floats.a;
    g.float_row = floats.a_row;
    g.odd = odd;
    return g;
  }

  char* to;
  uint8_t* odd;
  RowsTile all;
};

// Of a product of rows.
struct PlanesOfRows : Planes {
  explicit PlanesOfRows(const GemmTile& floats) : PlanesOfRows(floats, round_up(floats.depth, kPairDepth)) {}

  GemmTile tile(const GemmTile& floats) const {
    GemmTile g = Planes::tile(floats);
    g.a_row = all.to_row;
    return g;
  }

 private:
  // Rows are an odd number of lines of the cache apart.
  PlanesOfRows(const GemmTile& floats, int64_t plane)
      : PlanesOfRows(floats, plane, kPlanes * plane + (plane / kPairDepth % 2 ? 0 : kPairDepth)) {}
  PlanesOfRows(const GemmTile& floats, int64_t plane, int64_t row)
      : Planes(floats.a, floats.a_row, floats.rows, floats.depth, row, plane, floats.rows * row * 2) {}
};

bool to_be_split(const GemmTile& tile) { return tile.in_planes && tile.a_storage != Storage::bf16; }

}  // namespace

bool pays_in_planes(const KernelTable& table, const GemmTile& tile, int64_t pixels) {
  // Of an image: enough pixels, columns and products to be worth splitting the weights, the pixels and the work (measured
  // on one thread and two, docs/decisions.md).
  constexpr int64_t kPixels = 96, kColumns = 4 * kPanel, kProducts = 24'000'000;
  return table.gemm_planes && tile.a_storage == Storage::f32 && tile.b_storage == Storage::f32 && pixels >= kPixels &&
         tile.cols >= kColumns && pixels * tile.depth * tile.cols >= kProducts;
}

bool stays_in_l2(const GemmTile& tile, int64_t rows) {
  return tile.a_storage == Storage::bf16 && weight_bytes(tile) <= kStayingBytes &&
         rows >= 512 * torch::stable::get_num_threads();
}

GemmTile in_planes(const Worker& worker, const KernelTable& table, const GemmTile& whole) {
  if (!to_be_split(whole)) return whole;
  const PlanesOfRows planes(whole);
  planes.fill(worker, table, 16);
  return planes.tile(whole);
}

GemmTile windows_in_planes(const Worker& worker, const KernelTable& table, const GemmTile& whole, int64_t lines,
                           int64_t line, int64_t out_w) {
  const int64_t out_lines = whole.rows / out_w, tap_lines = whole.depth / (whole.taps * whole.tap_depth);
  const Planes planes(whole.a, line, lines, line, line, lines * line, kPlanes * lines * line * 2);
  planes.fill(worker, table, 1);
  GemmTile g = planes.tile(whole);
  // Of all windows in a line, what is odd in the lines that they read.
  auto* const odd = reinterpret_cast<uint8_t*>(scratch(Slot::odd, whole.rows));
  for (int64_t i = 0; i < out_lines; ++i) {
    const uint8_t* const first = planes.odd + i * whole.a_line / line;
    uint8_t any = 0;
    for (int64_t tap = 0; tap < tap_lines; ++tap) any |= first[tap * whole.a_tap_line / line];
    std::memset(odd + i * out_w, any, out_w);
  }
  g.odd = odd;
  return g;
}

void multiply(const KernelTable& table, const GemmTile& tile) {
  if (to_be_split(tile)) {
    const PlanesOfRows planes(tile);
    planes.fill(table, 0, tile.rows);
    return multiply_planes(table, planes.tile(tile));
  }
  if (tile.in_planes) return multiply_planes(table, tile);
  if (tile.a_storage == Storage::bf16) return table.gemm_bf16(tile);
  if (tile.b_storage == Storage::bf16) return multiply_unpaired(table, tile);
  table.gemm[compute_index(tile.b_storage)](tile);
}

namespace {

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

void gemm_in_parts(const Worker& worker, const KernelTable& table, const GemmTile& given) {
  const GemmTile whole = in_planes(worker, table, given);
  const int64_t threads = torch::stable::get_num_threads();
  // Parts of the larger operand; the smaller one is read for each of them. Weights that are split for each part: rather by
  // columns.
  const bool by_rows = whole.in_planes ? whole.cols < 4 * threads * kPanel : whole.b_stays || whole.rows >= whole.cols,
             bf16 = whole.a_storage == Storage::bf16;
  const int64_t row_unit = whole.line ? whole.line : rows_together(table, whole);
  const int64_t unit = by_rows ? row_unit : bf16 ? 2 * kPanel : kPanel, size = by_rows ? whole.rows : whole.cols;
  const int64_t units = ceil_div(size, unit),
                most = whole.in_planes && by_rows ? units
                       : by_rows                  ? std::max<int64_t>(whole.b_stays ? 2 : 8, units / (4 * threads))
                                                  : 4;
  const Pieces pieces(units, std::clamp<int64_t>(units / (bf16 ? 1 : 4), 1, threads), most);
  worker.each_part(pieces.count, [&](int64_t k) {
    const auto [begin, end] = pieces[k];
    if (begin == end) return;
    const int64_t first = begin * unit, count = std::min(end * unit, size) - first;
    multiply(table, by_rows ? rows_of(whole, first, count) : columns_of(whole, first, count));
  });
}

void gemm_on_threads(const KernelTable& table, const GemmTile& given) {
  GemmTile whole = given;
  if (whole.rows == 0 || whole.cols == 0) return;
  whole.b_stays = stays_in_l2(whole, whole.rows);
  // Blocks of rows, one a thread or as many as fill a tile; all rows in one where the weights are the larger operand, so
  // that those are read once.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t unit = rows_together(table, whole), units = ceil_div(whole.rows, unit);
  const int64_t row_bytes = std::max<int64_t>(1, whole.depth * storage_size(whole.a_storage));
  const int64_t fitting = std::max<int64_t>(1, block_bytes(whole) / (row_bytes * unit));
  int64_t block = ceil_div(units, threads);
  if (block > fitting) block = ceil_div(units, round_up(ceil_div(units, fitting), threads));
  if (whole.cols > whole.rows && whole.cols >= 4 * threads * kPanel) block = units;
  for_each(ceil_div(units, block), [&](const Worker& worker, int64_t i) {
    const int64_t row = i * block * unit, rows = std::min(block * unit, whole.rows - row);
    gemm_in_parts(worker, table, rows_of(whole, row, rows));
  });
}

}  // namespace cnnfast::cpu
