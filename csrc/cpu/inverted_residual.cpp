// inverted_residual on the CPU: expand -> depthwise (-> squeeze-excite) -> project, the expanded tensor a tile in L2.
// Tiling: a band of output rows goes through the stages in chunks of expanded channels: expand the chunk for the band's
// input rows (a halo of kernel_h - stride_h rows is computed by both neighbours), depthwise it into the band's tile;
// when all chunks are there, project the tile. Idle threads (one small image is one band) help with chunks, then with the
// projection's output channels or pixels. With squeeze-excite the gates want the whole image first: an image is a task,
// its depthwise result the tile; bands and chunks are parts of its first pass, which also sums the rows, and the second
// pass scales the tile, block by block, before it projects it.
// Bytes: x read once a band, y written once, the weights read once a band; with squeeze-excite the depthwise result is
// written and read besides, where one image of it leaves L2.
#include "channels.h"
#include "ops.h"
#include "squeeze_excite.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kChunk = 4 * kPanel;  // expanded channels at a time: one group of panels of the micro-kernel
constexpr int64_t kGatedPixels = 56;    // scaled, then projected: eight blocks of the micro-kernel

struct InvertedResidual {
  Storage storage, between;  // of x; of the expanded tensors
  const KernelTable& table;
  Conv conv;
  bool expands;
  Tensor x;        // channels_last
  Maybe residual;  // channels_last
  GemmTile expansion, projection;
  DepthwiseTile depthwise;
  Excite excite;
  int64_t expanded, row;  // channels; the tile's distance between pixels, in scalars

  int64_t itemsize() const { return storage_size(between); }
  int64_t scalar() const { return compute_size(storage); }  // of biases, depthwise weights, sums
  int64_t tile_row_bytes() const { return conv.out_w * row * itemsize(); }
  int64_t chunks() const { return ceil_div(expanded, kChunk); }

  // Input rows [first, last) of image n, as they lie or as the expansion wants them, widened or padded: in this thread's
  // scratch.
  const char* input(const Worker& worker, int64_t n, int64_t first, int64_t last) const {
    const int64_t row_bytes = conv.w * conv.c * static_cast<int64_t>(x.element_size());
    const char* rows = bytes_of(x) + (n * conv.h + first) * row_bytes;
    const bool widens = storage != expansion.a_storage;
    if (!expands || (!widens && expansion.a_row == conv.c)) return rows;
    const int64_t padded = conv.w * expansion.a_row * itemsize();
    char* to = scratch(Slot::gathered, (last - first) * padded);
    worker.each_part(last - first, [&](int64_t r) {
      if (widens)
        table.widen[static_cast<int>(storage)](rows + r * row_bytes, to + r * padded, conv.w * conv.c);
      else
        copy_padded(expansion, rows + r * row_bytes, to + r * padded, conv.w);
    });
    return to;
  }

  // Expanded channels of chunk k, of output rows [begin, end), to `tile`, whose first row is `begin`. `from`: what input()
  // gave, from input row `from_row` on.
  void first_stages(const char* from, int64_t from_row, int64_t begin, int64_t end, int64_t k, char* tile) const {
    const auto [first, last] = input_rows(conv, begin, end);
    const int64_t c = k * kChunk, channels = std::min(kChunk, expanded - c);
    DepthwiseTile t = depthwise;
    t.weight = static_cast<const char*>(depthwise.weight) + c * scalar();
    t.bias = static_cast<const char*>(depthwise.bias) + c * scalar();
    t.y = tile + c * itemsize();
    t.row_begin = begin;
    t.row_end = end;
    t.channels = channels;
    if (!expands) {
      t.x = from + c * static_cast<int64_t>(x.element_size());
      t.x_first_row = from_row;
      table.depthwise[static_cast<int>(storage)](t);
      return;
    }
    char* e = scratch(Slot::expanded, std::max<int64_t>(1, last - first) * conv.w * kChunk * itemsize());
    GemmTile g = columns_of(expansion, c, channels);
    g.a = from + (first - from_row) * conv.w * expansion.a_row * itemsize();
    g.y = e;
    g.rows = (last - first) * conv.w;
    multiply(table, g);
    t.x = e;
    t.x_first_row = first;
    table.depthwise[static_cast<int>(between)](t);
  }

