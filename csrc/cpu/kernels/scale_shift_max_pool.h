// max_pool2d(activation(x * scale + shift)) and its gradients, what training has between a convolution with batch
// normalisation and a pooling.
//
// Layout   pixels of contiguous channels; of a pooled pixel also the window's pixel that it is, a byte a channel.
// Tile     forward: a panel of one pooled pixel, a row of them from lines that are in L2. Backward: a run of pixels of a row
//          of x, panel after panel with its sums in registers; a pixel gathers from the windows that it is in.
// Bytes    forward: x once, y and taps written; backward: x, grad and taps once, dx written. What is pooled is in memory
//          nowhere, nor is its gradient.
// Ties     the first in the window, a NaN before all: as PyTorch's.
// Sums     runs of pixels in order, then the runs.
// Limits   windows of up to 255 pixels, without dilation.
#pragma once
#include "activations.h"
#include "pool2d.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kPanel)));

// A panel's taps, in lanes of the compute type.
template <class S, class Count>
CNNFAST_INLINE Vec<S> load_taps(const uint8_t* p, Count count) {
  typedef S Lanes __attribute__((vector_size(sizeof(S) * kPanel)));
  Bytes bytes{};
  std::memcpy(&bytes, p, static_cast<size_t>(static_cast<int64_t>(count)));
  const Lanes lanes = __builtin_convertvector(bytes, Lanes);
  return load<S>(reinterpret_cast<const S*>(&lanes));
}

template <class S, class Count>
CNNFAST_INLINE void store_taps(uint8_t* p, Vec<S> taps, Count count) {
  typedef S Lanes __attribute__((vector_size(sizeof(S) * kPanel)));
  Lanes lanes;
  store(reinterpret_cast<S*>(&lanes), taps);
  const Bytes bytes = __builtin_convertvector(lanes, Bytes);
  std::memcpy(p, &bytes, static_cast<size_t>(static_cast<int64_t>(count)));
}

template <class T>
void scale_shift_max_pool(const ScaleShiftMaxPoolTile& t) {
  using S = typename Compute<T>::type;
  const Window& w = t.window;
  with_activation<S>(t.activation, [&](const auto& form) {
    for (int64_t oh = t.row_begin; oh < t.row_end; ++oh)
      for (int64_t ow = 0; ow < t.out_width; ++ow) {
        const int64_t top = oh * w.stride_h - w.pad_top, left = ow * w.stride_w - w.pad_left;
        const Inside rows(top, w.kernel_h, t.height), columns(left, w.kernel_w, t.width);
        const int64_t at = (oh * t.out_width + ow) * t.channels;
        each_panel(t.channels, [&](int64_t channel, auto count) {
          const Vec<S> scale = load<S>(static_cast<const S*>(t.scale) + channel, count),
                       shift = load<S>(static_cast<const S*>(t.shift) + channel, count);
          const auto tap = [&](int64_t h, int64_t column) {
            return Vec<S>::set(static_cast<S>((h - top) * w.kernel_w + column - left));
          };
          Vec<S> largest = Vec<S>::set(-__builtin_inf()), taps = tap(rows.begin, columns.begin);
          for (int64_t h = rows.begin; h < rows.end; ++h) {
            const T* x = static_cast<const T*>(t.x) + (h * t.width + columns.begin) * t.channels + channel;
            for (int64_t column = columns.begin; column < columns.end; ++column, x += t.channels) {
              const Vec<S> z = form(fma(load<S>(x, count), scale, shift));
              taps = select_nan(z, tap(h, column), select_less(largest, z, tap(h, column), taps));
              largest = maximum(largest, z);
            }
          }
          store(static_cast<T*>(t.y) + at + channel, largest, count);
          store_taps<S>(t.taps + at + channel, taps, count);
        });
      }
  });
}

// The windows, [begin, end) of `size`, that a row or column is in.
CNNFAST_INLINE Inside windows_of(int64_t at, int64_t kernel, int64_t stride, int64_t pad, int64_t size) {
  const int64_t last = (at + pad) / stride, before = at + pad - kernel;
  return {before < 0 ? 0 : before / stride + 1, last + 1 - (before < 0 ? 0 : before / stride + 1), size};
}

template <class T>
void scale_shift_max_pool_grad(const ScaleShiftMaxPoolTile& t) {
  using S = typename Compute<T>::type;
  constexpr int64_t kRun = 16;
  const Window& w = t.window;
  with_activation<S>(t.activation, [&](const auto& form) {
    for (int64_t row = t.row_begin; row < t.row_end; ++row) {
      const Inside rows = windows_of(row, w.kernel_h, w.stride_h, w.pad_top, t.out_height);
      for (int64_t first = 0; first < t.width; first += kRun)
        each_panel(t.channels, [&](int64_t channel, auto count) {
          const Vec<S> scale = load<S>(static_cast<const S*>(t.scale) + channel, count),
                       shift = load<S>(static_cast<const S*>(t.shift) + channel, count);
          Vec<S> sum = Vec<S>::zero(), sum_by_x = Vec<S>::zero();
          for (int64_t column = first; column < smaller(first + kRun, t.width); ++column) {
            const Inside columns = windows_of(column, w.kernel_w, w.stride_w, w.pad_left, t.out_width);
            Vec<S> grad = Vec<S>::zero();
            for (int64_t oh = rows.begin; oh < rows.end; ++oh)
              for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
                const int64_t at = (oh * t.out_width + ow) * t.channels + channel;
                const int64_t tap =
                    (row - oh * w.stride_h + w.pad_top) * w.kernel_w + column - ow * w.stride_w + w.pad_left;
                const Vec<S> off = absolute(sub(load_taps<S>(t.taps + at, count), Vec<S>::set(static_cast<S>(tap))));
                const Vec<S> of_window = load<S>(static_cast<const T*>(t.grad) + at, count);
                grad = add(grad, select_less(off, Vec<S>::set(S(0.5)), of_window, Vec<S>::zero()));
              }
            const int64_t at = (row * t.width + column) * t.channels + channel;
            const Vec<S> x = load<S>(static_cast<const T*>(t.x) + at, count);
            const Vec<S> dz = form.gradient(grad, fma(x, scale, shift));
            if (t.dx) store(static_cast<T*>(t.dx) + at, mul(dz, scale), count);
            sum = add(sum, dz);
            sum_by_x = fma(dz, x, sum_by_x);
          }
          const auto add_to = [&](void* sums, Vec<S> of_run) {
            S* const p = static_cast<S*>(sums) + channel;
            store(p, add(load<S>(p, count), of_run), count);
          };
          add_to(t.sum, sum);
          add_to(t.sum_by_x, sum_by_x);
        });
    }
  });
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
