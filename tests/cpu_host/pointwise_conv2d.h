// csrc/cpu/kernels/pointwise_conv2d.h and amx_bf16.h against plain loops in double.
#pragma once
#include "depthwise_conv2d.h"

namespace host {

class PointwiseTester : public DepthwiseTester {
 public:
  using DepthwiseTester::DepthwiseTester;

 protected:
  void gemm() {
    const int64_t rows = 1 + random_.below(18), depth = random_.one_of({1, 2, 16, 23, 384, 385, 800});
    const int64_t cols = random_.one_of(kSizes), panels = (cols + kPanel - 1) / kPanel,
                  act = random_.below(kActivations);
    // Transposed: as the left side of a weight's gradient lies.
    const bool transposed = random_.below(2), biased = random_.below(3) > 0, added = random_.below(2);
    const int64_t a_row = transposed ? 1 : depth + random_.below(3), a_depth = transposed ? rows : 1;
    const int64_t b_panel = depth * kPanel;
    const int64_t y_row = cols + random_.below(3), residual_row = cols + random_.below(3);
    context("rows", rows, "depth", depth, "cols", cols, "transposed", transposed, "bias", biased, "residual", added,
            "activation", act);
    Buffer a(compute_, (rows - 1) * a_row + (depth - 1) * a_depth + 1);
    Buffer b(compute_, panels * b_panel);
    Buffer bias(compute_, panels * kPanel), y(output_storage(), (rows - 1) * y_row + cols);
    Buffer residual(y.storage(), (rows - 1) * residual_row + cols);
    a.draw(random_), b.draw(random_), bias.draw(random_), residual.draw(random_);
    GemmTile tile{a.data(),
                  a_row,
                  a_depth,
                  b.data(),
                  b_panel,
                  biased ? bias.data() : nullptr,
                  added ? residual.data() : nullptr,
                  residual_row,
                  y.data(),
                  y_row,
                  compute_,
                  compute_,
                  y.storage(),
                  rows,
                  depth,
                  cols,
                  activation(act)};
    tile.chain = random_.one_of({0, 0, 5, 64});
    table_.gemm[pair()](tile);
    for (int64_t i = 0; i < y.count(); ++i) {
      const int64_t row = i / y_row, column = i % y_row;
      if (column >= cols) {
        expect_gap("gemm", y, i);
        continue;
      }
      double sum = (biased ? bias[column] : 0) + (added ? residual[row * residual_row + column] : 0);
      double size = std::abs(biased ? bias[column] : 0) + std::abs(added ? residual[row * residual_row + column] : 0);
      for (int64_t k = 0; k < depth; ++k) {
        const double term = a[row * a_row + k * a_depth] * b[column / kPanel * b_panel + k * kPanel + column % kPanel];
        sum += term;
        size += std::abs(term);
      }
      const double ref = activated(act, sum);
      expect("gemm", y, i, ref, size, depth, act < kFirstCurve ? 0 : kCurveError * std::abs(ref));
    }
  }

  // b as packing.h lays out bfloat16: in pairs of the depth, zeros up to a tile of AMX and a whole panel.
  static int64_t pair_index(int64_t padded, int64_t k, int64_t column) {
    return column / kPanel * padded * kPanel + k / 2 * 2 * kPanel + column % kPanel * 2 + k % 2;
  }

  void unpair() {
    const int64_t pairs = 1 + random_.below(40);
    context("pairs", pairs);
    Buffer from(Storage::bf16, pairs * 2 * kPanel), to(Storage::f32, pairs * 2 * kPanel), scale(Storage::f32, kPanel);
    from.draw(random_), scale.draw(random_);
    table_.unpair(from.data(), scale.data(), to.data(), pairs);
    for (int64_t i = 0; i < to.count(); ++i) {
      const double product = from[pair_index(2 * pairs, i / kPanel, i % kPanel)] * scale[i % kPanel];
      const double ref = static_cast<float>(product);
      if (to[i] != ref || fault_ == "unpair") fail("unpair", i, to[i], ref, 0);
    }
  }

  void gemm_bf16() {
    compute_ = Storage::f32;
    const LeftSide left(random_);
    const int64_t rows = left.rows, depth = left.depth, padded = left.padded;
    const int64_t cols = random_.one_of(kSizes), panels = (cols + kPanel - 1) / kPanel,
                  act = random_.below(kActivations);
    const int64_t y_row = cols + random_.below(3), residual_row = cols + random_.below(3);
    const bool added = random_.below(2);
    context("rows", rows, "depth", depth, "cols", cols, "residual", added, "activation", act, "windows", left.windows,
            "line", left.line, "tap_depth", left.tap_depth, "taps", left.taps);
    Buffer a(Storage::bf16, left.scalars()), b(Storage::bf16, panels * padded * kPanel);
    Buffer bias(Storage::f32, panels * kPanel), scale(Storage::f32, panels * kPanel);
    Buffer y(output_storage(), (rows - 1) * y_row + cols), residual(y.storage(), (rows - 1) * residual_row + cols);
    a.draw(random_), bias.draw(random_), scale.draw(random_), residual.draw(random_);
    for (int64_t k = 0; k < padded; ++k)
      for (int64_t column = 0; column < panels * kPanel; ++column)
        b.set(pair_index(padded, k, column), k < depth && column < cols ? random_.number() : 0);
    GemmTile tile{};
    left.describe(tile);
    tile.a = a.data(), tile.b = b.data(), tile.b_panel = padded * kPanel;
    tile.bias = bias.data(), tile.residual = added ? residual.data() : nullptr, tile.residual_row = residual_row;
    tile.y = y.data(), tile.y_row = y_row, tile.b_storage = Storage::bf16, tile.y_storage = y.storage();
    tile.cols = cols, tile.activation = activation(act), tile.scale = scale.data();
    table_.gemm_bf16(tile);
    for (int64_t i = 0; i < y.count(); ++i) {
      const int64_t row = i / y_row, column = i % y_row;
      if (column >= cols) {
        expect_gap("gemm_bf16", y, i);
        continue;
      }
      double sum = bias[column] + (added ? residual[row * residual_row + column] : 0);
      double size = std::abs(bias[column]) + std::abs(added ? residual[row * residual_row + column] : 0);
      for (int64_t k = 0; k < depth; ++k) {
        const double term = a[left.at(row, k)] * b[pair_index(padded, k, column)] * scale[column];
        sum += term;
        size += std::abs(term);
      }
      const double ref = activated(act, sum);
      expect("gemm_bf16", y, i, ref, size, depth, act < kFirstCurve ? 0 : kCurveError * std::abs(ref));
    }
  }
};

}  // namespace host