  // Sums over the pixels of each of the tile's rows [begin, end), of chunk k.
  void sum_rows(const char* tile, int64_t begin, int64_t end, int64_t k, char* sums) const {
    ChannelSumsTile t{};
    t.x_pixel = row;
    t.pixels = conv.out_w;
    t.channels = std::min(kChunk, expanded - k * kChunk);
    t.run = ChannelSumsTile::kRun;
    t.factor = 1;
    for (int64_t r = begin; r < end; ++r) {
      t.x = tile + r * tile_row_bytes() + k * kChunk * itemsize();
      t.sums = sums + (r * expanded + k * kChunk) * scalar();
      table.channel_sums[static_cast<int>(between)](t);
    }
  }

  // `pixels` of the tile, in place.
  void scale(char* tile, const char* gates, int64_t pixels) const {
    ScaleTile t{};
    t.x = t.y = tile;
    t.x_pixel = t.y_pixel = row;
    t.scale = gates;
    t.y_storage = between;
    t.pixels = pixels;
    t.channels = expanded;
    t.activation = activation(0);
    table.scale_channels[static_cast<int>(between)](t);
  }

  // The projection of `pixels` of image n from pixel `first` on, which lie in `tile`.
  GemmTile projected(int64_t n, int64_t first, int64_t pixels, const char* tile, Tensor& y) const {
    GemmTile g = projection;
    const int64_t to = (n * conv.out_h * conv.out_w + first) * projection.y_row * storage_size(storage);
    g.a = tile;
    g.rows = pixels;
    g.y = mutable_bytes_of(y) + to;
    g.residual = residual ? bytes_of(*residual) + to : nullptr;
    return g;
  }
};

void run(const InvertedResidual& op, const Bands& bands, Tensor& y) {
  for_each(bands.count, [&](const Worker& worker, int64_t i) {
    const auto [n, begin, end] = bands[i];
    const int64_t w = op.conv.out_w;
    char* tile = scratch(Slot::depthwise, bands.rows * op.tile_row_bytes());
    const auto [first, last] = input_rows(op.conv, begin, end);
    const char* from = op.input(worker, n, first, last);
    worker.each_part(op.chunks(), [&, first = first](int64_t k) { op.first_stages(from, first, begin, end, k, tile); });
    clear_tail(op.projection, tile, (end - begin) * w);
    gemm_in_parts(worker, op.table, op.projected(n, begin * w, (end - begin) * w, tile, y));
  });
}

void run_with_excite(const InvertedResidual& op, const Bands& bands, Tensor& y) {
  const Conv& conv = op.conv;
  const int64_t pixels = conv.out_h * conv.out_w;
  // Few pixels: the product is shared out by output channels, and scaling is a pass of its own.
  const bool by_pixels = pixels >= op.projection.cols;
  const int64_t block = by_pixels ? kGatedPixels : std::max<int64_t>(1, ceil_div(pixels, 8));
  for_each(conv.n, [&](const Worker& worker, int64_t n) {
    char* tile = scratch(Slot::depthwise, conv.out_h * op.tile_row_bytes());
    char* row_sums = scratch(Slot::sums, (conv.out_h + 1) * op.expanded * op.scalar());
    char* gates = row_sums + conv.out_h * op.expanded * op.scalar();
    const char* from = op.input(worker, n, 0, conv.h);
    worker.each_part(bands.per_image * op.chunks(), [&](int64_t part) {
      const int64_t k = part % op.chunks();
      const auto [first_image, begin, end] = bands[part / op.chunks()];
      op.first_stages(from, 0, begin, end, k, tile + begin * op.tile_row_bytes());
      op.sum_rows(tile, begin, end, k, row_sums);
    });
    op.excite.gates(worker, op.table, op.storage, row_sums, conv.out_h, pixels, gates);
    worker.each_part(ceil_div(pixels, block), [&](int64_t part) {
      const int64_t first = part * block, count = std::min(block, pixels - first);
      char* rows = tile + first * op.row * op.itemsize();
      op.scale(rows, gates, count);
      clear_tail(op.projection, rows, count);
      if (by_pixels) multiply(op.table, op.projected(n, first, count, rows, y));
    });
    if (!by_pixels) gemm_in_parts(worker, op.table, op.projected(n, 0, pixels, tile, y));
  });
}

}  // namespace

