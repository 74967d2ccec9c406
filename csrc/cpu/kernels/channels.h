// Channel sums and channel scales: what squeeze-excite does to an image besides its two small products.
//
// Layout   x, y, residual: pixels of contiguous channels; scale, shift, sums: one number a channel.
// Tile     sums: 4 panels of channels in registers, 2 with their squares, pixels stream past; scale: 4 panels of channels,
//          pixels stream past.
// Bytes    sums: x (and `by`) once; scale: x, residual and y once.
// Sums     a run of pixels in order, then those sums with Kahan's compensation: a gate's error is the same for all pixels
//          of a channel, so it counts in a network as no rounding of a single pixel does; and pixels that are all alike
//          round in one direction. The same bits whatever the thread.
#pragma once
#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// Sums of runs of pixels, added with Kahan's compensation.
template <class S>
struct CompensatedSum {
  Vec<S> total = Vec<S>::zero(), lost = Vec<S>::zero(), plain = Vec<S>::zero();

  CNNFAST_INLINE void operator+=(Vec<S> sum) {
    const Vec<S> added = sub(sum, lost), next = add(total, added);
    lost = sub(sub(next, total), added);
    total = next;
    plain = add(plain, sum);
  }
  CNNFAST_INLINE Vec<S> value() const { return select_nan(total, plain, total); }  // what an infinity loses is NaN
};

// Panels [channel, channel + P * kPanel).
template <class T, class S, int P, bool Squares>
CNNFAST_INLINE void channel_sums_of(const ChannelSumsTile& t, int64_t channel) {
  const int64_t count = t.channels - channel;
  CompensatedSum<S> totals[P], squares[Squares ? P : 1];
  for (int64_t first = 0; first < t.pixels; first += t.run) {
    Vec<S> sums[P], squared[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sums[p] = squared[p] = Vec<S>::zero();
    for (int64_t i = first; i < smaller(first + t.run, t.pixels); ++i) {
      const T* x = static_cast<const T*>(t.x) + i * t.x_pixel + channel;
      const T* by = static_cast<const T*>(t.by) + (t.by ? i * t.x_pixel + channel : 0);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Vec<S> v = load<S>(x + p * kPanel, P > 1 ? kPanel : count);
        if constexpr (Squares) {
          sums[p] = add(v, sums[p]);
          squared[p] = fma(v, v, squared[p]);
        } else {
          sums[p] = t.by ? fma(v, load<S>(by + p * kPanel, P > 1 ? kPanel : count), sums[p]) : add(v, sums[p]);
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      totals[p] += sums[p];
      if constexpr (Squares) squares[p] += squared[p];
    }
  }
  const Vec<S> factor = Vec<S>::set(static_cast<S>(t.factor));
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const int64_t at = channel + p * kPanel;
    store(static_cast<S*>(t.sums) + at, mul(totals[p].value(), factor), count - p * kPanel);
    if constexpr (Squares) store(static_cast<S*>(t.squares) + at, mul(squares[p].value(), factor), count - p * kPanel);
  }
}

template <class T>
void channel_sums(const ChannelSumsTile& t) {
  using S = typename Compute<T>::type;
  const auto all = [&](auto together, auto squares) {
    each_panels<decltype(together)::value>(t.channels, [&](int64_t channel, auto panels) {
      channel_sums_of<T, S, decltype(panels)::value, decltype(squares)::value>(t, channel);
    });
  };
  if (t.squares)
    all(Constant<2>{}, Constant<true>{});
  else
    all(Constant<4>{}, Constant<false>{});
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
      y = form(y);
      if (t.gate) y = mul(y, gate[p]);
      store_storage(t.y, i * t.y_pixel + at, y, rest, t.y_storage);
    }
  }
}

template <class T>
void scale_channels(const ScaleTile& t) {
  using S = typename Compute<T>::type;
  with_activation<S>(t.activation, [&](const auto& form) {
    each_panels<4>(t.channels, [&](int64_t channel, auto panels) {
      scale_channels_of<T, S, decltype(panels)::value>(t, channel, form);
    });
  });
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
