// Max and average pooling.
//
// Layout   pixels of contiguous channels; a row of pooled pixels at a time.
// Loops    max: panels of channels outside, pixels inside, so that a column's largest serves all windows that it is in;
//          average: pixels outside, since its sums begin anew in each window, groups of panels inside.
// Sums     over a window's rows, in order, from zero, then divided: the same bits as PyTorch's.
#pragma once
#include "vec.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// [begin, end) of a row or column of x, from a window's `first` on.
struct Inside {
  int64_t begin, end;
  Inside(int64_t first, int64_t kernel, int64_t size) : begin(larger(0, first)), end(smaller(size, first + kernel)) {}
  int64_t count() const { return end - begin; }
};

// One panel of channels of one row of pooled pixels; `rows` of x are in the windows.
template <class T, bool Full>
CNNFAST_INLINE void max_pool_row(const Pool2dTile& t, Inside rows, int64_t y, int64_t channel) {
  using S = typename Compute<T>::type;
  const int64_t count = Full ? kPanel : t.channels - channel, row = t.width * t.channels;
  const T* x = static_cast<const T*>(t.x) + (rows.begin - t.x_first_row) * row + channel;
  const auto largest_in = [&](int64_t column) {
    const T* pixel = x + column * t.channels;
    Vec<S> largest = load<S>(pixel, count);
    for (int64_t h = rows.begin + 1; h < rows.end; ++h) largest = maximum(largest, load<S>(pixel += row, count));
    return largest;
  };
  constexpr int64_t kKept = 4;  // columns
  const Window& w = t.window;
  Vec<S> kept[kKept];
  int64_t done = 0;  // columns before this one are, where a window has no more than kKept
  for (int64_t ow = 0; ow < t.out_width; ++ow) {
    const Inside columns(ow * w.stride_w - w.pad_left, w.kernel_w, t.width);
    Vec<S> largest = Vec<S>::set(-__builtin_inf());
    for (int64_t column = columns.begin; column < columns.end; ++column) {
      Vec<S>& of_column = kept[column % kKept];
      if (column >= done || w.kernel_w > kKept) of_column = largest_in(column);
      largest = maximum(largest, of_column);
    }
    done = larger(done, columns.end);
    store_storage(t.y, y + ow * t.y_pixel + channel, largest, count, t.y_storage);
  }
}

template <class T>
void max_pool2d(const Pool2dTile& t) {
  const Window& w = t.window;
  for (int64_t oh = t.row_begin; oh < t.row_end; ++oh) {
    const Inside rows(oh * w.stride_h - w.pad_top, w.kernel_h, t.height);
    const int64_t y = (oh - t.row_begin) * t.out_width * t.y_pixel;
    int64_t channel = 0;
    for (; channel + kPanel <= t.channels; channel += kPanel) max_pool_row<T, true>(t, rows, y, channel);
    if (channel < t.channels) max_pool_row<T, false>(t, rows, y, channel);
  }
}

// P panels of channels of one pooled pixel.
template <class T, int P, bool Full>
CNNFAST_INLINE void avg_pool_panels(const Pool2dTile& t, Inside rows, Inside columns,
                                    Vec<typename Compute<T>::type> divisor, int64_t y, int64_t channel) {
  using S = typename Compute<T>::type;
  const int64_t count = Full ? kPanel : t.channels - channel, row = t.width * t.channels;
  const T* line = static_cast<const T*>(t.x) + (rows.begin - t.x_first_row) * row + channel;
  Vec<S> sums[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sums[p] = Vec<S>::zero();
  for (int64_t h = rows.begin; h < rows.end; ++h, line += row)
    for (int64_t column = columns.begin; column < columns.end; ++column)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[p] = add(sums[p], load<S>(line + column * t.channels + p * kPanel, count));
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
    store_storage(t.y, y + channel + p * kPanel, divide(sums[p], divisor), count, t.y_storage);
}

template <class T>
void avg_pool2d(const Pool2dTile& t) {
  using S = typename Compute<T>::type;
  constexpr int kTogether = 4;  // panels: additions wait for each other
  const Window& w = t.window;
  for (int64_t oh = t.row_begin; oh < t.row_end; ++oh) {
    const int64_t top = oh * w.stride_h - w.pad_top;
    const Inside rows(top, w.kernel_h, t.height);
    for (int64_t ow = 0; ow < t.out_width; ++ow) {
      const int64_t left = ow * w.stride_w - w.pad_left;
      const Inside columns(left, w.kernel_w, t.width);
      // Of a window that reaches beyond the padding, that part doesn't count.
      const int64_t pixels = t.count_include_pad ? (smaller(top + w.kernel_h, t.height + w.pad_top) - top) *
                                                       (smaller(left + w.kernel_w, t.width + w.pad_left) - left)
                                                 : rows.count() * columns.count();
      const Vec<S> divisor = Vec<S>::set(static_cast<S>(pixels));
      const int64_t y = ((oh - t.row_begin) * t.out_width + ow) * t.y_pixel;
      int64_t channel = 0;
      for (; channel + kTogether * kPanel <= t.channels; channel += kTogether * kPanel)
        avg_pool_panels<T, kTogether, true>(t, rows, columns, divisor, y, channel);
      for (; channel + kPanel <= t.channels; channel += kPanel)
        avg_pool_panels<T, 1, true>(t, rows, columns, divisor, y, channel);
      if (channel < t.channels) avg_pool_panels<T, 1, false>(t, rows, columns, divisor, y, channel);
    }
  }
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
