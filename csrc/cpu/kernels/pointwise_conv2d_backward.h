// What pointwise_conv2d's gradients do besides their two products, a tile of pixels at a time.
//
// Layout   pixels of contiguous channels; scale, shift and sums: one number a channel; operands of products as rows (a left
//          side) and as panels of kPanel channels, pixel by pixel (a right side whose depth is the pixels).
// Tile     operand: pixels outside, channels inside: memory is read front to back. grad_input: runs of kGradRun pixels,
//          in a run up to kGradPanels panels of channels with their sums in registers.
// Bytes    operand: x and residual once; grad_input: x once more, by now from L2, dx once.
// Sums     a run of pixels in order, then runs: chains stay short.
#pragma once
#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// x * scale + shift of a panel, either absent.
template <class S>
CNNFAST_INLINE Vec<S> scaled(Vec<S> x, const S* scale, const S* shift, int64_t channel, int64_t count) {
  if (scale && shift) return fma(x, load<S>(scale + channel, count), load<S>(shift + channel, count));
  if (scale) return mul(x, load<S>(scale + channel, count));
  return shift ? add(x, load<S>(shift + channel, count)) : x;
}

template <class T>
void operand(const OperandTile& t) {
  using S = typename Compute<T>::type;
  const S* const scale = static_cast<const S*>(t.scale);
  const S* const shift = static_cast<const S*>(t.shift);
  with_activation<S>(t.activation, [&](auto activate) {
    for (int64_t i = 0; i < t.pixels; ++i) {
      const T* const x = static_cast<const T*>(t.x) + i * t.x_pixel;
      const T* const residual = t.residual ? static_cast<const T*>(t.residual) + i * t.x_pixel : nullptr;
      S* const row = t.rows ? static_cast<S*>(t.rows) + i * t.row : nullptr;
      S* const panel = t.panels ? static_cast<S*>(t.panels) + i * kPanel : nullptr;
      const auto step = [&](int64_t channel, int64_t count) CNNFAST_INLINE_LAMBDA {
        Vec<S> v = scaled(load<S>(x + channel, count), scale, shift, channel, count);
        if (residual) v = add(v, load<S>(residual + channel, count));
        v = activate(v);
        if (row) store(row + channel, v, count);
        if (panel) store(panel + channel / kPanel * t.panel, v);
      };
      const int64_t whole = t.channels / kPanel * kPanel;
      for (int64_t channel = 0; channel < whole; channel += kPanel) step(channel, kPanel);
      if (whole < t.channels) step(whole, t.channels - whole);
    }
  });
}

constexpr int64_t kGradRun = 16, kGradPanels = 4;

// Panels [channel, channel + P * kPanel) of pixels [begin, end).
template <class T, int P, class Form>
CNNFAST_INLINE void grad_input_of(const GradInputTile& t, int64_t begin, int64_t end, int64_t channel,
                                  const Form& form) {
  using S = typename Compute<T>::type;
  const int64_t left = t.channels - channel;
  const auto lanes = [&](int p) CNNFAST_INLINE_LAMBDA { return P > 1 ? kPanel : smaller(left, kPanel); };
  Vec<S> scale[P], shift[P], by_x[P], sums[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const int64_t at = channel + p * kPanel;
    scale[p] = t.scale ? load<S>(static_cast<const S*>(t.scale) + at, lanes(p)) : Vec<S>::set(1);
    shift[p] = t.shift ? load<S>(static_cast<const S*>(t.shift) + at, lanes(p)) : Vec<S>::zero();
    by_x[p] = sums[p] = Vec<S>::zero();
  }
  for (int64_t i = begin; i < end; ++i) {
    const T* const x = static_cast<const T*>(t.x) + i * t.x_pixel + channel;
    const S* const grad = static_cast<const S*>(t.grad) + i * t.grad_row + channel;
    T* const dx = static_cast<T*>(t.dx) + (t.dx ? i * t.x_pixel + channel : 0);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vec<S> v = load<S>(x + p * kPanel, lanes(p));
      const Vec<S> dz = form.gradient(load<S>(grad + p * kPanel, lanes(p)), fma(v, scale[p], shift[p]));
      sums[p] = add(sums[p], dz);
      by_x[p] = fma(dz, v, by_x[p]);
      if (t.dx) store(dx + p * kPanel, mul(dz, scale[p]), lanes(p));
    }
  }
  const auto add_to = [&](void* to, Vec<S>* from) CNNFAST_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      S* const at = static_cast<S*>(to) + channel + p * kPanel;
      store(at, add(load<S>(at, lanes(p)), from[p]), lanes(p));
    }
  };
  if (t.sums) add_to(t.sums, sums);
  if (t.sums_by_x) add_to(t.sums_by_x, by_x);
}

template <class T>
void grad_input(const GradInputTile& t) {
  using S = typename Compute<T>::type;
  with_activation<S>(t.activation, [&](const auto& form) {
    for (int64_t begin = 0; begin < t.pixels; begin += kGradRun) {
      const int64_t end = smaller(begin + kGradRun, t.pixels);
      each_panels<kGradPanels>(t.channels, [&](int64_t channel, auto panels) {
        grad_input_of<T, decltype(panels)::value>(t, begin, end, channel, form);
      });
    }
  });
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
