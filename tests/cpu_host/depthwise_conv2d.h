// csrc/cpu/kernels/depthwise_conv2d.h against plain loops in double.
#pragma once
#include "depthwise_conv2d_backward.h"

namespace host {

class DepthwiseTester : public DepthwiseBackwardTester {
 public:
  using DepthwiseBackwardTester::DepthwiseBackwardTester;

 protected:
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
};

}  // namespace host
