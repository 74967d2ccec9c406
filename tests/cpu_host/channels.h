// csrc/cpu/kernels/channels.h against plain loops in double.
#pragma once
#include "pointwise_conv2d_backward.h"

namespace host {

class ChannelsTester : public PointwiseBackwardTester {
 public:
  using PointwiseBackwardTester::PointwiseBackwardTester;

 protected:
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
};

}  // namespace host
