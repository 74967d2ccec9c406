// Max pooling, the last stage of a separable convolution that is followed by one: its input is a tile in L2.
#pragma once
#include "pointwise_conv2d.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

template <class S>
void max_pool(const MaxPoolTile& t) {
  const S* x = static_cast<const S*>(t.x);
  const Vec<S> lowest = Vec<S>::set(-__builtin_inf());
  for (int64_t oh = t.row_begin; oh < t.row_end; ++oh) {
    const int64_t h0 = oh * t.stride - t.padding;
    for (int64_t ow = 0; ow < t.out_width; ++ow) {
      const int64_t w0 = ow * t.stride - t.padding;
      for (int64_t channel = 0; channel < t.channels; channel += kPanel) {
        const int64_t count = t.channels - channel;
        Vec<S> y = lowest;
        for (int64_t h = larger(0, h0); h < smaller(t.height, h0 + t.kernel); ++h)
          for (int64_t w = larger(0, w0); w < smaller(t.width, w0 + t.kernel); ++w)
            y = maximum(y, load<S>(x + ((h - t.x_first_row) * t.width + w) * t.channels + channel, count));
        store_storage(t.y, ((oh - t.row_begin) * t.out_width + ow) * t.channels + channel, y, count, t.y_storage);
      }
    }
  }
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