Tensor inverted_residual_packed(Tensor x, Tensor packed, Maybe residual, int64_t expanded_channels,
                                int64_t out_channels, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                                int64_t activation_code, int64_t se_activation, int64_t gate_activation,
                                int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size[0], kernel_size[1], stride, padding, dilation);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  PackedReader reader(packed, PackedOp::inverted_residual, x, expanded_channels, out_channels, kernel_size[0],
                      kernel_size[1]);
  const PackedHeader& header = reader.header();
  STD_TORCH_CHECK(header.in_channels == conv.c, "packed has ", header.in_channels, " input channels, x has ", conv.c);
  const bool expands = !header.no_expansion;
  const PointwiseWeights expand = expands ? reader.pointwise(conv.c, expanded_channels) : PointwiseWeights{};
  const DepthwiseWeights dw = reader.depthwise(expanded_channels);
  Excite excite{{}, {}, se_activation, gate_activation};
  if (header.squeezed_channels) {
    excite.reduce = reader.excite(expanded_channels, header.squeezed_channels);
    excite.expand = reader.excite(header.squeezed_channels, expanded_channels);
  }
  const PointwiseWeights project = reader.pointwise(expanded_channels, out_channels);

  const KernelTable& table = kernels(storage);
  const Storage between = operand_storage(table, storage, project);
  const Tensor xs = channels_last(x);
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);

  const int64_t itemsize = storage_size(between), row = padded_row(expanded_channels, itemsize);
  InvertedResidual op{storage,
                      between,
                      table,
                      conv,
                      expands,
                      xs,
                      rs,
                      {},
                      packed_gemm(project, between, storage, 0),
                      depthwise_tile(conv, dw, between, 0, activation_code),
                      excite,
                      expanded_channels,
                      row};
  if (expands) op.expansion = packed_gemm(expand, between, between, activation_code);
  op.expansion.a_row = between == Storage::bf16 ? round_up(conv.c, kPairDepth) : conv.c;
  op.expansion.y_row = kChunk;
  op.depthwise.x_pixel = expands ? kChunk : conv.c;
  op.depthwise.x_row = conv.w * op.depthwise.x_pixel;
  op.depthwise.y_pixel = op.projection.a_row = row;
  op.depthwise.y_row = conv.out_w * row;
  op.projection.y_row = op.projection.residual_row = out_channels;

  const Bands bands =
      bands_of(conv, op.tile_row_bytes(), expands ? halo_of(conv) : 0, expanded_channels * out_channels * itemsize);
  if (header.squeezed_channels)
    run_with_excite(op, bands, y);
  else
    run(op, bands, y);
  return in_format_of(x, y);
}

Tensor inverted_residual(Tensor x, Maybe expand_weight, Maybe expand_bias, Tensor dw_weight, Maybe dw_bias,
                         Maybe se_reduce_weight, Maybe se_reduce_bias, Maybe se_expand_weight, Maybe se_expand_bias,
                         Tensor project_weight, Maybe project_bias, Maybe residual, Ints stride, Ints padding,
                         Ints dilation, int64_t activation_code, int64_t se_activation, int64_t gate_activation,
                         int64_t backend) {
  for (const Tensor& weight : {expand_weight.value_or(dw_weight), dw_weight, se_reduce_weight.value_or(dw_weight),
                               se_expand_weight.value_or(dw_weight), project_weight})
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "every weight must have x's dtype");
  const Tensor packed =
      pack_inverted_residual(expand_weight, expand_bias, dw_weight, dw_bias, se_reduce_weight, se_reduce_bias,
                             se_expand_weight, se_expand_bias, project_weight, project_bias);
  return inverted_residual_packed(x, packed, residual, dw_weight.size(0), project_weight.size(0),
                                  {dw_weight.size(2), dw_weight.size(3)}, stride, padding, dilation, activation_code,
                                  se_activation, gate_activation, backend);
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&cnnfast::cpu::inverted_residual));
  m.impl("inverted_residual_packed", TORCH_BOX(&cnnfast::cpu::inverted_residual_packed));
  m.impl("pack_inverted_residual", TORCH_BOX(&cnnfast::cpu::pack_inverted_residual));
}
