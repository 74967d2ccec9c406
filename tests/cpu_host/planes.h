// csrc/cpu/kernels/amx_planes.h: parts add up to the floats, and their products are those of the floats.
#pragma once
#include "pool2d.h"

namespace host {

class PlanesTester : public Pool2dTester {
 public:
  using Pool2dTester::Pool2dTester;

 protected:
  // Scalar i of each plane, added up.
  static double sum_of(const Buffer& planes, int64_t i, int64_t plane) {
    double sum = 0;
    for (int64_t p = 0; p < kPlanes; ++p) sum += planes[i + p * plane];
    return sum;
  }
  // Now and then something that has no such sum; whether it drew any.
  bool draw_odd(Buffer& floats, int64_t begin, int64_t count) {
    if (random_.below(8)) return false;
    constexpr double kOdd[] = {0x1p-91, -0x1p-140, 0x1.fffffep127, kInf, -kInf};
    const int64_t at = begin + random_.below(count), which = random_.below(6);
    floats.set(at, which < 5 ? kOdd[which] : std::nan(""));
    return true;
  }

  void split_rows() {
    const int64_t rows = 1 + random_.below(20), depth = random_.one_of({1, 16, 31, 32, 33, 64, 97, 728});
    const int64_t padded = round_up(depth, kPairDepth), from_row = depth + random_.below(3);
    const int64_t plane = padded + random_.below(3), to_row = kPlanes * plane + random_.below(3);
    context("rows", rows, "depth", depth);
    Buffer from(Storage::f32, (rows - 1) * from_row + depth), to(Storage::bf16, rows * to_row);
    from.draw(random_);
    std::vector<uint8_t> odd(rows, 7), drawn(rows);
    for (int64_t r = 0; r < rows; ++r) drawn[r] = draw_odd(from, r * from_row, depth);
    table_.split_rows({from.data(), from_row, rows, depth, to.data(), to_row, plane, odd.data()});
    for (int64_t r = 0; r < rows; ++r) {
      if (odd[r] != drawn[r]) fail("split_rows", r, odd[r], drawn[r], 0);
      for (int64_t k = 0; k < padded && !odd[r]; ++k) {
        const double ref = k < depth ? from[r * from_row + k] : 0, got = sum_of(to, r * to_row + k, plane);
        if (got != ref || fault_ == "split_rows") fail("split_rows", r * depth + k, got, ref, 0);
      }
    }
  }

  // Where a weight is in a panel's planes, and how far they are apart.
  static int64_t plane_index(int64_t k, int64_t column) {
    return (k / kPairDepth * kPlanes * kPairDepth + k % kPairDepth / 2 * 2) * kPanel + column * 2 + k % 2;
  }
  static constexpr int64_t kPlane = kPairDepth * kPanel;

  void expect_panels(const char* function, const Buffer& from, const PanelsTile& t, const Buffer& to) {
    for (int64_t p = 0; p < t.count; ++p)
      for (int64_t k = 0; k < round_up(t.depth, kPairDepth); ++k)
        for (int64_t column = 0; column < kPanel; ++column) {
          const double ref = k < t.depth ? from[p * t.from_panel + k * kPanel + column] : 0;
          const double got = sum_of(to, p * t.to_panel / 2 + plane_index(k, column), kPlane);
          if (got != ref || fault_ == function) fail(function, k * kPanel + column, got, ref, 0);
        }
  }

  void split_panels() {
    const int64_t count = 1 + random_.below(2), depth = random_.one_of({1, 2, 31, 32, 33, 97, 728});
    const int64_t to_panel = round_up(depth, kPairDepth) * kPlanesOfDepth;
    context("panels", count, "depth", depth);
    Buffer from(Storage::f32, count * depth * kPanel), to(Storage::bf16, count * to_panel / 2);
    from.draw(random_);
    const bool odd = draw_odd(from, 0, from.count());
    const PanelsTile t{from.data(), depth * kPanel, count, depth, to.data(), to_panel};
    if (table_.split_panels(t) == odd) fail("split_panels", 0, !odd, odd, 0);
    if (!odd) expect_panels("split_panels", from, t, to);
  }

  // The left side of a product on AMX: rows, or a convolution's windows, lines of rows with a depth of taps in rows.
  struct LeftSide {
    explicit LeftSide(Random& random)
        : windows(random.below(2) != 0),
          line(1 + random.below(windows ? 40 : 80)),
          rows(line * (windows ? 1 + random.below(4) : 1)),
          taps(1 + random.below(3)),
          tap_depth(random.one_of({kPairDepth, 2 * kPairDepth, 3 * kPairDepth})),
          depth(windows ? tap_depth * taps * (1 + random.below(3))
                        : random.one_of({1, 2, 16, 31, 32, 33, 64, 97, 728})),
          padded(round_up(depth, kPairDepth)),
          a_row((windows ? tap_depth : padded) + 2 * random.below(3)),
          a_line(line * a_row + random.below(50)),
          a_tap(tap_depth + 2 * random.below(9)),
          a_tap_line(1 + random.below(3 * tap_depth)) {}

