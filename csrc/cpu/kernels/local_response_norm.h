// Local response normalisation, one pass: y = x d^-beta, d = k + scale * sum of x^2 over a window of channels.
//
// Layout  a matrix whose rows are pixels and columns channels (channels_last), or the other way round (NCHW); vectors
//         of columns in both. A block of x lies in L1 or L2 with zeros around its channels, so that a vector's sums are
//         a load a channel of the window, each from zero on: no running sum, whose cancellation would show.
// Bytes   x read and y written once; backward grad besides. The block is written once and read once a window's channel.
// Power   0.5, 0.75 and 1 by square roots, any other by the C library in float64, lane by lane. Divisions and roots are
//         correctly rounded, which also gives PyTorch's NaN, Inf and 0 for a d that is infinite, zero or negative.
// Error   of y in float32, windows of up to 31 channels: at most 8 units of 2^-24 |y|; measured 5.6 for 5 channels, 6.2
//         for 31, where PyTorch's own has 5.5 and 6.8 (tests/ops/test_local_response_norm.py).
#pragma once
#include "vec.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

template <class S>
struct One {
  CNNFAST_INLINE Vec<S> operator()(Vec<S> d) const { return d; }
};
template <class S>
struct Half {
  CNNFAST_INLINE Vec<S> operator()(Vec<S> d) const { return square_root(d); }
};
template <class S>
struct ThreeQuarters {
  CNNFAST_INLINE Vec<S> operator()(Vec<S> d) const {
    const Vec<S> root = square_root(d);
    return mul(root, square_root(root));
  }
};
template <class S>
struct Power {
  double beta;
  __attribute__((noinline)) Vec<S> operator()(Vec<S> d) const {
    alignas(64) S lanes[kPanel];
    store(lanes, d);
    for (int i = 0; i < kPanel; ++i) lanes[i] = static_cast<S>(__builtin_pow(lanes[i], beta));
    return load<S>(lanes);
  }
};

template <class S, class F>
CNNFAST_INLINE void with_power(double beta, F f) {
  if (beta == 0.75) return f(ThreeQuarters<S>{});
  if (beta == 0.5) return f(Half<S>{});
  if (beta == 1) return f(One<S>{});
  f(Power<S>{beta});
}

// f(column, count) for vectors of columns; count is a constant but for the last.
template <class F>
CNNFAST_INLINE void each_vector(int64_t cols, F f) {
  int64_t c = 0;
  for (; c + kPanel <= cols; c += kPanel) f(c, kPanel);
  if (c < cols) f(c, cols - c);
}

// A block of the matrix with `before` and `after` channels of zeros around it.
template <class S>
struct Padded {
  S* values;
  int64_t row, channel, before;

  CNNFAST_INLINE Padded(const LocalResponseNormTile& t, S* at, int64_t channels_before, int64_t channels_after)
      : values(at), row(t.padded_row), channel(t.padded_channel), before(channels_before) {
    // Zeros around each row of pixels, or around the block of rows of channels.
    const bool in_rows = channel == 1;
    const int64_t size = in_rows ? row : t.padded_size, first = before * channel;
    const int64_t last = in_rows ? before + t.cols : size - channels_after * channel;
    for (int64_t i = 0; i < t.padded_size; i += size) {
      for (int64_t j = 0; j < first; ++j) values[i + j] = 0;
      for (int64_t j = last; j < size; ++j) values[i + j] = 0;
    }
  }

  CNNFAST_INLINE void set(int64_t r, int64_t c, Vec<S> x, int64_t count) const {
    store(values + r * row + c + before * channel, x, count);
  }
  CNNFAST_INLINE Vec<S> get(int64_t r, int64_t c) const { return load<S>(values + r * row + c + before * channel); }
  // Sums over the channels of a window, `before` channels before this one the first.
  CNNFAST_INLINE Vec<S> sum(int64_t r, int64_t c, int64_t channels) const {
    const S* p = values + r * row + c;
    Vec<S> total = load<S>(p);
    for (int64_t i = 1; i < channels; ++i) total = add(total, load<S>(p + i * channel));
    return total;
  }
  CNNFAST_INLINE Vec<S> sum_of_squares(int64_t r, int64_t c, int64_t channels) const {
    const S* p = values + r * row + c;
    Vec<S> total = mul(load<S>(p), load<S>(p));
    for (int64_t i = 1; i < channels; ++i) total = fma(load<S>(p + i * channel), load<S>(p + i * channel), total);
    return total;
  }
};

