// csrc/cpu/kernels/depthwise_conv2d_backward.h against plain loops in double.
#pragma once
#include "planes.h"

namespace host {

class DepthwiseBackwardTester : public PlanesTester {
 public:
  using PlanesTester::PlanesTester;

 protected:
  void depthwise_output_gradient(Storage storage, int64_t c) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const int64_t m = random_.one_of({1, 1, 2, 3}), out = c * m, pixels = 1 + random_.below(9);
    const int64_t pixel = out + random_.below(3), z_pixel = out + random_.below(3);
    const Rows rows = rows_of(pixels, c);
    const int64_t g_plane = rows.count, sums_plane = whole_panels(c);
    const int64_t act = random_.below(2) ? 0 : random_.below(kActivations);
    const bool added = random_.below(2), multiplied = added && act == 0 && random_.below(2), summed = random_.below(2);
    context("storage", static_cast<int>(storage), "channels", c, "multiplier", m, "pixels", pixels, "add", added, "y",
            multiplied, "activation", act);
    const int64_t count = (pixels - 1) * pixel + out;
    Buffer grad(storage, count), y(storage, count), plus(compute_, out), times(compute_, out);
    Buffer z(compute_, (pixels - 1) * z_pixel + out), g(compute_, m * g_plane), sums(compute_, m * sums_plane);
    for (Buffer* buffer : {&grad, &y, &plus, &times, &z, &sums}) buffer->draw(random_);
    const std::vector<double> before = values(sums);
    table_.depthwise_output_gradient[static_cast<int>(storage)](
        {grad.data(), multiplied ? y.data() : nullptr, pixel, random_.below(2) * pixels * pixel,
         added ? plus.data() : nullptr, multiplied ? times.data() : nullptr, act ? z.data() : nullptr, z_pixel,
         g.data(), rows.pixel, rows.panel, g_plane, summed ? sums.data() : nullptr, sums_plane, pixels, c, m,
         activation(act)});
    for (int64_t k = 0; k < out; ++k) {
      const int64_t plane = k % m, channel = k / m;
      double sum = before[plane * sums_plane + channel], sum_size = std::abs(sum);
      for (int64_t i = 0; i < pixels; ++i) {
        const double own = grad[i * pixel + k], other = added ? plus[k] : 0;
        const double product = multiplied ? y[i * pixel + k] * times[k] : 0, steep = slope(act, z[i * z_pixel + k]);
        const double ref = (own + other + product) * steep;
        const double size = std::abs(own) + std::abs(other) + std::abs(product);
        const double error = act < kFirstCurve ? 0 : kSlopeError * size;
        expect("depthwise_output_gradient", g, plane * g_plane + rows(i, channel), ref, size * std::abs(steep), 3,
               error);
        sum += ref;
        sum_size += size * (std::abs(steep) + (act < kFirstCurve ? 0 : kSlopeError / 4));
      }
      if (summed)
        expect("depthwise_output_gradient", sums, plane * sums_plane + channel, sum, sum_size, pixels + 3);
      else if (sums[plane * sums_plane + channel] != before[plane * sums_plane + channel])
        fail("depthwise_output_gradient", k, sums[plane * sums_plane + channel], before[plane * sums_plane + channel],
             0);
    }
  }