    int64_t at(int64_t row, int64_t k) const {
      if (!windows) return row * a_row + k;
      const int64_t tap = k / tap_depth;
      return row / line * a_line + row % line * a_row + tap / taps * a_tap_line + tap % taps * a_tap + k % tap_depth;
    }
    int64_t scalars() const { return at(rows - 1, padded - 1) + 1; }
    void describe(GemmTile& tile) const {
      tile.a_row = a_row, tile.a_depth = 1, tile.a_storage = Storage::bf16, tile.rows = rows, tile.depth = depth;
      if (!windows) return;
      tile.line = line, tile.a_line = a_line, tile.tap_depth = tap_depth;
      tile.taps = taps, tile.a_tap = a_tap, tile.a_tap_line = a_tap_line;
    }

    bool windows;
    int64_t line, rows, taps, tap_depth, depth, padded, a_row, a_line, a_tap, a_tap_line;
  };

  void gemm_planes(int64_t cols) {
    compute_ = Storage::f32;
    const LeftSide left(random_);
    const int64_t rows = left.rows, depth = left.depth, padded = left.padded;
    const int64_t panels = (cols + kPanel - 1) / kPanel, act = random_.below(kActivations);
    const bool added = random_.below(2);
    const int64_t y_row = cols + random_.below(3), residual_row = cols + random_.below(3);
    const int64_t next_count = random_.below(3), panel = padded * kPlanesOfDepth;
    context("rows", rows, "depth", depth, "cols", cols, "residual", added, "activation", act, "windows", left.windows,
            "line", left.line, "tap_depth", left.tap_depth, "taps", left.taps, "next panels", next_count);
    // All floats of a as one row in planes, as those of images are.
    const int64_t scalars = left.scalars(), plane = round_up(scalars, kPairDepth);
    Buffer floats(Storage::f32, scalars), a(Storage::bf16, kPlanes * plane);
    Buffer weights(Storage::f32, panels * depth * kPanel), b(Storage::bf16, panels * panel / 2);
    Buffer next(Storage::f32, next_count * depth * kPanel), after(Storage::bf16, next_count * panel / 2);
    Buffer bias(Storage::f32, panels * kPanel), y(output_storage(), (rows - 1) * y_row + cols);
    Buffer residual(y.storage(), (rows - 1) * residual_row + cols);
    floats.draw(random_), weights.draw(random_), next.draw(random_), bias.draw(random_), residual.draw(random_);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = depth; k < padded; ++k) floats.set(left.at(row, k), 0);
    const bool odd = next_count && draw_odd(next, 0, next.count());
    uint8_t odd_row = 0;
    table_.split_rows({floats.data(), 0, 1, scalars, a.data(), 0, plane, &odd_row});
    table_.split_panels({weights.data(), depth * kPanel, panels, depth, b.data(), panel});
    GemmTile tile{};
    left.describe(tile);
    tile.a = a.data(), tile.a_plane = plane;
    tile.b = b.data(), tile.b_panel = panel / 2, tile.bias = bias.data();
    tile.residual = added ? residual.data() : nullptr, tile.residual_row = residual_row;
    tile.y = y.data(), tile.y_row = y_row, tile.y_storage = y.storage();
    tile.b_storage = Storage::f32, tile.cols = cols, tile.activation = activation(act);
    std::vector<uint8_t> odd_rows(rows);  // which are left as they are
    for (uint8_t& of : odd_rows) of = random_.below(4) == 0;
    tile.odd = odd_rows.data();
    const PanelsTile then{next.data(), depth * kPanel, next_count, depth, after.data(), panel};
    if (table_.gemm_planes(tile, then) == odd) fail("gemm_planes", 0, !odd, odd, 0);
    if (!odd) expect_panels("gemm_planes", next, then, after);
    for (int64_t i = 0; i < y.count(); ++i) {
      const int64_t row = i / y_row, column = i % y_row;
      if (column >= cols || odd_rows[row]) {
        expect_gap("gemm_planes", y, i);
        continue;
      }
      double sum = bias[column] + (added ? residual[row * residual_row + column] : 0);
      double size = std::abs(bias[column]) + std::abs(added ? residual[row * residual_row + column] : 0);
      for (int64_t k = 0; k < depth; ++k) {
        const double term = floats[left.at(row, k)] * weights[(column / kPanel * depth + k) * kPanel + column % kPanel];
        sum += term;
        size += std::abs(term);
      }
      const double ref = activated(act, sum);
      expect("gemm_planes", y, i, ref, size, depth, act < kFirstCurve ? 0 : kCurveError * std::abs(ref));
    }
  }
};

}  // namespace host
