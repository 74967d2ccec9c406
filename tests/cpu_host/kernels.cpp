// Every function of a KernelTable, on drawn inputs, against plain loops in double; without torch, so that it runs
// wherever a compiler (or qemu-user) does.
//
//   kernels ISA CASES SEED    prints `ok`, or the first element that is off; KERNELS_FAULT=gemm and so on shifts the results
//                             of that function, to show that they are looked at
//
// Bound of an element: that of tests/numerics.py, and the errors that csrc/cpu/kernels/activations.h states. Inputs end
// at a guard page, outputs besides; elements between the pixels of an output have to stay as they were.
#include "depthwise_backward.h"

namespace host {
namespace {

constexpr int64_t kSizes[] = {1, 3, 15, 16, 17, 31, 40, 64, 97};  // channels

class Kernels : public DepthwiseBackwardTester {
 public:
  using DepthwiseBackwardTester::DepthwiseBackwardTester;

  void run(int64_t cases) {
    for (int64_t i = 0; i < cases; ++i) {
      for (Storage s : {Storage::f32, Storage::f64, Storage::bf16, Storage::f16}) {
        if (table_.depthwise[static_cast<int>(s)]) depthwise(s);
        if (table_.depthwise_output_gradient[static_cast<int>(s)]) depthwise_output_gradient(s, random_.one_of(kSizes));
        if (table_.depthwise_input[static_cast<int>(s)]) depthwise_input(s, random_.one_of(kSizes));
        if (table_.widen[static_cast<int>(s)]) widen(s);
        if (table_.channel_sums[static_cast<int>(s)]) channel_sums(s);
        if (table_.scale_channels[static_cast<int>(s)]) scale_channels(s);
        if (table_.operand[static_cast<int>(s)]) operand(s, s == Storage::f64 ? s : Storage::f32);
        if (table_.grad_input[static_cast<int>(s)]) grad_input(s);
        if (table_.max_pool2d[static_cast<int>(s)]) pool2d(s, random_.one_of(kSizes));
        if (table_.winograd_input[static_cast<int>(s)]) winograd_input(s, random_.one_of(kSizes));
      }
      if (table_.winograd_output) winograd_output(random_.one_of(kSizes));
      unpair();
      transpose();
      if (table_.operand_bf16) operand(Storage::bf16, Storage::bf16);
      if (table_.gemm_bf16) gemm_bf16();
      if (table_.gemm_planes) {
        split_rows();
        split_panels();
        gemm_planes(random_.one_of({1, 15, 16, 17, 31, 32}));
      }
      for (Storage s : {Storage::f32, Storage::f64}) {
        compute_ = s;
        if (table_.gemm[pair()]) gemm();
        if (table_.depthwise_taps[pair()]) depthwise_taps();
        if (table_.activation_grad[pair()]) activation_grad();
      }
    }
    for (Storage s : {Storage::bf16, Storage::f16}) {
      every_16_bits(s);
      rounding(s);
    }
  }