// f(row of the tile, row of the block, column, count) for all vectors of the rows [first, last) of the tile.
template <class F>
CNNFAST_INLINE void each_in(const LocalResponseNormTile& t, int64_t first, int64_t last, F f) {
  for (int64_t r = first; r < last; ++r)
    each_vector(t.cols, [&](int64_t c, int64_t count)
                            __attribute__((always_inline)) { f(r * t.row + c, r - first, c, count); });
}

// The window's d of each vector of x.
template <class S>
struct Denominator {
  const Padded<S>& x;
  Vec<S> scale, k;
  int64_t window;

  CNNFAST_INLINE Denominator(const LocalResponseNormTile& t, const Padded<S>& padded)
      : x(padded),
        scale(Vec<S>::set(static_cast<S>(t.scale))),
        k(Vec<S>::set(static_cast<S>(t.k))),
        window(t.before + 1 + t.after) {}
  CNNFAST_INLINE Vec<S> operator()(int64_t r, int64_t c) const { return fma(x.sum_of_squares(r, c, window), scale, k); }
};

template <class T>
void local_response_norm(const LocalResponseNormTile& t) {
  using S = typename Compute<T>::type;
  T* const y = static_cast<T*>(t.y);
  const Padded<S> x(t, static_cast<S*>(t.padded), t.before, t.after);
  const Denominator<S> d(t, x);
  with_power<S>(t.beta, [&](auto power) {
    for (int64_t first = 0; first < t.rows; first += t.rows_at_once) {
      const int64_t last = smaller(first + t.rows_at_once, t.rows);
      each_in(t, first, last, [&](int64_t at, int64_t r, int64_t c, int64_t count) __attribute__((always_inline)) {
        x.set(r, c, load<S>(static_cast<const T*>(t.x) + at, count), count);
      });
      each_in(t, first, last, [&](int64_t at, int64_t r, int64_t c, int64_t count) __attribute__((always_inline)) {
        store(y + at, divide(x.get(r, c), power(d(r, c))), count);
      });
    }
  });
}

// dx = p - 2 scale beta x * sum of p x / d over the channels whose window holds this one; p = grad d^-beta.
template <class T>
void local_response_norm_backward(const LocalResponseNormTile& t) {
  using S = typename Compute<T>::type;
  const T* const grad = static_cast<const T*>(t.grad);
  T* const dx = static_cast<T*>(t.y);
  const Vec<S> factor = Vec<S>::set(static_cast<S>(-2 * t.scale * t.beta));
  S* const block = static_cast<S*>(t.padded);
  const Padded<S> x(t, block, t.before, t.after);
  const Padded<S> through_d(t, block + t.padded_size, t.after, t.before);
  S* const direct = block + 2 * t.padded_size;
  const Denominator<S> denominator(t, x);
  with_power<S>(t.beta, [&](auto power) {
    for (int64_t first = 0; first < t.rows; first += t.rows_at_once) {
      const int64_t last = smaller(first + t.rows_at_once, t.rows);
      each_in(t, first, last, [&](int64_t at, int64_t r, int64_t c, int64_t count) __attribute__((always_inline)) {
        x.set(r, c, load<S>(static_cast<const T*>(t.x) + at, count), count);
      });
      each_in(t, first, last, [&](int64_t at, int64_t r, int64_t c, int64_t count) __attribute__((always_inline)) {
        const Vec<S> d = denominator(r, c);
        const Vec<S> p = divide(load<S>(grad + at, count), power(d));
        store(direct + r * t.padded_row + c, p);
        through_d.set(r, c, divide(mul(p, x.get(r, c)), d), count);
      });
      each_in(t, first, last, [&](int64_t at, int64_t r, int64_t c, int64_t count) __attribute__((always_inline)) {
        const Vec<S> sum = through_d.sum(r, c, denominator.window), p = load<S>(direct + r * t.padded_row + c);
        store(dx + at, fma(mul(x.get(r, c), factor), sum, p), count);
      });
    }
  });
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
