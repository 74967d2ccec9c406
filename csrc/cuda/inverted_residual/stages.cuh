// inverted_residual: what a block does between two barriers.
#pragma once
#include "../depthwise_conv2d/common.cuh"
#include "../matrix.cuh"
#include "plan.cuh"

namespace cnnfast::cuda {

template <class T>
struct InvertedResidualArguments {
  const T* x = nullptr;              // (N, H, W, C)
  const T* expand_weight = nullptr;  // (E, C); null: no expansion
  Parameter expand_bias;
  const T* dw_weight = nullptr;  // (E, kh, kw)
  Parameter dw_bias;
  const T* project_weight = nullptr;  // (K, E)
  Parameter project_bias;
  const T* residual = nullptr;  // as y, or null
  T* y = nullptr;               // (N, OH, OW, K)
  T* d = nullptr;               // (N, OH, OW, E), where d and its sums are wanted, not y
  float* partial = nullptr;     // (N, tiles, E), likewise
  InvertedResidualShape shape;
  int activation = kIdentity;
  // Whether rows of so many elements begin at multiples of 16 bytes: C (x, expand_weight), E, K (y, residual).
  bool vectors_c = false, vectors_e = false, vectors_k = false;
};

// Where this block's outputs begin, its output channels and its expanded channels.
struct BlockPlace {
  int64_t image;
  int row, column, channel, expanded;

  BlockPlace() = default;
  __device__ BlockPlace(const InvertedResidualPlan& p, int chunk) {
    const unsigned tile = blockIdx.x / p.tiles_w;
    column = static_cast<int>(blockIdx.x % p.tiles_w) * p.tile_w;
    row = static_cast<int>(tile % p.tiles_h) * p.tile_h;
    image = tile / p.tiles_h;
    channel = static_cast<int>(blockIdx.y) % p.column_blocks * p.out_columns;
    expanded = static_cast<int>(blockIdx.y) / p.column_blocks * p.chunks * chunk;
  }
};

// The pieces of 16 bytes of rows, in order of memory, this thread's.
struct Pieces {
  int row, piece;

  __device__ explicit Pieces(int in_row)
      : row(threadIdx.x / in_row),
        piece(threadIdx.x % in_row),
        in_row(in_row),
        rows_on(kBlockThreads / in_row),
        pieces_on(kBlockThreads % in_row) {}
  __device__ void next() {
    row += rows_on;
    piece += pieces_on;
    if (piece >= in_row) piece -= in_row, ++row;
  }

 private:
  int in_row, rows_on, pieces_on;
};

// Starts copying 16 bytes of one of a's tensors, of which `count` elements are there, zeros for the others.
template <auto kFrom, class T>
__device__ inline void copy_piece(T* to, int to_at, const InvertedResidualArguments<T>& a, int64_t from_at, int count,
                                  bool vectors) {
  if (vectors) {
    cp_async(to, to_at, a.*kFrom, count > 0 ? from_at : 0, count > 0);  // aligned even where nothing is read
    return;
  }
  for (int i = 0; i < kVec<T>; ++i) shared_store(to, to_at + i, global_load<T>(a.*kFrom, from_at + i, i < count));
}

// Starts copying the first `length` elements from `first` on of so many rows. from_row(row) is where a row begins, negative:
// none, zeros; to_piece(row, piece) where a piece goes.
template <auto kFrom, class T, class FromRow, class ToPiece>
__device__ inline void copy_rows(T* to, const InvertedResidualArguments<T>& a, Pieces at, int rows, int first,
                                 int length, bool vectors, FromRow from_row, ToPiece to_piece) {
  for (; at.row < rows; at.next()) {
    const int64_t row_at = from_row(at.row);
    const int begin = at.piece * kVec<T>;
    copy_piece<kFrom>(to, to_piece(at.row, at.piece), a, row_at + first + begin, row_at >= 0 ? length - begin : 0,
                      vectors);
  }
}

// Where in the image each input of the tile lies, row << 16 | column from the tile's first; -1: nowhere.
__device__ inline void locate_inputs(int* positions, const InvertedResidualShape& s, const InvertedResidualPlan& p,
                                     const BlockPlace& place) {
  const int top = place.row * s.stride_h - s.pad_top, left = place.column * s.stride_w - s.pad_left;
  for (int i = threadIdx.x; i < ceil_div(p.in_pixels(), 16) * 16; i += kBlockThreads) {
    const int row = i / p.in_w, column = i % p.in_w;
    const bool inside =
        i < p.in_pixels() && top + row >= 0 && top + row < s.height && left + column >= 0 && left + column < s.width;
    shared_store(positions, i, inside ? row << 16 | column : -1);
  }
}

// Of x, where a tile's input begins, or -1.
struct InputRow {
  const int* positions;
  int64_t first;  // the pixel before x's, of the tile's first input
  int width, channels;

