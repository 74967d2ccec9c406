// What training does to an image beside its convolutions: the gradients of activation(x * scale + shift), and the sums that
// squeeze-excite takes of it.
//
// Layout   grad, x, residual, dx, dresidual: pixels of contiguous channels, of one storage; scale, shift, gate, mean_grad,
//          sums: one number a channel.
// Tile     panels of channels in registers, with their sums; pixels stream past.
// Bytes    each image once; nothing is written but what is asked for.
// Sums     runs of pixels in order, then the runs: the same bits whatever the thread.
#pragma once
#include "channels.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

constexpr int kSumRun = 8;

// Sums of P panels in two levels.
template <class S, int P>
struct RunningSums {
  Vec<S> run[P], total[P];
  CNNFAST_INLINE RunningSums() {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) run[p] = total[p] = Vec<S>::zero();
  }
  CNNFAST_INLINE void end_run() {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      total[p] = add(total[p], run[p]);
      run[p] = Vec<S>::zero();
    }
  }
  CNNFAST_INLINE void write(void* sums, int64_t channel, int64_t count) const {
    if (!sums) return;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) store(static_cast<S*>(sums) + channel + p * kPanel, total[p], count - p * kPanel);
  }
};

// Panels [channel, channel + P * kPanel).
template <class T, class S, int P, class Form>
CNNFAST_INLINE void scale_shift_grad_of(const ScaleShiftGradTile& t, int64_t channel, const Form& form) {
  const int64_t count = t.channels - channel;
  Vec<S> scale[P], shift[P], gate[P], mean_grad[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const int64_t at = channel + p * kPanel, rest = count - p * kPanel;
    scale[p] = load_or(t.scale, at, rest, Vec<S>::set(1));
    shift[p] = load_or(t.shift, at, rest, Vec<S>::zero());
    gate[p] = load_or(t.gate, at, rest, Vec<S>::set(1));
    mean_grad[p] = load_or(t.mean_grad, at, rest, Vec<S>::zero());
  }
  RunningSums<S, P> sum, sum_by_x;
  for (int64_t first = 0; first < t.pixels; first += kSumRun) {
    for (int64_t i = first; i < smaller(first + kSumRun, t.pixels); ++i) {
      const int64_t at = i * t.channels + channel;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const int64_t rest = count - p * kPanel, index = at + p * kPanel;
        const Vec<S> x = load<S>(static_cast<const T*>(t.x) + index, rest);
        Vec<S> grad = load<S>(static_cast<const T*>(t.grad) + index, rest);
        if (t.gate) grad = fma(grad, gate[p], mean_grad[p]);
        Vec<S> z = fma(x, scale[p], shift[p]);
        if (t.residual) z = add(z, load<S>(static_cast<const T*>(t.residual) + index, rest));
        const Vec<S> dz = form.gradient(grad, z);
        if (t.dx) store(static_cast<T*>(t.dx) + index, mul(dz, scale[p]), rest);
        if (t.dresidual) store(static_cast<T*>(t.dresidual) + index, dz, rest);
        sum.run[p] = add(sum.run[p], dz);
        sum_by_x.run[p] = fma(dz, x, sum_by_x.run[p]);
      }
    }
    sum.end_run();
    sum_by_x.end_run();
  }
  sum.write(t.sum, channel, count);
  sum_by_x.write(t.sum_by_x, channel, count);
}

template <class T, class S, int P, class Form>
CNNFAST_INLINE void scale_shift_sums_of(const ScaleShiftSumsTile& t, int64_t channel, const Form& form) {
  const int64_t count = t.channels - channel;
  Vec<S> scale[P], shift[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    scale[p] = load<S>(static_cast<const S*>(t.scale) + channel + p * kPanel, count - p * kPanel);
    shift[p] = load<S>(static_cast<const S*>(t.shift) + channel + p * kPanel, count - p * kPanel);
  }
  RunningSums<S, P> sum, sum_by_grad;
  for (int64_t first = 0; first < t.pixels; first += kSumRun) {
    for (int64_t i = first; i < smaller(first + kSumRun, t.pixels); ++i) {
      const int64_t at = i * t.channels + channel;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const int64_t rest = count - p * kPanel, index = at + p * kPanel;
        const Vec<S> x = load<S>(static_cast<const T*>(t.x) + index, rest);
        const Vec<S> y = form(fma(x, scale[p], shift[p]));
        sum.run[p] = add(sum.run[p], y);
        if (t.grad)
          sum_by_grad.run[p] = fma(y, load<S>(static_cast<const T*>(t.grad) + index, rest), sum_by_grad.run[p]);
      }
    }
    sum.end_run();
    sum_by_grad.end_run();
  }
  sum.write(t.sum, channel, count);
  sum_by_grad.write(t.sum_by_grad, channel, count);
}

template <class T>
void scale_shift_grad(const ScaleShiftGradTile& t) {
  using S = typename Compute<T>::type;
  with_activation<S>(t.activation, [&](const auto& form) {
    each_panels<2>(t.channels, [&](int64_t channel, auto panels) {
      scale_shift_grad_of<T, S, decltype(panels)::value>(t, channel, form);
    });
  });
}

template <class T>
void scale_shift_sums(const ScaleShiftSumsTile& t) {
  using S = typename Compute<T>::type;
  with_activation<S>(t.activation, [&](const auto& form) {
    each_panels<2>(t.channels, [&](int64_t channel, auto panels) {
      scale_shift_sums_of<T, S, decltype(panels)::value>(t, channel, form);
    });
  });
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
