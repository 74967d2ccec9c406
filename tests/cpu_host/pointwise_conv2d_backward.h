// csrc/cpu/kernels/pointwise_conv2d_backward.h, amx_operand.h and transpose.h against plain loops in double.
#pragma once
#include "pointwise_conv2d.h"

namespace host {

class PointwiseBackwardTester : public PointwiseTester {
 public:
  using PointwiseTester::PointwiseTester;

 protected:
  // operand, or operand_bf16: where it gives bfloat16, panels are of pairs, and there are columns.
  void operand(Storage storage, Storage to) {
    const char* const name = to == Storage::bf16 ? "operand_bf16" : "operand";
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const bool pairs = to == Storage::bf16, scaled = random_.below(2), shifted = random_.below(2),
               added = random_.below(2);
    const int64_t pixels = 1 + random_.below(70), c = random_.one_of(kSizes), x_pixel = c + random_.below(3);
    const int64_t act = random_.below(kActivations), panels = round_up(c, kPanel) / kPanel;
    const int64_t depth = pairs ? round_up(pixels, kPairDepth) : pixels, panel = (depth + random_.below(3)) * kPanel;
    const int64_t row = (pairs ? round_up(c, kPairDepth) : c) + random_.below(3), column = depth + random_.below(3);
    context("storage", static_cast<int>(storage), "pixels", pixels, "channels", c, "scale", scaled, "shift", shifted,
            "residual", added, "activation", act);
    Buffer x(storage, (pixels - 1) * x_pixel + c), residual(storage, x.count()), scale(compute_, c), shift(compute_, c);
    Buffer rows(to, (pixels - 1) * row + (pairs ? round_up(c, kPairDepth) : c));
    Buffer side(to, (panels - 1) * panel + depth * kPanel), columns(to, (c - 1) * column + depth);
    x.draw(random_), residual.draw(random_), scale.draw(random_), shift.draw(random_);
    const OperandTile t{x.data(),
                        added ? residual.data() : nullptr,
                        x_pixel,
                        scaled ? scale.data() : nullptr,
                        shifted ? shift.data() : nullptr,
                        pixels,
                        c,
                        activation(act),
                        rows.data(),
                        row,
                        side.data(),
                        panel,
                        pairs ? columns.data() : nullptr,
                        column};
    pairs ? table_.operand_bf16(t) : table_.operand[static_cast<int>(storage)](t);
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t k = 0; k < c; ++k) {
        const int64_t at = pixel * x_pixel + k;
        const double product = x[at] * (scaled ? scale[k] : 1),
                     before = (shifted ? shift[k] : 0) + (added ? residual[at] : 0);
        const double size = std::abs(product) + std::abs(shifted ? shift[k] : 0) + std::abs(added ? residual[at] : 0);
        const double ref = activated(act, product + before),
                     error = act < kFirstCurve ? 0 : kCurveError * std::abs(ref);
        const int64_t in_panel =
            pairs ? pixel / 2 * 2 * kPanel + k % kPanel * 2 + pixel % 2 : pixel * kPanel + k % kPanel;
        expect(name, rows, pixel * row + k, ref, size, 3, error);
        expect(name, side, k / kPanel * panel + in_panel, ref, size, 3, error);
        if (pairs) expect(name, columns, k * column + pixel, ref, size, 3, error);
      }
    // Pixels beyond the last, up to whole tiles.
    for (int64_t k = 0; pairs && k < c; ++k)
      for (int64_t pixel = pixels; pixel < depth; ++pixel) expect(name, columns, k * column + pixel, 0, 0, 1);
    for (int64_t i = 0; i < rows.count(); ++i)
      if (i % row >= (pairs ? round_up(c, kPairDepth) : c)) expect_gap(name, rows, i);
  }

  void grad_input(Storage storage) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const bool scaled = random_.below(2), shifted = random_.below(2), wanted = random_.below(4);
    const int64_t pixels = 1 + random_.below(40), c = random_.one_of(kSizes), x_pixel = c + random_.below(3);
    const int64_t grad_row = c + random_.below(3), act = random_.below(kActivations);
    context("storage", static_cast<int>(storage), "pixels", pixels, "channels", c, "scale", scaled, "shift", shifted,
            "activation", act);
    Buffer x(storage, (pixels - 1) * x_pixel + c), dx(storage, x.count()), grad(compute_, (pixels - 1) * grad_row + c);
    Buffer scale(compute_, c), shift(compute_, c), sums(compute_, c), by_x(compute_, c);
    x.draw(random_), grad.draw(random_), scale.draw(random_), shift.draw(random_);
    for (int64_t k = 0; k < c; ++k) sums.set(k, 1), by_x.set(k, 2);
    table_.grad_input[static_cast<int>(storage)](
        {grad.data(), grad_row, x.data(), wanted ? dx.data() : nullptr, x_pixel, scaled ? scale.data() : nullptr,
         shifted ? shift.data() : nullptr, pixels, c, activation(act), sums.data(), by_x.data()});
    for (int64_t k = 0; k < c; ++k) {
      double sum = 1, weighted = 2, size = 1, weighted_size = 2, error = 0, weighted_error = 0;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const int64_t at = pixel * x_pixel + k;
        const double factor = scaled ? scale[k] : 1, z = x[at] * factor + (shifted ? shift[k] : 0),
                     g = grad[pixel * grad_row + k];
        // The slope of a rounded z: it bends by less than 1.
        const double dz = g * slope(act, z), roundings = std::abs(x[at] * factor) + std::abs(shifted ? shift[k] : 0);
        const double off = act < kFirstCurve ? 0 : (2 + kSlopeError + 2 * roundings) * std::abs(g);
        sum += dz, size += std::abs(dz), error += off;
        weighted += dz * x[at], weighted_size += std::abs(dz * x[at]), weighted_error += off * std::abs(x[at]);
        if (wanted) expect("grad_input", dx, at, dz * factor, std::abs(dz * factor), 1, off * std::abs(factor));
      }
      expect("grad_input", sums, k, sum, size, pixels, error);
      expect("grad_input", by_x, k, weighted, weighted_size, pixels, weighted_error);
    }
  }

  void transpose() {
    compute_ = Storage::f32;
    const int64_t rows = 1 + random_.below(40), columns = 1 + random_.below(40), from_row = columns + random_.below(3),
                  to_row = rows + random_.below(3);
    context("rows", rows, "columns", columns);
    Buffer from(Storage::f32, (rows - 1) * from_row + columns), to(Storage::f32, (columns - 1) * to_row + rows);
    from.draw(random_);
    table_.transpose({from.data(), from_row, rows, columns, to.data(), to_row});
    for (int64_t i = 0; i < to.count(); ++i) {
      const int64_t row = i % to_row;
      if (row >= rows)
        expect_gap("transpose", to, i);
      else
        expect("transpose", to, i, from[row * from_row + i / to_row], 0, 1);
    }
  }
};

}  // namespace host