  __device__ InputRow(const int* positions, const InvertedResidualShape& s, const BlockPlace& place)
      : positions(positions),
        first((place.image * s.height + place.row * static_cast<int64_t>(s.stride_h) - s.pad_top) * s.width +
              place.column * static_cast<int64_t>(s.stride_w) - s.pad_left),
        width(s.width),
        channels(s.channels) {}
  __device__ int64_t operator()(int i) const {
    const int position = shared_load<int>(positions, i);
    if (position < 0) return -1;
    return (first + static_cast<int64_t>(position >> 16) * width + (position & 0xffff)) * channels;
  }
};

// Where pieces go: slabs of x's channels, or a row after the other.
template <class T>
struct SlabPiece {
  int slab;  // elements
  __device__ int operator()(int row, int piece) const {
    return piece / 2 * slab + MatrixTile<T, kSlabBytes>::at(row, piece % 2);
  }
};
template <class T>
struct RowPiece {
  int pitch;  // elements
  __device__ int operator()(int row, int piece) const { return row * pitch + piece * kVec<T>; }
};
template <class T>
struct ChunkPiece {
  __device__ int operator()(int row, int piece) const { return MatrixTile<T, kChunkBytes>::at(row, piece); }
};

template <class T>
__device__ inline void copy_inputs(T* x, const InvertedResidualArguments<T>& a, const InvertedResidualPlan& p,
                                   const InputRow& from_row) {
  copy_rows<&InvertedResidualArguments<T>::x>(x, a, Pieces(2 * p.slabs), p.in_pixels(), 0, a.shape.channels,
                                              a.vectors_c, from_row, SlabPiece<T>{p.x_slab});
}

// A chunk of x straight into the expanded tensor, where there is no expansion.
template <class T>
__device__ inline void copy_chunk(T* e, const InvertedResidualArguments<T>& a, const InvertedResidualPlan& p,
                                  const InputRow& from_row, int first) {
  copy_rows<&InvertedResidualArguments<T>::x>(e, a, Pieces(4), p.in_pixels(), first, a.shape.channels - first,
                                              a.vectors_c, from_row, RowPiece<T>{kExpandedPitch<T>});
}

// The weights of the chunk of expanded channels from `first` on.
template <class T>
__device__ inline void copy_weights(unsigned char* stage, const InvertedResidualArguments<T>& a,
                                    const InvertedResidualPlan& p, const BlockPlace& place, int first) {
  using Arguments = InvertedResidualArguments<T>;
  const InvertedResidualShape& s = a.shape;
  const int thread = threadIdx.x, count = min(kChunk<T>, s.expanded - first), taps = s.taps();
  for (int piece = thread; piece < 4 * taps; piece += kBlockThreads)
    copy_piece<&Arguments::dw_weight>(reinterpret_cast<T*>(stage), piece * kVec<T>, a,
                                      static_cast<int64_t>(first) * taps + piece * kVec<T>,
                                      count * taps - piece * kVec<T>, a.vectors_e);
  if (s.expands) {
    constexpr int kLanes = kBlockThreads / kChunk<T>;  // of a row
    const SlabPiece<T> to{p.weight_slab};
    const int row = thread / kLanes, length = row < count ? s.channels : 0;
    const int64_t row_at = static_cast<int64_t>(first + row) * s.channels;
    for (int piece = thread % kLanes; piece < 2 * p.slabs; piece += kLanes)
      copy_piece<&Arguments::expand_weight>(reinterpret_cast<T*>(stage + p.expand), to(row, piece), a,
                                            row_at + piece * kVec<T>, length - piece * kVec<T>, a.vectors_c);
  }
  const int piece = thread % 4, channels = s.out_channels - place.channel;
  for (int row = thread / 4; row < p.out_columns; row += kBlockThreads / 4)
    copy_piece<&Arguments::project_weight>(
        reinterpret_cast<T*>(stage + p.project), MatrixTile<T, kChunkBytes>::at(row, piece), a,
        static_cast<int64_t>(place.channel + row) * s.expanded + first + piece * kVec<T>,
        row < channels ? count - piece * kVec<T> : 0, a.vectors_e);
}

// What this thread has of a chunk's biases: of the expansion, then of the depthwise stage.
template <class T>
__device__ inline float load_bias(const InvertedResidualArguments<T>& a, int first) {
  const int channel = first + static_cast<int>(threadIdx.x) % kChunk<T>;
  if (static_cast<int>(threadIdx.x) >= 2 * kChunk<T> || channel >= a.shape.expanded) return 0;
  const Parameter& bias = static_cast<int>(threadIdx.x) < kChunk<T> ? a.expand_bias : a.dw_bias;
  return bias.data ? load_parameter<T>(bias, channel) : 0;
}

template <class T>
struct alignas(4) ChannelWord {
  static constexpr int kCount = 4 / static_cast<int>(sizeof(T));
  T v[kCount];
};

template <int n>
struct alignas(4 * n) Floats {
  float v[n];
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

template <class T>
__device__ inline void store_pair(T* to, int at, float first, float second) {
  shared_store(to, at, Pair<T>{narrow<T>(first), narrow<T>(second)});
}

// Where an input goes in e (negative: nowhere), and whether it is in the image: otherwise zeros go there.
struct ExpandedPlace {
  int row;
  bool inside;
};
struct ToTile {
  const int* positions;
  __device__ ExpandedPlace operator()(int input) const { return {input, shared_load<int>(positions, input) >= 0}; }
};

// e = activation(x expand_weight + bias), zeros outside of the image: a warp takes 16 inputs x the chunk at a time.
template <class T, Multiply kMultiply, class To>
__device__ inline void expand(T* e, const T* x, const T* weight, const float* bias, int inputs,
                              const InvertedResidualPlan& p, int activation, To to) {
  const int warp = threadIdx.x / 32;
  for (int first = warp * 16; first < inputs; first += kBlockWarps * 16) {
    WarpProduct<T, kMultiply, 1, kChunk<T> / 8, kSlabBytes> product;
    product.clear();
    const auto add = [&](int slab) {
      product.multiply_add(x + slab * p.x_slab, first, weight + slab * p.weight_slab, 0);
    };
    if constexpr (kMultiply == Multiply::tensor_cores) {  // unrolled as far as registers allow
#pragma unroll 2
      for (int slab = 0; slab < p.slabs; ++slab) add(slab);
    } else {
#pragma unroll 1
      for (int slab = 0; slab < p.slabs; ++slab) add(slab);
    }
    float shift[kChunk<T> / 4];
#pragma unroll
    for (int j = 0; j < kChunk<T> / 8; ++j) {
      const Floats<2> pair = shared_load<Floats<2>>(bias, product.column(j, 0));
      shift[2 * j] = pair.v[0], shift[2 * j + 1] = pair.v[1];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ExpandedPlace place = to(first + product.row(0, 2 * half));
      if (place.row < 0) continue;
      float v[kChunk<T> / 4];
#pragma unroll
      for (int i = 0; i < kChunk<T> / 4; ++i) v[i] = product.sums[0][i / 2][2 * half + i % 2] + shift[i];
      activate(v, activation);
#pragma unroll
      for (int j = 0; j < kChunk<T> / 8; ++j)
        store_pair(e, place.row * kExpandedPitch<T> + product.column(j, 0), place.inside ? v[2 * j] : 0.0f,
                   place.inside ? v[2 * j + 1] : 0.0f);
    }
  }
}

// The row of outputs and the first column of a strip. Two neighbouring strips are one warp's: so far from each other that
// their inputs lie in different banks.
template <int S>
struct StripPlace {
  int row, column;

