// The layout of packed weights, shared by the CPU kernels, the bindings (sizes, for the fakes) and the tests.
// No torch and no std containers: per-ISA objects include it.
//
// A packing is one uint8 tensor: PackedHeader, then sections of scalars (float, or double for float64 weights):
//   depthwise section   bias[Cp], weight[taps][Cp]                Cp = channels rounded up to kPanel, zero-filled
//   pointwise section   bias[Kp], weight[Kp / kPanel][C][kPanel]  Kp = out channels rounded up, zero-filled
// For bfloat16 weights scalars are float, but those of pointwise sections (squeeze-excite's excepted) stay bfloat16, in
// pairs of the depth: bias[Kp], scale[Kp], weight[Kp / kPanel][Cp / 2][kPanel][2], Cp = C rounded up to kPairDepth,
// zero-filled. Sums are multiplied by the scale before the bias is added: weights that were exact in bfloat16 stay so.
// Scales of other sections are in the weights.
// Ops: depthwise = depthwise; pointwise = pointwise; separable, in either order = depthwise, pointwise;
// inverted_residual = expand (pointwise; unless no_expansion), depthwise, with squeeze-excite its
// reduction and expansion (pointwise), project (pointwise); squeeze_excite = reduction, expansion; conv2d = pointwise
// with taps * C for C, the channels of a tap side by side, those of a row of the window filled up with zeros to a whole
// kPairDepth where they are pairs.
// conv2d for Winograd's F(2x2, 3x3) = bias[Kp], then 16 times weight[Kp / kPanel][C][kPanel], always floats.
// The layout is the same for every ISA, so that a packing (and an exported program that holds one) is portable.
#pragma once
#include <cstdint>

namespace cnnfast {

constexpr int64_t kPanel = 16;        // output channels side by side: one AVX-512 vector of floats, two of AVX2
constexpr int64_t kPairDepth = 32;    // input channels: one tile of AMX
constexpr int64_t kWinogradTile = 4;  // F(2x2, 3x3)'s: 4 x 4 inputs, as many products
constexpr uint32_t kPackedMagic = 0x46'4e'4e'43;  // "CNNF", little endian
constexpr uint16_t kPackedVersion = 2;

enum class PackedOp : uint16_t {
  depthwise_conv2d = 1,
  pointwise_conv2d,
  separable_conv2d,
  inverted_residual,
  conv2d,
  squeeze_excite,
  separable_conv2d_pointwise_first,
};
constexpr PackedOp kLastPackedOp = PackedOp::separable_conv2d_pointwise_first;

struct PackedHeader {
  uint32_t magic;
  uint16_t version;
  PackedOp op;
  int32_t itemsize;      // of a weight: 4 float, 8 double, 2 bfloat16
  int32_t in_channels;   // of the op's input
  int32_t mid_channels;  // of the tensor between two stages: inverted_residual's depthwise output
  int32_t out_channels;  // of the op's output
  int32_t kernel_h, kernel_w;
  uint8_t reserved[20];
  int32_t winograd;           // conv2d: 1 where its weights are those of Winograd's 16 products
  int32_t squeezed_channels;  // between squeeze-excite's reduction and expansion; 0 without one
  int32_t no_expansion;       // inverted_residual: 1 where x goes straight into the depthwise stage
};
static_assert(sizeof(PackedHeader) == 64);

static constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sections' sizes in bytes; itemsize as in the header.
static constexpr int64_t scalar_size(int64_t itemsize) { return itemsize == 2 ? 4 : itemsize; }
static constexpr int64_t depthwise_section(int64_t channels, int64_t taps, int64_t itemsize) {
  return round_up(channels, kPanel) * (1 + taps) * scalar_size(itemsize);
}
static constexpr int64_t pointwise_section(int64_t in, int64_t out, int64_t itemsize) {
  const int64_t rows = itemsize == 2 ? 2 : 1, weights = itemsize == 2 ? 2 * round_up(in, kPairDepth) : in * itemsize;
  return round_up(out, kPanel) * (rows * scalar_size(itemsize) + weights);
}

// Of conv2d's depth, what the taps of one row of the window take.
static constexpr int64_t window_row(int64_t scalars, int64_t itemsize) {
  return itemsize == 2 ? round_up(scalars, kPairDepth) : scalars;
}

// A packing's size in bytes. squeezed: channels between squeeze-excite's two products, 0 without one.
static constexpr int64_t packed_bytes(PackedOp op, int64_t in, int64_t mid, int64_t out, int64_t kernel_h,
                                      int64_t kernel_w, int64_t itemsize, int64_t squeezed = 0,
                                      bool no_expansion = false) {
  const int64_t scalar = scalar_size(itemsize), taps = kernel_h * kernel_w;
  const int64_t excite =
      squeezed ? pointwise_section(mid, squeezed, scalar) + pointwise_section(squeezed, mid, scalar) : 0;
  int64_t bytes = 0;
  switch (op) {
    case PackedOp::depthwise_conv2d: bytes = depthwise_section(out, taps, itemsize); break;
    case PackedOp::pointwise_conv2d: bytes = pointwise_section(in, out, itemsize); break;
    case PackedOp::separable_conv2d:
      bytes = depthwise_section(mid, taps, itemsize) + pointwise_section(mid, out, itemsize);
      break;
    case PackedOp::inverted_residual:
      bytes = (no_expansion ? 0 : pointwise_section(in, mid, itemsize)) + depthwise_section(mid, taps, itemsize) +
              excite + pointwise_section(mid, out, itemsize);
      break;
    case PackedOp::conv2d:
      bytes = pointwise_section(kernel_h * window_row(in * kernel_w, itemsize), out, itemsize);
      break;
    case PackedOp::squeeze_excite: bytes = excite; break;
    case PackedOp::separable_conv2d_pointwise_first:
      bytes = depthwise_section(out, taps, itemsize) + pointwise_section(in, mid, itemsize);
      break;
  }
  return static_cast<int64_t>(sizeof(PackedHeader)) + bytes;
}

}  // namespace cnnfast
