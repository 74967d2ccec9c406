// separable_conv2d in the other order on the CPU: pointwise -> depthwise, the intermediate only ever a tile in L2.
// Tiling: a task takes a band of output rows. A chunk of channels at a time: the product for the input rows that the band
// reads (a halo of kernel_h - stride_h rows is computed by both neighbours), then the depthwise stage of that chunk; idle
// threads help with chunks. With a residual the depthwise result passes through scratch, where the residual is added.
// Bytes: x read once a band, y written once, the weights read once a band.
#include "channels.h"
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kChunk = 4 * kPanel;  // channels of the intermediate: one group of panels of the micro-kernel

struct PointwiseFirst {
  Storage storage;
  const KernelTable& table;
  Conv conv;
  Tensor x;        // channels_last
  Maybe residual;  // channels_last
  Prologue prologue;
  GemmTile pointwise;
  DepthwiseTile depthwise;
  Activation activation;  // at the end
  Tensor y;

  int64_t scalar() const { return compute_size(storage); }
  int64_t chunks() const { return ceil_div(pointwise.cols, kChunk); }
  bool in_place() const {
    return !prologue.any() && pointwise.a_storage == storage && (storage != Storage::bf16 || conv.c % kPairDepth == 0);
  }

  // Input rows [first, last) of image n as the product's left side, in this thread's scratch if not as they lie.
  GemmTile input(const Worker& worker, int64_t n, int64_t first, int64_t last) const {
    GemmTile g = pointwise;
    g.a = rows(worker, n, first, last);
    g.rows = (last - first) * conv.w;
    return in_planes(worker, table, g);
  }
  const char* rows(const Worker& worker, int64_t n, int64_t first, int64_t last) const {
    const int64_t row_bytes = conv.w * conv.c * storage_size(storage);
    const char* const rows = bytes_of(x) + (n * conv.h + first) * row_bytes;
    if (in_place()) return rows;
    const int64_t copied = conv.w * pointwise.a_row * storage_size(pointwise.a_storage);
    char* const to = scratch(Slot::gathered, std::max<int64_t>(1, last - first) * copied);
    worker.each_part(last - first, [&](int64_t r) {
      prologue.apply(table, storage, n, rows + r * row_bytes, conv.c, conv.w, conv.c, to + r * copied,
                     pointwise.a_storage, pointwise.a_row);
      clear_tail(pointwise, to + r * copied, conv.w);
    });
    return to;
  }

  // Chunk k of the output rows [begin, end) of image n; `from`: what input() gave for the rows that they read.
  void chunk(const GemmTile& from, int64_t n, int64_t begin, int64_t end, int64_t k) const {
    const auto [first, last] = input_rows(conv, begin, end);
    const int64_t c = k * kChunk, channels = std::min(kChunk, pointwise.cols - c), multiplier = depthwise.multiplier;
    char* const between = scratch(Slot::expanded, std::max<int64_t>(1, last - first) * conv.w * kChunk * scalar());
    GemmTile g = columns_of(from, c, channels);
    g.y = between;
    multiply(table, g);

    const int64_t out = depthwise.channels, stored = storage_size(storage), pixels = (end - begin) * conv.out_w;
    const int64_t to = ((n * conv.out_h + begin) * conv.out_w * out + c * multiplier) * stored;
    DepthwiseTile t = depthwise;
    t.x = between;
    t.x_first_row = first;
    t.row_begin = begin;
    t.row_end = end;
    t.channels = channels * multiplier;
    t.weight = static_cast<const char*>(depthwise.weight) + c * multiplier * scalar();
    t.bias = static_cast<const char*>(depthwise.bias) + c * multiplier * scalar();
    if (!residual) {
      t.y = mutable_bytes_of(y) + to;
      t.y_pixel = out;
      t.y_row = conv.out_w * out;
      t.y_storage = storage;
      t.activation = activation;
      table.depthwise[static_cast<int>(compute_storage(storage))](t);
      return;
    }
    t.y = scratch(Slot::depthwise, pixels * t.channels * scalar());
    t.y_pixel = t.channels;
    t.y_row = conv.out_w * t.channels;
    t.y_storage = compute_storage(storage);
    table.depthwise[static_cast<int>(compute_storage(storage))](t);
    ScaleTile s{};
    s.x = t.y;
    s.x_pixel = s.channels = t.channels;
    s.residual = bytes_of(*residual) + to;
    s.y = mutable_bytes_of(y) + to;
    s.y_pixel = out;
    s.y_storage = storage;
    s.pixels = pixels;
    s.activation = activation;
    table.scale_channels[static_cast<int>(compute_storage(storage))](s);
  }
};

}  // namespace

Tensor separable_conv2d_pointwise_first(const Tensor& x, const Tensor& packed, const Maybe& residual,
                                        int64_t out_channels, const Ints& kernel_size, const Ints& stride,
                                        const Ints& padding, const Ints& dilation, int64_t pre_activation,
                                        int64_t mid_activation, int64_t activation_code) {
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size.at(0), kernel_size.at(1), stride, padding, dilation);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  PackedReader reader(packed, PackedOp::separable_conv2d_pointwise_first, x, -1, out_channels, kernel_size[0],
                      kernel_size[1]);
  const PackedHeader& header = reader.header();
  STD_TORCH_CHECK(header.in_channels == conv.c, "packed has ", header.in_channels, " input channels, x has ", conv.c);
  const int64_t mid = header.mid_channels;
  const DepthwiseWeights dw = reader.depthwise(out_channels);
  const PointwiseWeights pw = reader.pointwise(conv.c, mid);

  const KernelTable& table = kernels(storage);
  const Storage operand = operand_storage(table, storage, pw);
  PointwiseFirst op{storage,
                    table,
                    conv,
                    channels_last(x),
                    residual ? Maybe(channels_last(*residual)) : std::nullopt,
                    {std::nullopt, std::nullopt, pre_activation},
                    packed_gemm(pw, operand, compute_storage(storage), mid_activation),
                    depthwise_tile(conv, dw, storage, 0, 0),
                    activation(activation_code),
                    empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type())};
  op.pointwise.a_row = op.in_place() ? conv.c : padded_row(conv.c, storage_size(operand));
  op.pointwise.in_planes = pays_in_planes(table, op.pointwise, conv.h * conv.w);
  op.pointwise.y_row = kChunk;
  op.depthwise.multiplier = out_channels / mid;
  op.depthwise.x_pixel = kChunk;
  op.depthwise.x_row = conv.w * kChunk;

  const int64_t row_bytes = conv.window.stride_h * conv.w * (kChunk * op.scalar() + conv.c * storage_size(operand));
  const Bands bands = bands_of(conv, row_bytes, halo_of(conv), conv.c * mid * storage_size(operand));
  for_each(op.y.numel() ? bands.count : 0, [&](const Worker& worker, int64_t i) {
    const auto [n, begin, end] = bands[i];
    const auto [first, last] = input_rows(conv, begin, end);
    const GemmTile from = op.input(worker, n, first, last);
    worker.each_part(op.chunks(),
                     [&, n = n, begin = begin, end = end](int64_t k) { op.chunk(from, n, begin, end, k); });
  });
  return in_format_of(x, op.y);
}

}  // namespace cnnfast::cpu
