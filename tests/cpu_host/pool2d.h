// csrc/cpu/kernels/pool2d.h against plain loops in double.
#pragma once
#include "conv2d_winograd.h"

namespace host {

class Pool2dTester : public WinogradTester {
 public:
  using WinogradTester::WinogradTester;

 protected:
  void pool2d(Storage storage, int64_t c) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const Axis v = windows(), h = windows();
    const int64_t begin = random_.below(v.out), end = begin + 1 + random_.below(v.out - begin);
    // Only the rows of x that the band reads are there.
    const int64_t first = std::max<int64_t>(0, begin * v.stride - v.pad),
                  last = std::min(v.size, (end - 1) * v.stride - v.pad + v.kernel);
    const int64_t y_pixel = c + random_.below(3);
    const bool include_pad = random_.below(2), average = random_.below(2);
    const char* const function = average ? "avg_pool2d" : "max_pool2d";
    context("storage", static_cast<int>(storage), "channels", c, "kernel", v.kernel, "by", h.kernel, "stride", v.stride,
            "by", h.stride, "padding", v.pad, "by", h.pad, "height", v.size, "width", h.size, "include_pad",
            include_pad);
    Buffer x(storage, (last - first) * h.size * c);
    Buffer y(output_storage(), ((end - begin) * h.out - 1) * y_pixel + c);
    x.draw(random_);
    for (int64_t i = random_.below(400); i < x.count(); i += 400)
      x.set(i, random_.below(2) ? std::nan("") : random_.below(2) ? kInf : -kInf);
    const auto& table = average ? table_.avg_pool2d : table_.max_pool2d;
    table[static_cast<int>(storage)]({x.data(), first, v.size, h.size, c, y.data(), y.storage(), y_pixel, begin, end,
                                      h.out, window(v, h), include_pad});
    for (int64_t i = 0; i < y.count(); ++i) {
      const int64_t channel = i % y_pixel, row = begin + i / y_pixel / h.out, column = i / y_pixel % h.out;
      if (channel >= c) {
        expect_gap(function, y, i);
        continue;
      }
      double largest = -kInf, sum = 0, size = 0, pixels = 0;
      inputs(v, row, [&](int64_t ih, int64_t) {
        inputs(h, column, [&](int64_t iw, int64_t) {
          const double value = x[((ih - first) * h.size + iw) * c + channel];
          if (value > largest || std::isnan(value)) largest = value;
          sum += value;
          size += std::abs(value);
          ++pixels;
        });
      });
      if (!average) {
        expect(function, y, i, largest, 0, 1);
        continue;
      }
      if (include_pad) pixels = static_cast<double>(padded(v, row) * padded(h, column));
      expect(function, y, i, sum / pixels, std::isfinite(size) ? size / pixels : 0, v.kernel * h.kernel);
    }
  }

 private:
  // As PyTorch's: padding of up to half the kernel, and perhaps one window more, which begins before the padding ends.
  Axis windows() {
    const int64_t kernel = 1 + random_.below(6), stride = 1 + random_.below(3);
    Axis a = axis(kernel, stride, 1);
    a.pad = std::min(a.pad, kernel / 2);
    a.size = std::max(a.size, kernel - 2 * a.pad);
    const int64_t beyond = a.size + 2 * a.pad - kernel;
    a.out = beyond / stride + 1;
    if (beyond % stride && a.out * stride < a.size + a.pad) a.out += random_.below(2);
    return a;
  }
  // Positions of window `out` that are input or padding.
  static int64_t padded(const Axis& a, int64_t out) {
    const int64_t first = out * a.stride - a.pad;
    return std::min(first + a.kernel, a.size + a.pad) - first;
  }
};

}  // namespace host