  __device__ StripPlace(const InvertedResidualPlan& p, int strip) {
    const int in_row = p.tile_w / kStripOutputs;
    if constexpr (S == 2) {
      const int pair = strip / 2, even = pair / in_row;  // of the rows 0, 1, 4, 5, ...
      row = even / 2 * 4 + even % 2 + strip % 2 * 2;
      column = pair % in_row * kStripOutputs;
    } else {
      row = strip / in_row;
      column = strip % in_row * kStripOutputs;
    }
  }
};

// d = activation(depthwise(e) + bias): a thread makes a strip of 4 outputs x 4 bytes of channels. Output o of strip s is row
// o * kStrips + s of d. If kSums, sums has the sum of those of a strip's outputs that there are: [strip][channel].
template <class T, int K, int S, bool kSums>
__device__ inline void depthwise(T* d, float* sums, const T* e, const T* weight, const float* bias,
                                 const InvertedResidualShape& s, const InvertedResidualPlan& p, const BlockPlace& block,
                                 int activation) {
  constexpr int kWord = ChannelWord<T>::kCount;
  const int lane = threadIdx.x % kStrips, strip = threadIdx.x / kStrips;
  const StripPlace<S> place(p, strip);
  if (place.row >= p.tile_h) {
    if constexpr (kSums) shared_store(sums, strip * kChunk<T> + lane * kWord, Floats<kWord>{});
    return;
  }
  float sum[kStripOutputs * kWord];
#pragma unroll
  for (int i = 0; i < kStripOutputs * kWord; ++i) sum[i] = shared_load<float>(bias, lane * kWord + i % kWord);
  const int first = (place.row * s.stride_h * p.in_w + place.column * s.stride_w) * kExpandedPitch<T> + lane * kWord;

  if constexpr (K > 0) {
    constexpr int kTaps = K * K;  // of this thread's channels side by side, in whole words for 2 channels or 1
    const T* const mine = weight + lane * kWord * kTaps;
#pragma unroll
    for (int r = 0; r < K; ++r) {
      float w[K][kWord];
#pragma unroll
      for (int i = 0; i < kWord; ++i) {
        const int begin = i * kTaps + r * K;
#pragma unroll
        for (int word = begin / kWord; word <= (begin + K - 1) / kWord; ++word) {
          const ChannelWord<T> taps = shared_load<ChannelWord<T>>(mine, word * kWord);
#pragma unroll
          for (int k = 0; k < K; ++k)
            if ((begin + k) / kWord == word) w[k][i] = widen(taps.v[(begin + k) % kWord]);
        }
      }
#pragma unroll
      for (int j = 0; j < (kStripOutputs - 1) * S + K; ++j) {
        const ChannelWord<T> word = shared_load<ChannelWord<T>>(e, first + (r * p.in_w + j) * kExpandedPitch<T>);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (j < k || (j - k) % S != 0 || (j - k) / S >= kStripOutputs) continue;
#pragma unroll
          for (int i = 0; i < kWord; ++i) sum[(j - k) / S * kWord + i] += widen(word.v[i]) * w[k][i];
        }
      }
    }
  } else {
    for (int tap = 0; tap < s.taps(); ++tap) {
      const int row = tap / s.kernel_w * s.dilation_h, column = tap % s.kernel_w * s.dilation_w;
#pragma unroll
      for (int o = 0; o < kStripOutputs; ++o) {
        const ChannelWord<T> word =
            shared_load<ChannelWord<T>>(e, first + (row * p.in_w + column + o * s.stride_w) * kExpandedPitch<T>);
#pragma unroll
        for (int i = 0; i < kWord; ++i)
          sum[o * kWord + i] += widen(word.v[i]) * widen(shared_load<T>(weight, (lane * kWord + i) * s.taps() + tap));
      }
    }
  }

