// Channel sums and channel scales: what squeeze-excite does to an image besides its two small products.
//
// Layout   x, y, residual: pixels of contiguous channels; scale, shift, sums: one number a channel.
// Tile     sums: kPanels panels of channels in registers, pixels stream past; scale: the same, without sums.
// Bytes    sums: x (and `by`) once; scale: x, residual and y once.
// Sums     a run of pixels in order, then those sums with Kahan's compensation: a gate's error is the same for all pixels
//          of a channel, so it counts in a network as no rounding of a single pixel does; and pixels that are all alike
//          round in one direction. The same bits whatever the thread.
#pragma once
#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// Panels [channel, channel + P * kPanel).
template <class T, class S, int P>
CNNFAST_INLINE void channel_sums_of(const ChannelSumsTile& t, int64_t channel) {
  const int64_t count = t.channels - channel;
  Vec<S> totals[P], lost[P], plain[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) totals[p] = lost[p] = plain[p] = Vec<S>::zero();
  for (int64_t first = 0; first < t.pixels; first += t.run) {
    Vec<S> sums[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sums[p] = Vec<S>::zero();
    for (int64_t i = first; i < smaller(first + t.run, t.pixels); ++i) {
      const T* x = static_cast<const T*>(t.x) + i * t.x_pixel + channel;
      const T* by = static_cast<const T*>(t.by) + (t.by ? i * t.x_pixel + channel : 0);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Vec<S> v = load<S>(x + p * kPanel, count - p * kPanel);
        sums[p] = t.by ? fma(v, load<S>(by + p * kPanel, count - p * kPanel), sums[p]) : add(v, sums[p]);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vec<S> added = sub(sums[p], lost[p]), total = add(totals[p], added);
      lost[p] = sub(sub(total, totals[p]), added);
      totals[p] = total;
      plain[p] = add(plain[p], sums[p]);
    }
  }
  const Vec<S> factor = Vec<S>::set(static_cast<S>(t.factor));
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const Vec<S> total = select_nan(totals[p], plain[p], totals[p]);  // what an infinity loses is NaN
    store(static_cast<S*>(t.sums) + channel + p * kPanel, mul(total, factor), count - p * kPanel);
  }
}

template <class T>
void channel_sums(const ChannelSumsTile& t) {
  using S = typename Compute<T>::type;
  constexpr int kPanels = 4;
  int64_t channel = 0;
  for (; channel + kPanels * kPanel <= t.channels; channel += kPanels * kPanel)
    channel_sums_of<T, S, kPanels>(t, channel);
  for (; channel < t.channels; channel += kPanel) channel_sums_of<T, S, 1>(t, channel);
}

template <class S>
CNNFAST_INLINE Vec<S> load_or(const void* p, int64_t channel, int64_t count, Vec<S> otherwise) {
  return p ? load<S>(static_cast<const S*>(p) + channel, count) : otherwise;
}

// Panels [channel, channel + P * kPanel).
template <class T, class S, int P, class Form>
CNNFAST_INLINE void scale_channels_of(const ScaleTile& t, int64_t channel, const Form& form) {
  const int64_t count = t.channels - channel;
  Vec<S> scale[P], shift[P], gate[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    scale[p] = load_or(t.scale, channel + p * kPanel, count - p * kPanel, Vec<S>::set(1));
    shift[p] = load_or(t.shift, channel + p * kPanel, count - p * kPanel, Vec<S>::zero());
    gate[p] = load_or(t.gate, channel + p * kPanel, count - p * kPanel, Vec<S>::set(1));
  }
  for (int64_t i = 0; i < t.pixels; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const int64_t at = channel + p * kPanel, rest = count - p * kPanel;
      Vec<S> y = load<S>(static_cast<const T*>(t.x) + i * t.x_pixel + at, rest);
      if (t.scale && t.shift)
        y = fma(y, scale[p], shift[p]);
      else if (t.scale)
        y = mul(y, scale[p]);
      else if (t.shift)
        y = add(y, shift[p]);
      if (t.residual) y = add(y, load_storage<S>(t.residual, i * t.y_pixel + at, rest, t.y_storage));
      y = form.value(y);
      if (t.gate) y = mul(y, gate[p]);
      store_storage(t.y, i * t.y_pixel + at, y, rest, t.y_storage);
    }
  }
}

template <class T>
void scale_channels(const ScaleTile& t) {
  using S = typename Compute<T>::type;
  constexpr int kPanels = 4;
  with_form<S>(t.activation, [&](const auto& form) {
    int64_t channel = 0;
    for (; channel + kPanels * kPanel <= t.channels; channel += kPanels * kPanel)
      scale_channels_of<T, S, kPanels>(t, channel, form);
    for (; channel < t.channels; channel += kPanel) scale_channels_of<T, S, 1>(t, channel, form);
  });
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
