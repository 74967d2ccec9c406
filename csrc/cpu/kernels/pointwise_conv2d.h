// GEMM micro-kernel: the inside of pointwise_conv2d, of both halves of inverted_residual, of every pointwise gradient, and
// of conv2d: there a row of a is a window of the image, read where it lies (GemmTile's lines and taps).
//
// Layout   a: rows of pixels, channels contiguous, or, for a weight's gradient, the other way round; b: panels of
//          kPanel output channels, depth-major (packing.h); y: rows of pixels.
// Tile     kRows pixels x up to kPanels panels in registers: on AVX-512 7 x 4 accumulators of 32, one panel's vector
//          each and a broadcast; 7 divides the rows of 7, 14, 28, 56 and 112 pixels that these networks have. On AVX2
//          6 x 1, 12 accumulators of 16: a panel is two registers.
// Loops    panels outside, pixels inside: the group of panels (depth * 4 * 64 bytes) stays in L1/L2 while the tile's
//          pixels stream past it.
// Sums     an output is a chain of fused multiply-adds over the depth; a depth beyond kChain (a convolution's:
//          kWindowChain, as exact as PyTorch's in NCHW; whole taps, or even parts of one) is cut into chains that are
//          added, for less rounding; then the bias (first, it would make every partial sum as large as itself, and the
//          error of a 7x7 stem twice PyTorch's), then the residual. The same bits whatever the tile, the thread or the
//          neighbours in the batch.
// Rate     at best 2 FMA of 16 lanes a cycle; a step of the depth loads 4 vectors and 7 broadcasts for 28 FMA.
#pragma once
#include "activations.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 7, kPanels = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kPanels = 1;  // a panel is two registers: 12 accumulators of 16
#else
constexpr int kRows = 2, kPanels = 1;  // 16 lanes are four SSE or NEON registers: 8 accumulators
#endif
constexpr int64_t kChain = 384, kWindowChain = 192;
// From which depth on lines of y come while the products are made; before, asking for them costs more than the stores.
constexpr int64_t kLinesAhead = 64;
constexpr int64_t kLine = 64;  // bytes, of the cache

// A block's sums to y in any storage: in memory, by loops, for what isn't in a hurry.
template <class S>
__attribute__((noinline)) void finish_sums(const GemmTile& t, int64_t row, int64_t rows, int64_t column, int64_t panels,
                                           S* sums) {
  const auto each = [&](auto f) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t at = column + p * kPanel;
        f(sums + (r * panels + p) * kPanel, row + r, at, t.cols - at);
      }
  };
  each([&](S* at, int64_t y, int64_t x, int64_t left) {
    Vec<S> sum = load<S>(at);
    if (t.bias) sum = add(sum, load<S>(static_cast<const S*>(t.bias) + x));
    if (t.residual) sum = add(sum, load_storage<S>(t.residual, y * t.residual_row + x, left, t.y_storage));
    store(at, is_clamp(t.activation) ? Clamp<S>(t.activation)(sum) : sum);
  });
  if (!is_clamp(t.activation)) curve(sums, rows * panels, t.activation.code);
  each([&](const S* at, int64_t y, int64_t x, int64_t left) {
    store_storage(t.y, y * t.y_row + x, load<S>(at), left, t.y_storage);
  });
}