  activate(sum, activation);
  if constexpr (kSums) {
    const int outputs = block.row + place.row < s.out_height ? s.out_width - block.column - place.column : 0;
    Floats<kWord> of_strip{};
#pragma unroll
    for (int i = 0; i < kWord; ++i)
#pragma unroll
      for (int o = 0; o < kStripOutputs; ++o) of_strip.v[i] += o < outputs ? sum[o * kWord + i] : 0.0f;
    shared_store(sums, strip * kChunk<T> + lane * kWord, of_strip);
  }
#pragma unroll
  for (int o = 0; o < kStripOutputs; ++o) {
    ChannelWord<T> word;
#pragma unroll
    for (int i = 0; i < kWord; ++i) word.v[i] = narrow<T>(sum[o * kWord + i]);
    const int piece = lane * kWord / kVec<T>;
    shared_store(d, MatrixTile<T, kChunkBytes>::at(o * kStrips + strip, piece) + lane * kWord % kVec<T>, word);
  }
}

// Of the channel that is this thread's, the strips' sums.
template <class T>
__device__ inline float sum_of_strips(const float* sums) {
  float sum = 0;
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) sum += shared_load<float>(sums, strip * kChunk<T> + threadIdx.x);
  return sum;
}

// Where row i of d belongs in an image of so many channels, from `channel` on; or -1.
template <int S>
struct OutputRow {
  const InvertedResidualShape& s;
  const InvertedResidualPlan& p;
  const BlockPlace& place;
  int channels, channel;