  // Both halves of a row of the input: what it passes on its way in, and its gradient.
  void depthwise_input(Storage storage, int64_t c) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const int64_t pixels = 1 + random_.below(9), x_pixel = c + random_.below(3);
    const Rows rows = rows_of(pixels, c);
    const int64_t act = random_.below(kActivations);
    const bool scaled = random_.below(2), shifted = scaled && random_.below(2), wanted = random_.below(3),
               summed = random_.below(2);
    context("storage", static_cast<int>(storage), "channels", c, "pixels", pixels, "scale", scaled, "shift", shifted,
            "dx", wanted, "activation", act);
    Buffer x(storage, (pixels - 1) * x_pixel + c), dx(storage, x.count()), scale(compute_, c), shift(compute_, c);
    Buffer a(compute_, rows.count), slopes(compute_, a.count()), da(compute_, a.count());
    Buffer scale_sums(compute_, round_up(c, kPanel)), shift_sums(compute_, round_up(c, kPanel));
    for (Buffer* buffer : {&x, &scale, &shift, &da, &scale_sums, &shift_sums}) buffer->draw(random_);
    const std::vector<double> scale_before = values(scale_sums), shift_before = values(shift_sums);
    const DepthwiseInputTile tile{x.data(),
                                  wanted ? dx.data() : nullptr,
                                  x_pixel,
                                  random_.below(2) * pixels * x_pixel,
                                  scaled ? scale.data() : nullptr,
                                  shifted ? shift.data() : nullptr,
                                  a.data(),
                                  slopes.data(),
                                  da.data(),
                                  rows.pixel,
                                  rows.panel,
                                  summed ? scale_sums.data() : nullptr,
                                  summed ? shift_sums.data() : nullptr,
                                  pixels,
                                  c,
                                  activation(act)};
    table_.depthwise_input[static_cast<int>(storage)](tile);
    table_.depthwise_input_gradient[static_cast<int>(storage)](tile);
    const bool curve = act >= kFirstCurve;
    for (int64_t channel = 0; channel < c; ++channel) {
      double products = scale_before[channel], sum = shift_before[channel];
      double products_size = std::abs(products), sum_size = std::abs(sum);
      for (int64_t i = 0; i < pixels; ++i) {
        const double factor = scaled ? scale[channel] : 1, plus = shifted ? shift[channel] : 0;
        const double v = x[i * x_pixel + channel], z = v * factor + plus, size = std::abs(v * factor) + std::abs(plus);
        const double gradient = da[rows(i, channel)], steep = slope(act, z), dz = gradient * steep;
        const double ref = activated(act, z);
        // z is rounded, which a curve's slope, at most as steep as 1.13 and bent by 0.8, hands on.
        expect("depthwise_input", a, rows(i, channel), ref, 1.13 * size, 1, curve ? kCurveError * std::abs(ref) : 0);
        const double error = curve ? kSlopeError + 4 * size : 0;
        if (wanted)
          expect("depthwise_input_gradient", dx, i * x_pixel + channel, dz * factor, std::abs(dz * factor), 1,
                 error * std::abs(gradient * factor));
        products += dz * v;
        sum += dz;
        products_size += (std::abs(dz) + error * std::abs(gradient)) * std::abs(v);
        sum_size += std::abs(dz) + error * std::abs(gradient);
      }
      if (!summed) continue;
      expect("depthwise_input_gradient", scale_sums, channel, products, products_size, pixels + 1);
      expect("depthwise_input_gradient", shift_sums, channel, sum, sum_size, pixels + 1);
    }
    for (int64_t i = 0; i < dx.count(); ++i)
      if (!wanted || i % x_pixel >= c) expect_gap("depthwise_input_gradient", dx, i);
  }

  void depthwise_taps() {
    const Axis h = axes().second;
    const int64_t c = random_.one_of({16, 32, 48}), rows = random_.below(6), tap = c + random_.below(2) * kPanel;
    const Rows grads = rows_of(h.out, c), inputs = rows_of(h.size, c);
    const int64_t wanted = 1 + random_.below(3);  // bits: dx, dweight
    context("channels", c, "rows", rows, "kernel", h.kernel, "stride", h.stride, "dilation", h.dilation, "width",
            h.size, "pad", h.pad, "out", h.out, "wanted", wanted);
    const int64_t grad_row = grads.count, window = h.kernel * tap;
    Buffer grad(compute_, std::max<int64_t>(1, rows * grad_row)), weight(compute_, std::max<int64_t>(1, rows * window));
    Buffer dweight(compute_, weight.count()), a(compute_, inputs.count), dx(compute_, inputs.count);
    for (Buffer* buffer : {&grad, &weight, &dweight, &a}) buffer->draw(random_);
    const std::vector<double> before = values(dweight);
    std::vector<DepthwiseTaps> taps;
    for (int64_t row = 0; row < rows; ++row)
      taps.push_back(
          {grad.at(row * grad_row), weight.at(row * window), wanted & 2 ? dweight.at(row * window) : nullptr});
    table_.depthwise_taps[pair()]({taps.data(), rows, tap, grads.pixel, grads.panel, h.out, a.data(),
                                   wanted & 1 ? dx.data() : nullptr, inputs.pixel, inputs.panel, h.size, c,
                                   random_.below(2) * grad_row, random_.below(2) * inputs.count, window_of(h)});
    for (int64_t i = 0; i < h.size * c; ++i) {
      const int64_t column = i / c, channel = i % c, at = inputs(column, channel);
      if (!(wanted & 1)) {
        expect_gap("depthwise_taps", dx, at);
        continue;
      }
      double sum = 0, size = 0;
      outputs(h, column, [&](int64_t out, int64_t j) {
        for (int64_t row = 0; row < rows; ++row) {
          const double term = grad[row * grad_row + grads(out, channel)] * weight[row * window + j * tap + channel];
          sum += term;
          size += std::abs(term);
        }
      });
      expect("depthwise_taps", dx, at, sum, size, rows * h.kernel);
    }
    for (int64_t i = 0; i < rows * window; ++i) {
      const int64_t row = i / window, j = i % window / tap, channel = i % tap;
      double sum = before[i], size = std::abs(sum);
      if (!(wanted & 2) || channel >= c) {
        if (dweight[i] != before[i]) fail("depthwise_taps", i, dweight[i], before[i], 0);
        continue;
      }
      for (int64_t out = 0; out < h.out; ++out) {
        const int64_t in = out * h.stride - h.pad + j * h.dilation;
        if (in < 0 || in >= h.size) continue;
        const double term = grad[row * grad_row + grads(out, channel)] * a[inputs(in, channel)];
        sum += term;
        size += std::abs(term);
      }
      expect("depthwise_taps", dweight, i, sum, size, h.out + 1);
    }
  }

 private:
  int64_t whole_panels(int64_t c) { return round_up(c, kPanel) + random_.below(2) * kPanel; }
  // A row in scratch, or, of whole panels, in an image.
  struct Rows {
    int64_t pixel, panel, count;
    int64_t operator()(int64_t i, int64_t channel) const {
      return i * pixel + channel / kPanel * panel + channel % kPanel;
    }
  };
  Rows rows_of(int64_t pixels, int64_t c) {
    const int64_t pixel = whole_panels(c);
    return random_.below(2) ? Rows{pixel, kPanel, pixels * pixel}
                            : Rows{kPanel, pixels * kPanel, pixels * round_up(c, kPanel)};
  }
  static Window window_of(const Axis& h) { return {1, h.kernel, 1, h.stride, 1, h.dilation, 0, h.pad}; }
  static std::vector<double> values(const Buffer& buffer) {
    std::vector<double> all;
    for (int64_t i = 0; i < buffer.count(); ++i) all.push_back(buffer[i]);
    return all;
  }
};

}  // namespace host