// Rows [row, row + R), which begin at `a`, panels [panel, panel + P), of the depth [done, end). `sums`: of the chains
// before, and for those to come. `share`: bytes of the next panels to ask for in each step of the depth.
template <class S, int R, int P>
__attribute__((noinline)) void gemm_chain(const GemmTile& t, const S* a, int64_t row, int64_t panel, int64_t done,
                                          int64_t end, int64_t share, S* sums) {
  const int64_t a_depth = t.a_depth;
  const int64_t first = panel * kPanel;
  // Three pointers reach seven rows (pointer + 0, 1, 2 row strides): no address arithmetic between the multiplications.
  const int64_t a_row = t.a_row;
  const S* b = static_cast<const S*>(t.b) + panel * t.b_panel + done * kPanel;

  // While this group of panels works from L2, the next one comes from memory, an even share during each block of rows.
  const char* next = reinterpret_cast<const char*>(static_cast<const S*>(t.b) + (panel + P) * t.b_panel);
  next += row / R * share * t.depth + done * share;
  if (t.ahead) {
    // A line in each step, up to the last.
    const int64_t step = (panel / kPanels * ((t.rows + R - 1) / R) + row / R) * t.depth + done;
    next = static_cast<const char*>(t.ahead) + smaller(step * kLine, t.ahead_bytes);
    share = step * kLine < t.ahead_bytes ? kLine : 0;
  }

  // Lines of y are asked for now, so that the stores at the end don't wait for memory.
  const bool plain = t.y_storage == (sizeof(S) == 8 ? Storage::f64 : Storage::f32);
  if (plain && end == t.depth && end >= kLinesAhead)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
        __builtin_prefetch(static_cast<S*>(t.y) + (row + r) * t.y_row + first + p * kPanel, 1, 3);

  // The loops over registers must unroll, or the accumulators live on the stack.
  Vec<S> acc[R * P];
#pragma GCC unroll 32
  for (int i = 0; i < R * P; ++i) acc[i] = Vec<S>::zero();
  int64_t k = done;
  do {
    // A plain product's depth is side by side; a convolution's up to the next tap.
    const S* a0 = a + k * a_depth;
    int64_t count = end - k;
    if (t.tap_depth > 0) {
      const int64_t tap = k / t.tap_depth, in_tap = k - tap * t.tap_depth;
      a0 = a + tap / t.taps * t.a_tap_line + tap % t.taps * t.a_tap + in_tap;
      count = smaller(count, t.tap_depth - in_tap);
    }
    k += count;
    const S* a3 = a0 + (R > 3 ? 3 * a_row : 0);
    const S* a6 = a0 + (R > 6 ? 6 * a_row : 0);
    for (; count > 0; --count) {
      Vec<S> w[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) w[p] = load<S>(b + p * t.b_panel);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        // By itself: of (r < 3 ? ...)[r % 3 * ...], g++ 12's UBSan computes the index for another r.
        const S* near = r < 3 ? a0 : (r < 6 ? a3 : a6);
        const Vec<S> x = Vec<S>::set(near[r % 3 * a_row]);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r * P + p] = fma(x, w[p], acc[r * P + p]);
      }
      __builtin_prefetch(next, 0, 2);
      next += share;
      a0 += a_depth;
      a3 += a_depth;
      a6 += a_depth;
      b += kPanel;
    }
  } while (k < end);
  if (done > 0)
#pragma GCC unroll 32
    for (int i = 0; i < R * P; ++i) acc[i] = add(load<S>(sums + i * kPanel), acc[i]);
  if (end < t.depth || !plain) {
#pragma GCC unroll 32
    for (int i = 0; i < R * P; ++i) store(sums + i * kPanel, acc[i]);
    if (end == t.depth) finish_sums(t, row, R, first, P, sums);
    return;
  }
  // Only the matrix' last panel ends before its last lane.
  const auto left = [&](int p) { return p + 1 < P ? kPanel : smaller(t.cols - first - p * kPanel, kPanel); };
  if (t.bias)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const Vec<S> bias = load<S>(static_cast<const S*>(t.bias) + first + p * kPanel);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r * P + p] = add(acc[r * P + p], bias);
    }
  if (t.residual) {
    const S* const residual = static_cast<const S*>(t.residual) + row * t.residual_row + first;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
        acc[r * P + p] = add(acc[r * P + p], load<S>(residual + r * t.residual_row + p * kPanel, left(p)));
  }
  activate(acc, t.activation);
  S* const y = static_cast<S*>(t.y) + row * t.y_row + first;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store(y + r * t.y_row + p * kPanel, acc[r * P + p], left(p));
}