  __device__ int64_t operator()(int i) const {
    const StripPlace<S> strip(p, i % kStrips);
    const int row = place.row + strip.row, column = place.column + strip.column + i / kStrips;
    if (strip.row >= p.tile_h || row >= s.out_height || column >= s.out_width) return -1;
    return ((place.image * s.out_height + row) * s.out_width + column) * channels + channel;
  }
};

// Rows of `length` elements from shared memory to where to_row(row) says, negative: nowhere.
template <class T, class ToRow, class FromPiece>
__device__ inline void store_rows(T* to, const T* from, Pieces at, int length, bool vectors, ToRow to_row,
                                  FromPiece from_piece) {
  for (; at.row < kTilePixels; at.next()) {
    const int64_t row_at = to_row(at.row);
    const int first = at.piece * kVec<T>, from_at = from_piece(at.row, at.piece);
    if (row_at < 0) continue;
    if (vectors) {
      global_store(to, row_at + first, shared_load<Vec<T>>(from, from_at));
      continue;
    }
    for (int i = 0; i < kVec<T> && first + i < length; ++i)
      global_store(to, row_at + first + i, shared_load<T>(from, from_at + i));
  }
}

// y = sums + bias + residual, through shared memory.
template <class T, int S, class Product>
__device__ inline void write(T* out, const Product& product, int first_row, int first_column,
                             const InvertedResidualArguments<T>& a, const InvertedResidualPlan& p,
                             const BlockPlace& place) {
  const InvertedResidualShape& s = a.shape;
  const int pitch = p.out_columns + kOutPadding, length = min(p.out_columns, s.out_channels - place.channel);
  const Pieces pieces(ceil_div(length, kVec<T>));
  const OutputRow<S> output_row{s, p, place, s.out_channels, place.channel};
  const RowPiece<T> at{pitch};
  if (a.residual) {
    copy_rows<&InvertedResidualArguments<T>::residual>(out, a, pieces, kTilePixels, 0, length, a.vectors_k, output_row,
                                                       at);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < Product::kColumns / 8; ++j) {
    if (j >= p.n_tiles) break;
    float bias[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = place.channel + first_column + product.column(j, c);
      bias[c] = a.project_bias.data && channel < s.out_channels ? load_parameter<T>(a.project_bias, channel) : 0;
    }
#pragma unroll
    for (int i = 0; i < Product::kRows / 16; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int to = (first_row + product.row(i, 2 * half)) * pitch + first_column + product.column(j, 0);
        float v[2] = {product.sums[i][j][2 * half] + bias[0], product.sums[i][j][2 * half + 1] + bias[1]};
        if (a.residual) {
          const Pair<T> residual = shared_load<Pair<T>>(out, to);
          v[0] += widen(residual.v[0]), v[1] += widen(residual.v[1]);
        }
        store_pair(out, to, v[0], v[1]);
      }
  }
  __syncthreads();
  store_rows(a.y, out, pieces, length, a.vectors_k, output_row, at);
}

}  // namespace cnnfast::cuda