 private:
  void depthwise(Storage storage) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const auto [v, h] = axes();
    const int64_t m = random_.one_of({1, 1, 1, 2, 3}), in = random_.one_of(kSizes), c = in * m;
    const int64_t begin = random_.below(v.out), end = begin + 1 + random_.below(v.out - begin);
    // Only the rows of x that the band reads are there.
    const int64_t first = std::min(v.size, std::max<int64_t>(0, begin * v.stride - v.pad));
    const int64_t last = std::min(v.size, (end - 1) * v.stride - v.pad + (v.kernel - 1) * v.dilation + 1);
    const int64_t x_pixel = in + random_.below(3), x_row = h.size * x_pixel + random_.below(3);
    const int64_t y_pixel = c + random_.below(3), y_row = h.out * y_pixel + random_.below(3),
                  tap = c + random_.below(9);
    const int64_t pre = random_.one_of({0, 0, 1, 1, 1, 2, 3, 4, 5, 6}), act = random_.below(kActivations);
    const bool biased = random_.below(4) > 0;
    context("storage", static_cast<int>(storage), "channels", c, "multiplier", m, "kernel", v.kernel, "by", h.kernel,
            "stride", v.stride, "by", h.stride, "height", v.size, "width", h.size, "rows from", begin, "to", end, "pre",
            pre, "activation", act);
    Buffer x(storage, std::max<int64_t>(0, (last - first - 1) * x_row + (h.size - 1) * x_pixel + in));
    Buffer weight(compute_, (v.kernel * h.kernel - 1) * tap + c), bias(compute_, c);
    Buffer y(random_.below(2) ? storage : compute_, (end - begin - 1) * y_row + (h.out - 1) * y_pixel + c);
    x.draw(random_), weight.draw(random_), bias.draw(random_);
    table_.depthwise[static_cast<int>(storage)]({x.data(),
                                                 first,
                                                 x_row,
                                                 x_pixel,
                                                 v.size,
                                                 h.size,
                                                 weight.data(),
                                                 tap,
                                                 biased ? bias.data() : nullptr,
                                                 y.data(),
                                                 y.storage(),
                                                 y_row,
                                                 y_pixel,
                                                 begin,
                                                 end,
                                                 h.out,
                                                 c,
                                                 m,
                                                 window(v, h),
                                                 activation(pre),
                                                 activation(act)});
    for (int64_t i = 0; i < y.count(); ++i) {
      const int64_t row = i / y_row, column = i % y_row / y_pixel, channel = i % y_row % y_pixel;
      if (channel >= c || column >= h.out) {
        expect_gap("depthwise", y, i);
        continue;
      }
      double sum = biased ? bias[channel] : 0, size = std::abs(sum);
      inputs(v, begin + row, [&](int64_t ih, int64_t r) {
        inputs(h, column, [&](int64_t iw, int64_t s) {
          const double w = weight[(r * h.kernel + s) * tap + channel];
          const double z = activated(pre, x[(ih - first) * x_row + iw * x_pixel + channel / m]);
          sum += w * z;
          size += std::abs(w * z) * (pre < kFirstCurve ? 1 : 1 + kCurveError / 4);
        });
      });
      const double ref = activated(act, sum);
      expect("depthwise", y, i, ref, size, v.kernel * h.kernel, act < kFirstCurve ? 0 : kCurveError * std::abs(ref));
    }
  }

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

  void channel_sums(Storage storage) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const int64_t pixels = 1 + random_.below(40), c = random_.one_of(kSizes), x_pixel = c + random_.below(3);
    const bool weighted = random_.below(2);
    const double factor = random_.one_of({1.0, 0.125, 3.0});
    context("storage", static_cast<int>(storage), "pixels", pixels, "channels", c, "weighted", weighted);
    const bool squared = !weighted && random_.below(2);
    Buffer x(storage, (pixels - 1) * x_pixel + c), by(storage, x.count()), sums(compute_, c), squares(compute_, c);
    x.draw(random_), by.draw(random_);
    table_.channel_sums[static_cast<int>(storage)]({x.data(), weighted ? by.data() : nullptr, x_pixel, sums.data(),
                                                    squared ? squares.data() : nullptr, pixels, c,
                                                    random_.one_of({1, 8, 64}), factor});
    for (int64_t channel = 0; channel < c; ++channel) {
      double sum = 0, size = 0, square = 0;
      for (int64_t i = channel; i < x.count(); i += x_pixel) {
        const double term = factor * x[i] * (weighted ? by[i] : 1);
        sum += term;
        size += std::abs(term);
        square += factor * x[i] * x[i];
      }
      expect("channel_sums", sums, channel, sum, size, pixels);
      if (squared) expect("channel_sums", squares, channel, square, square, pixels);
    }
  }

