// Max pooling, the last stage of a separable convolution that is followed by one: its input is a tile in L2.
#pragma once
#include "pointwise_conv2d.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// One panel of channels of one row of pooled pixels; rows [h0, h1) of x are in the windows. The largest of a column is
// kept for the next window, if that begins there.
template <class S, bool Full>
CNNFAST_INLINE void max_pool_row(const MaxPoolTile& t, int64_t h0, int64_t h1, int64_t y, int64_t channel) {
  const int64_t count = Full ? kPanel : t.channels - channel, row = t.width * t.channels;
  const S* x = static_cast<const S*>(t.x) + (h0 - t.x_first_row) * row + channel;
  const auto largest_in = [&](int64_t column) {
    const S* pixel = x + column * t.channels;
    Vec<S> largest = load<S>(pixel, count);
    for (int64_t h = h0 + 1; h < h1; ++h) largest = maximum(largest, load<S>(pixel += row, count));
    return largest;
  };
  Vec<S> kept = Vec<S>::zero();
  int64_t kept_column = -1;
  for (int64_t ow = 0; ow < t.out_width; ++ow) {
    const int64_t first = ow * t.stride - t.padding, next = first + t.stride;
    Vec<S> largest = Vec<S>::set(-__builtin_inf());
    for (int64_t w = larger(0, first); w < smaller(t.width, first + t.kernel); ++w) {
      const Vec<S> value = w == kept_column ? kept : largest_in(w);
      largest = maximum(largest, value);
      if (w == next) {
        kept = value;
        kept_column = w;
      }
    }
    store_storage(t.y, y + ow * t.channels + channel, largest, count, t.y_storage);
  }
}

template <class S>
void max_pool(const MaxPoolTile& t) {
  for (int64_t oh = t.row_begin; oh < t.row_end; ++oh) {
    const int64_t first = oh * t.stride - t.padding, h0 = larger(0, first), h1 = smaller(t.height, first + t.kernel);
    const int64_t y = (oh - t.row_begin) * t.out_width * t.channels;
    int64_t channel = 0;
    for (; channel + kPanel <= t.channels; channel += kPanel) max_pool_row<S, true>(t, h0, h1, y, channel);
    if (channel < t.channels) max_pool_row<S, false>(t, h0, h1, y, channel);
  }
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
