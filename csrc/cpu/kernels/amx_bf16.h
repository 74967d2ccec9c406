// bfloat16 GEMM on AMX: the inside of pointwise_conv2d, of conv2d (a row of a is a window of the image, read where it lies:
// GemmTile's lines and taps) and of the products in separable_conv2d and inverted_residual where x and the packing are
// bfloat16. The rest of an AMX machine's table is AVX-512's.
//
// Layout   a: rows of pixels, channels contiguous, readable and finite up to a depth of whole tiles; b: panels of kPanel
//          output channels, in a panel for each pair of the depth 16 columns x 2 (packing.h): a tile of b is 1 KiB.
// Tile     two runs of rows x 2 panels: four accumulators, two tiles of a and two of b, 32 of the depth at a time. A run
//          is up to 16 rows of a line (of all rows, in a plain product): a line is cut into equal ones, 56 into 4 of 14;
//          where they are more than the line the last takes some rows of the one before: the same sums again, which
//          are stored once.
// Loops    panels outside, rows inside: two panels (depth * 64 bytes) stay in L1 while the rows stream past, read with the
//          hint that they need not stay there, unless they are windows, whose next tap reads most of them again; the next
//          two panels, used once a call and so far away, are fetched into L2 meanwhile.
//          The sums of a block are finished (below) between the products of the next: 32 to 1024 deep products 10-15 % faster.
// Sums     pairs of the depth are added in order, in float32; the sum is multiplied by its column's scale and the bias
//          added, in one rounding; then the residual. An output's bits depend on its row of a and its column of b alone.
// Rate     4 tile products of 16 cycles for 32 x 32 x 32: 8192 multiply-adds in 16 cycles, where FMA does 512.
// Limits   The unit, and AVX-512's rounding to bfloat16, take subnormals as zero and flush results below 2^-126.
#pragma once
#include "amx.h"

namespace cnnfast::CNNFAST_ISA {
namespace {

// Lines [begin, end) of the 2 KiB that a pair of panels has for each kPairDepth of the depth.
struct Lines {
  int64_t begin, end;
};
constexpr int64_t kStepBytes = 2 * kPairDepth * kPanel * 2, kStepLines = kStepBytes / 64;

// What a tile that is loaded is to do in L1.
enum class In : uint8_t { stay, pass };
// The intrinsics want the tile's number as a literal.
template <In L1>
CNNFAST_INLINE void load_a0(const char* p, int64_t row) {
  if constexpr (L1 == In::stay)
    _tile_loadd(4, p, row);
  else
    _tile_stream_loadd(4, p, row);
}
template <In L1>
CNNFAST_INLINE void load_a1(const char* p, int64_t row) {
  if constexpr (L1 == In::stay)
    _tile_loadd(5, p, row);
  else
    _tile_stream_loadd(5, p, row);
}
template <In L1>
CNNFAST_INLINE void load_b0(const char* p) {
  if constexpr (L1 == In::stay)
    _tile_loadd(6, p, kPairBytes);
  else
    _tile_stream_loadd(6, p, kPairBytes);
}
template <In L1>
CNNFAST_INLINE void load_b1(const char* p) {
  if constexpr (L1 == In::stay)
    _tile_loadd(7, p, kPairBytes);
  else
    _tile_stream_loadd(7, p, kPairBytes);
}

// Sums of a block of two runs and two panels whose rows are finished a few at a time, between the products of the next block:
// the vector units work while the tiles' unit does. To bfloat16, through a clamp and without a residual, so that a row is a
// dozen instructions without a branch.
class Unfinished {
 public:
  explicit Unfinished(const GemmTile& t) : t_(t), clamp_(t.activation) {}
  ~Unfinished() { finish(); }
  Unfinished(const Unfinished&) = delete;

  // What comes next is of panels panel and panel + 1.
  void of_panels(int64_t panel) {
    column_ = panel * kPanel;
    const int64_t cols = smaller(t_.cols - column_, 2 * kPanel);
    kept_ = static_cast<__mmask32>((uint64_t{1} << cols) - 1);
    const auto both = [&](const void* numbers, Vec<float>(&to)[2]) {
      for (int p = 0; p < 2; ++p) to[p] = load<float>(static_cast<const float*>(numbers) + column_ + p * kPanel);
    };
    both(t_.bias, bias_);
    scale_[0] = scale_[1] = Vec<float>::set(1);
    if (t_.scale) both(t_.scale, scale_);
  }
  // Run 0 or 1 of the block: rows [row, row + rows).
  void put(int run, int64_t row, int64_t rows, const float* sums) {
    runs_[run] = {sums, static_cast<bf16*>(t_.y) + row * t_.y_row + column_, rows};
  }