  void scale_channels(Storage storage) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const int64_t pixels = 1 + random_.below(9), c = random_.one_of(kSizes), x_pixel = c + random_.below(3);
    const int64_t y_pixel = c + random_.below(3), act = random_.below(kActivations);
    const bool scaled = random_.below(4), shifted = random_.below(2), added = random_.below(2);
    context("storage", static_cast<int>(storage), "pixels", pixels, "channels", c, "scale", scaled, "shift", shifted,
            "residual", added, "activation", act);
    Buffer x(storage, (pixels - 1) * x_pixel + c), scale(compute_, c), shift(compute_, c);
    Buffer y(random_.below(2) ? storage : compute_, (pixels - 1) * y_pixel + c), residual(y.storage(), y.count());
    x.draw(random_), scale.draw(random_), shift.draw(random_), residual.draw(random_);
    table_.scale_channels[static_cast<int>(storage)](
        {x.data(), x_pixel, scaled ? scale.data() : nullptr, shifted ? shift.data() : nullptr,
         added ? residual.data() : nullptr, y.data(), y_pixel, y.storage(), pixels, c, activation(act)});
    for (int64_t i = 0; i < y.count(); ++i) {
      const int64_t pixel = i / y_pixel, channel = i % y_pixel;
      if (channel >= c) {
        expect_gap("scale_channels", y, i);
        continue;
      }
      const double product = x[pixel * x_pixel + channel] * (scaled ? scale[channel] : 1);
      const double before = (shifted ? shift[channel] : 0) + (added ? residual[i] : 0);
      const double size =
          std::abs(product) + std::abs(shifted ? shift[channel] : 0) + std::abs(added ? residual[i] : 0);
      const double ref = activated(act, product + before);
      expect("scale_channels", y, i, ref, size, 3, act < kFirstCurve ? 0 : kCurveError * std::abs(ref));
    }
  }

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

  void activation_grad() {
    const int64_t count = 1 + random_.below(70), act = random_.below(kActivations);
    context("count", count, "activation", act);
    Buffer grad(compute_, count), z(compute_, count), before(compute_, count);
    grad.draw(random_), z.draw(random_);
    for (int64_t i = 0; i < count; ++i) before.set(i, grad[i]);
    table_.activation_grad[pair()]({grad.data(), z.data(), count, activation(act)});
    for (int64_t i = 0; i < count; ++i)
      expect("activation_grad", grad, i, before[i] * slope(act, z[i]), 0, 1,
             act < kFirstCurve ? 0 : (1 + kSlopeError) * std::abs(before[i]));
  }

  void widen(Storage storage) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const int64_t count = 1 + random_.below(70);
    context("storage", static_cast<int>(storage), "count", count);
    Buffer x(storage, count), y(compute_, count);
    x.draw(random_);
    table_.widen[static_cast<int>(storage)](x.data(), y.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      if (y[i] != x[i] || fault_ == "widen") fail("widen", i, y[i], x[i], 0);
    }
  }

  // All 2^16 of them: subnormal, infinite and NaN too.
  void every_16_bits(Storage storage) {
    compute_ = Storage::f32;
    context("storage", static_cast<int>(storage));
    Buffer x(storage, 1 << 16), y(Storage::f32, 1 << 16);
    for (int64_t i = 0; i < x.count(); ++i) x.put(i, static_cast<uint16_t>(i));
    table_.widen[static_cast<int>(storage)](x.data(), y.data(), x.count());
    for (int64_t i = 0; i < x.count(); ++i) {
      if (std::isnan(x[i]) ? !std::isnan(y[i]) : y[i] != x[i] || std::signbit(y[i]) != std::signbit(x[i]))
        fail("widen", i, y[i], x[i], 0);
    }
  }

  // float32 numbers of all magnitudes, and ties, through a product of no depth, which only stores its bias.
  void rounding(Storage storage) {
    compute_ = Storage::f32;
    context("storage", static_cast<int>(storage));
    const int64_t count = 1 << 15;
    Buffer bias(Storage::f32, count), y(storage, count), nothing(Storage::f32, kPanel);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits = static_cast<uint32_t>(random_.bits());
      if (i % 4 == 1) bits = 0x33000000u + bits % 0x15000000u;           // float16's range
      if (i % 4 == 2) bits &= ~((1u << (23 - digits_of(storage))) - 1);  // ties
      if (i % 8 == 3)
        bits = (bits & 0x80000000u) | ((bits % 2 ? 0x7f7fffffu : 0x477ff001u) - bits / 2 % 3);  // the largest
      bias.put(i, bits);
    }
    table_.gemm[0]({nothing.data(), 1, 1, nothing.data(), 0, kPanel, bias.data(), nullptr, 0, y.data(), count,
                    Storage::f32, Storage::f32, storage, 1, 0, count, true, activation(0)});
    for (int64_t i = 0; i < count; ++i) {
      const double ref = rounded_to(storage, bias[i]), got = y[i];
      if (fault_ == "rounding" || (std::isnan(ref) ? !std::isnan(got) : got != ref)) fail("rounding", i, got, ref, 0);
    }
  }
};

}  // namespace
}  // namespace host

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "usage: kernels ISA CASES SEED\n"), 2;
  for (const cnnfast::KernelTable* table : host::tables()) {
    if (std::string(table->isa) != argv[1]) continue;
    host::Kernels tester(*table, std::strtoull(argv[3], nullptr, 10));
    tester.run(std::atoll(argv[2]));
    std::printf("%lld elements compared\nok\n", static_cast<long long>(tester.compared()));
    return 0;
  }
  return std::fprintf(stderr, "no kernels for %s here\n", argv[1]), 2;
}