// Where the chain ends that begins at `done`.
CNNFAST_INLINE int64_t chain_end(const GemmTile& t, int64_t done) {
  if (t.chain > 0) {
    const int64_t parts = (t.depth + t.chain - 1) / t.chain;
    return smaller(t.depth, done + (t.depth + parts - 1) / parts);
  }
  if (t.tap_depth == 0) return smaller(t.depth, done + kChain);
  if (t.tap_depth <= kWindowChain) return smaller(t.depth, done + kWindowChain / t.tap_depth * t.tap_depth);
  const int64_t parts = (t.tap_depth + kWindowChain - 1) / kWindowChain, part = (t.tap_depth + parts - 1) / parts;
  return smaller((done / t.tap_depth + 1) * t.tap_depth, done + part);
}

template <class S, int R, int P>
CNNFAST_INLINE void gemm_block(const GemmTile& t, int64_t row, int64_t panel, int64_t share) {
  alignas(64) S sums[R * P * kPanel];
  const S* const a =
      static_cast<const S*>(t.a) + (t.line ? row / t.line * t.a_line + row % t.line * t.a_row : row * t.a_row);
  int64_t done = 0;
  do {
    const int64_t end = chain_end(t, done);
    gemm_chain<S, R, P>(t, a, row, panel, done, end, share, sums);
    done = end;
  } while (done < t.depth);
}

// `count` rows, R at most.
template <class S, int R, int P>
CNNFAST_INLINE void gemm_few_rows(const GemmTile& t, int64_t row, int64_t count, int64_t panel, int64_t share) {
  if (count == R) return gemm_block<S, R, P>(t, row, panel, share);
  if constexpr (R > 1) gemm_few_rows<S, R - 1, P>(t, row, count, panel, share);
}

// Rows [row, end), of one line. The last two blocks are even: one of a row or two would wait for the weights.
template <class S, int R, int P>
void gemm_rows(const GemmTile& t, int64_t row, int64_t end, int64_t panel, int64_t share) {
  for (; end - row == R || end - row >= 2 * R; row += R) gemm_block<S, R, P>(t, row, panel, share);
  const int64_t half = end - row > R ? (end - row + 1) / 2 : 0;
  gemm_few_rows<S, R, P>(t, row, half, panel, share);
  gemm_few_rows<S, R, P>(t, row + half, end - row - half, panel, share);
}

template <class S, int P>
void gemm_panels(const GemmTile& t, int64_t panel) {
  const int64_t left = (t.cols + kPanel - 1) / kPanel - panel;
  if (left <= 0) return;
  if constexpr (P > 1) {
    // 5 panels are 3 + 2, not 4 + 1: a lone panel has too few accumulators to hide the latency of the FMA.
    if (left < P || left == P + 1) {
      gemm_panels<S, P - 1>(t, panel);
      return;
    }
  }
  const int64_t line = t.line ? t.line : t.rows;
  const int64_t share = P * kPanel * static_cast<int64_t>(sizeof(S)) / ((t.rows + kRows - 1) / kRows);
  for (int64_t row = 0; row < t.rows; row += line) gemm_rows<S, kRows, P>(t, row, row + line, panel, share);
  gemm_panels<S, P>(t, panel + P);
}

template <class S>
void gemm(const GemmTile& t) {
  if (t.rows == 0) return;
  gemm_panels<S, kPanels>(t, 0);
}

// `count` pairs of the depth of a panel, times the columns' scales: [pair][column][2] to [depth][column].
void unpair(const void* pairs, const void* scale, void* panel, int64_t count) {
  float factors[kPanel];  // aligned
  __builtin_memcpy(factors, scale, sizeof(factors));
  const bf16* from = static_cast<const bf16*>(pairs);
  float* to = static_cast<float*>(panel);
  for (int64_t i = 0; i < count; ++i, from += 2 * kPanel, to += 2 * kPanel)
    for (int64_t c = 0; c < kPanel; ++c) {
      to[c] = widen(from[2 * c]) * factors[c];
      to[kPanel + c] = widen(from[2 * c + 1]) * factors[c];
    }
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