  // Up to N rows of a run.
  template <int N>
  CNNFAST_INLINE void some(int run) {
    Rows& r = runs_[run];
    const int64_t rows = smaller(N, r.count), y_row = t_.y_row;
    const float* sums = r.sums;
    bf16* y = r.y;
    const Vec<float> scale0 = scale_[0], scale1 = scale_[1], bias0 = bias_[0], bias1 = bias_[1];
    const Clamp<float> clamp = clamp_;
    const __mmask32 kept = kept_;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i, sums += 2 * kPanel, y += y_row) {
      if (i >= rows) break;
      const Vec<float> v0 = clamp(fma(load<float>(sums), scale0, bias0)),
                       v1 = clamp(fma(load<float>(sums + kPanel), scale1, bias1));
      __builtin_prefetch(y + 2 * kTileRows * y_row, 1, 2);  // where the next rows of the panel go
      _mm512_mask_storeu_epi16(y, kept, (__m512i)_mm512_cvtne2ps_pbh(v1.v, v0.v));
    }
    r = {sums, y, r.count - rows};
  }
  void finish() {
    for (int run = 0; run < 2; ++run)
      while (runs_[run].count > 0) some<1>(run);
  }

 private:
  struct Rows {
    const float* sums;
    bf16* y;
    int64_t count;
  };
  const GemmTile& t_;
  Rows runs_[2] = {};
  int64_t column_ = 0;
  __mmask32 kept_ = 0;
  Vec<float> scale_[2], bias_[2];
  Clamp<float> clamp_;
};

// sums[16 R][32] of the runs that begin at a0 and a1, panels [panel, panel + P); lines `ahead` of the next pair into L2.
// Between the products, up to Each rows of either run of the block before.
template <int R, int P, In A, In B, int Each>
CNNFAST_INLINE void multiply(const GemmTile& t, const char* a0, const char* a1, int64_t panel, Lines ahead, float* sums,
                             Unfinished* before) {
  const int64_t a_bytes = t.a_row * 2;
  const char* b0 = static_cast<const char*>(t.b) + panel * t.b_panel * 2;
  const char* b1 = b0 + (P > 1 ? t.b_panel * 2 : 0);
  const char* next = b0 + 2 * t.b_panel * 2;
  zero_sums<R, P>();
  const int64_t together = t.taps ? t.tap_depth : t.depth;
  for (int64_t tap = 0, done = 0; done < t.depth; ++tap, done += together) {
    const char* at0 = a0 + tap_bytes(t, tap);
    const char* at1 = a1 + tap_bytes(t, tap);
    for (int64_t k = 0; k < together; k += kPairDepth) {
      for (int64_t line = ahead.begin; line < ahead.end; ++line) _mm_prefetch(next + line * 64, _MM_HINT_T1);
      load_a0<A>(at0, a_bytes);
      load_b0<B>(b0);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (P > 1) {
        load_b1<B>(b1);
        if constexpr (Each > 0) before->some<Each>(0);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R > 1) {
        load_a1<A>(at1, a_bytes);
        if constexpr (Each > 0) before->some<Each>(1);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (P > 1) _tile_dpbf16ps(3, 5, 7);
      }
      next += kStepBytes;
      at0 += kPairDepth * 2;
      at1 += kPairDepth * 2;
      b0 += kPairDepth * kPanel * 2;
      b1 += kPairDepth * kPanel * 2;
    }
  }
  if constexpr (Each > 0) before->finish();
  store_sums<R, P>(sums);
}

// The blocks of a product, one after the other: runs [run, run + 2), or the last one, of panels [panel, panel + P). Each: as
// above, or 0 to finish a block before the next one.
template <int Each>
class Blocks {
 public:
  Blocks(const GemmTile& t, const Runs& runs) : t_(t), runs_(runs), before_(t) {}

  template <int P, In A, In B>
  CNNFAST_INLINE void block(int64_t run, int64_t panel, Lines ahead) {
    const char *const a = runs_.begin(t_, run), *const a1 = run + 1 < runs_.count ? runs_.begin(t_, run + 1) : nullptr;
    float* const sums = sums_[turn_];
    if constexpr (Each > 0 && P > 1) {
      if (a1) {
        turn_ = !turn_;  // the other is still to be finished
        multiply<2, P, A, B, Each>(t_, a, a1, panel, ahead, sums, &before_);
        before_.of_panels(panel);
        for (int i = 0; i < 2; ++i) {
          const int64_t shared = runs_.shared(run + i);
          before_.put(i, runs_.first(run + i) + shared, runs_.rows - shared, of_run(sums, i, shared));
        }
        return;
      }
    }
    if (a1) {
      multiply<2, P, A, B, 0>(t_, a, a1, panel, ahead, sums, nullptr);
      finish_run<P>(run + 1, panel, 1, sums);
    } else {
      multiply<1, P, A, B, 0>(t_, a, a, panel, ahead, sums, nullptr);
    }
    finish_run<P>(run, panel, 0, sums);
  }

 private:
  static float* of_run(float* sums, int i, int64_t row) { return sums + (i * kTileRows + row) * 2 * kPanel; }
  template <int P>
  void finish_run(int64_t run, int64_t panel, int i, float* sums) {
    const int64_t shared = runs_.shared(run);
    cnnfast::CNNFAST_ISA::finish<P>(t_, runs_.first(run) + shared, runs_.rows - shared, panel, of_run(sums, i, shared));
  }

  const GemmTile& t_;
  const Runs& runs_;
  alignas(64) float sums_[2][2 * kTileRows * 2 * kPanel];
  int turn_ = 0;
  Unfinished before_;
};

template <In A, int Each>
void panels_outside(const GemmTile& t, const Runs& runs) {
  Blocks<Each> of(t, runs);
  const int64_t count = (t.cols + kPanel - 1) / kPanel, blocks = (runs.count + 1) / 2;
  int64_t panel = 0;
  for (; panel + 1 < count; panel += 2)
    for (int64_t i = 0; i < blocks; ++i) {
      const Lines ahead{kStepLines * i / blocks, panel + 3 < count ? kStepLines * (i + 1) / blocks : 0};
      of.template block<2, A, In::stay>(2 * i, panel, ahead);
    }
  if (panel < count)
    for (int64_t i = 0; i < blocks; ++i) of.template block<1, A, In::stay>(2 * i, panel, {0, 0});
}

template <int Each>
void rows_outside(const GemmTile& t, const Runs& runs) {
  Blocks<Each> of(t, runs);
  const int64_t count = (t.cols + kPanel - 1) / kPanel;
  for (int64_t run = 0; run < runs.count; run += 2) {
    int64_t panel = 0;
    for (; panel + 1 < count; panel += 2) of.template block<2, In::stay, In::pass>(run, panel, {0, 0});
    if (panel < count) of.template block<1, In::stay, In::pass>(run, panel, {0, 0});
  }
}

template <int Each>
void blocks(const GemmTile& t, const Runs& runs) {
  if (t.b_stays)
    rows_outside<Each>(t, runs);
  else
    t.taps ? panels_outside<In::stay, Each>(t, runs) : panels_outside<In::pass, Each>(t, runs);
}

void gemm_bf16(const GemmTile& t) {
  if (t.rows == 0) return;  // a configuration of tiles without rows faults
  const Runs runs(t);
  const Tiles tiles(runs.rows);
  // Few blocks (inverted residuals at batch 1) are not worth setting this up: 10 % of MobileNetV2.
  const bool few = runs.count * t.cols < 32 * 2 * kPanel;
  if (few || t.y_storage != Storage::bf16 || t.residual || !is_clamp(t.activation)) return blocks<0>(t, runs);
  // As few at a time as the steps of the depth are enough for.
  const int64_t steps = t.depth / kPairDepth;
  if (steps >= 16) return blocks<1>(t, runs);
  if (steps >= 8) return blocks<2>(t, runs);
  if (steps >= 4) return blocks<4>(t, runs);
  if (steps >= 2) return blocks<8>(t, runs);
  blocks<16>(t, runs);
}

}  // namespace
}  // namespace cnnfast::CNNFAST_ISA
