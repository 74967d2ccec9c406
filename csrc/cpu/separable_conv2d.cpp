// separable_conv2d on the CPU: depthwise -> pointwise (-> max pooling), the intermediate only ever a tile in L2.
// Tiling: a task takes a band of output rows through both stages; idle threads help with rows of the first, and output
// channels or pixels of the second. With pooling: a range of pooled rows a task, a few at a time; the rows that the next
// few need again stay in the tile.
// Bytes: x read once (and a halo of kernel_h - stride_h rows a band), y written once, the weights read once a band.
#include <cstring>

#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

struct Separable {
  Storage storage;
  const KernelTable& table;
  Conv conv;
  Maybe residual;  // channels_last
  DepthwiseStage depthwise;
  GemmTile pointwise;
  int64_t row;  // of the intermediate, in scalars

  Separable(const Tensor& x, const Tensor& packed, const Maybe& residual, int64_t out_channels, const Ints& kernel_size,
            const Ints& stride, const Ints& padding, const Ints& dilation, const Prologue& prologue,
            int64_t mid_activation, int64_t activation_code)
      : Separable(
            x,
            PackedReader(packed, PackedOp::separable_conv2d, x, -1, out_channels, kernel_size.at(0), kernel_size.at(1)),
            conv_of(x, kernel_size.at(0), kernel_size.at(1), stride, padding, dilation), residual, out_channels,
            prologue, mid_activation, activation_code) {}

  // Of a scalar of the intermediate.
  int64_t itemsize() const { return storage_size(pointwise.a_storage); }
  int64_t tile_bytes(int64_t rows) const { return rows * conv.out_w * row * itemsize(); }

  // Rows [begin, end) of each of `images` from n on, into `tile` whose first row is tile_begin.
  void first_stage(const Worker& worker, int64_t n, int64_t images, int64_t tile_begin, int64_t begin, int64_t end,
                   char* tile) const {
    constexpr int64_t kRows = 4;  // a part: an even number, since the kernel goes by two
    const int64_t parts = ceil_div(end - begin, kRows);
    worker.each_part(images * parts, [&](int64_t k) {
      const int64_t first = begin + k % parts * kRows, last = std::min(first + kRows, end);
      char* const y = tile + (k / parts * (end - begin) + first - tile_begin) * depthwise.tile.y_row * itemsize();
      depthwise.rows(n + k / parts, first, last, y);
      clear_tail(pointwise, y, (last - first) * conv.out_w);
    });
  }

  // The product for the same rows, from `tile` (row `begin`) to y (row `begin` too).
  GemmTile second_stage(int64_t n, int64_t begin, int64_t end, const char* tile, char* y) const {
    GemmTile g = pointwise;
    g.a = tile;
    g.rows = (end - begin) * conv.out_w;
    g.y = y;
    const int64_t first = (n * conv.out_h + begin) * conv.out_w * pointwise.residual_row;
    g.residual = residual ? bytes_of(*residual) + first * storage_size(storage) : nullptr;
    return g;
  }

  // Rows [begin, end) of image n of y, or of several images that are taken whole, on this thread and those that help.
  void rows(const Worker& worker, int64_t n, int64_t images, int64_t begin, int64_t end, const Tensor& y) const {
    char* const tile = scratch(Slot::depthwise, tile_bytes(images * (end - begin)));
    first_stage(worker, n, images, begin, begin, end, tile);
    const int64_t first = (n * conv.out_h + begin) * conv.out_w * pointwise.y_row * storage_size(storage);
    gemm_in_parts(worker, table,
                  second_stage(n, begin, begin + images * (end - begin), tile, mutable_bytes_of(y) + first));
  }

 private:
  Separable(const Tensor& x, PackedReader reader, const Conv& conv, const Maybe& residual, int64_t out_channels,
            const Prologue& prologue, int64_t mid_activation, int64_t activation_code)
      : storage(storage_of(x, "x")),
        table(kernels(storage)),
        conv(conv),
        residual(residual ? Maybe(channels_last(*residual)) : std::nullopt),
        depthwise(conv, channels_last(x), depthwise_weights(reader, conv), storage, prologue, mid_activation) {
    check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
    const int64_t mid = reader.header().mid_channels;
    const PointwiseWeights pw = reader.pointwise(mid, out_channels);
    const Storage between = operand_storage(table, storage, pw);
    pointwise = packed_gemm(pw, between, storage, activation_code);
    pointwise.in_planes = pays_in_planes(table, pointwise, conv.out_h * conv.out_w);
    pointwise.y_row = pointwise.residual_row = out_channels;
    pointwise.b_stays = stays_in_l2(pointwise, conv.n * conv.out_h * conv.out_w);
    row = pointwise.a_row = depthwise.tile.y_pixel = padded_row(mid, storage_size(between));
    depthwise.tile.y_storage = between;
    depthwise.tile.y_row = conv.out_w * row;
  }

  static DepthwiseWeights depthwise_weights(PackedReader& reader, const Conv& conv) {
    const int64_t mid = reader.header().mid_channels;
    STD_TORCH_CHECK(conv.c > 0 && mid % conv.c == 0, "packed has ", mid, " depthwise channels, not a multiple of x's ",
                    conv.c);
    return reader.depthwise(mid);
  }
};

// How many images a task takes: small ones together where L2 doesn't keep the weights, which are read for each task.
int64_t images_together(const Separable& op) {
  if (weight_bytes(op.pointwise) <= kStayingBytes) return 1;
  const int64_t fitting = 3 * kTileBytes / std::max<int64_t>(1, op.tile_bytes(op.conv.out_h));
  if (fitting < 2) return 1;
  // Equal groups, one a thread or a multiple of that.
  const int64_t n = op.conv.n, threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  return ceil_div(n, round_up(ceil_div(n, fitting), threads));
}

void run(const Separable& op, const Tensor& y) {
  const Conv& conv = op.conv;
  // In planes: rather more rows at a time than to split the weights again.
  const Bands bands =
      bands_of(conv, op.tile_bytes(1) / (op.pointwise.in_planes ? 2 : 1), 0, weight_bytes(op.pointwise));
  const int64_t images = bands.per_image == 1 ? images_together(op) : 1;
  if (images > 1) {
    for_each(ceil_div(conv.n, images), [&](const Worker& worker, int64_t i) {
      op.rows(worker, i * images, std::min(images, conv.n - i * images), 0, conv.out_h, y);
    });
    return;
  }
  for_each(bands.count, [&](const Worker& worker, int64_t i) {
    const auto [n, begin, end] = bands[i];
    op.rows(worker, n, 1, begin, end, y);
  });
}

// y: the pooled image; `pool` has its sizes.
void run_pooled(const Separable& op, const Pool2dTile& pool, int64_t pooled_h, Tensor& y) {
  const Conv& conv = op.conv;
  const int64_t kernel = pool.window.kernel_h, stride = pool.window.stride_h, padding = pool.window.pad_top;
  const int64_t row_bytes = conv.out_w * op.pointwise.y_row * compute_size(op.storage);
  const int64_t pooled_row_bytes = pool.out_width * pool.channels * static_cast<int64_t>(y.element_size());
  // Pooled rows at a time: their convolved rows fill a tile, and are pixels enough to be worth reading the weights for.
  constexpr int64_t kPixels = 256;
  const int64_t step = std::max({int64_t{1}, kTileBytes / op.tile_bytes(1) / stride,
                                 ceil_div(kPixels, std::max<int64_t>(1, conv.out_w * stride))});
  const int64_t tasks = ceil_div(torch::stable::get_num_threads(), conv.n);
  const int64_t rows = ceil_div(pooled_h, tasks), per_image = ceil_div(pooled_h, rows);
  const int64_t held_rows = (step - 1) * stride + kernel;
  for_each(conv.n * per_image, [&](const Worker& worker, int64_t i) {
    const int64_t n = i / per_image, task_begin = i % per_image * rows,
                  task_end = std::min(task_begin + rows, pooled_h);
    char* tile = scratch(Slot::depthwise, op.tile_bytes(held_rows));
    char* convolved = scratch(Slot::expanded, held_rows * row_bytes);
    int64_t held = std::max<int64_t>(0, task_begin * stride - padding), done = held;  // rows [held, done)
    for (int64_t begin = task_begin; begin < task_end; begin += step) {
      const int64_t end = std::min(begin + step, task_end);
      const int64_t first = std::max<int64_t>(0, begin * stride - padding);
      const int64_t last = std::min(conv.out_h, (end - 1) * stride - padding + kernel);
      if (first > held) {
        if (done > first) std::memmove(convolved, convolved + (first - held) * row_bytes, (done - first) * row_bytes);
        held = first;
        done = std::max(done, first);
      }
      if (last > done) {
        op.first_stage(worker, n, 1, done, done, last, tile);
        gemm_in_parts(worker, op.table, op.second_stage(n, done, last, tile, convolved + (done - held) * row_bytes));
        done = last;
      }
      Pool2dTile t = pool;
      t.x = convolved;
      t.x_first_row = held;
      t.row_begin = begin;
      t.row_end = end;
      t.y = mutable_bytes_of(y) + (n * pooled_h + begin) * pooled_row_bytes;
      op.table.max_pool2d[static_cast<int>(compute_storage(op.storage))](t);
    }
  });
}

}  // namespace

ImageSize max_pooled_size(const ImageSize& x, const Ints& max_pool) {
  STD_TORCH_CHECK(
      max_pool.size() == 3 && max_pool[0] > 0 && max_pool[1] > 0 && max_pool[2] >= 0 && 2 * max_pool[2] <= max_pool[0],
      "max_pool must be a positive kernel and stride, and a padding of at most half the kernel");
  const auto pooled = [&](int64_t size) { return (size + 2 * max_pool[2] - max_pool[0]) / max_pool[1] + 1; };
  STD_TORCH_CHECK(std::min(x.h, x.w) + 2 * max_pool[2] >= max_pool[0],
                  "max_pool's kernel is larger than the padded result");
  return {x.n, x.c, pooled(x.h), pooled(x.w)};
}

Tensor separable_conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints kernel_size,
                               Ints stride, Ints padding, Ints dilation, bool pointwise_first, int64_t pre_activation,
                               int64_t mid_activation, int64_t activation_code, Ints max_pool, int64_t backend) {
  check_backend(backend);
  const bool pools = max_pool.size() != 1 || max_pool[0] != -1;
  if (pointwise_first) {
    STD_TORCH_CHECK(!pools, "max_pool can't be combined with pointwise_first");
    return separable_conv2d_pointwise_first(x, packed, residual, out_channels, kernel_size, stride, padding, dilation,
                                            pre_activation, mid_activation, activation_code);
  }
  Separable op(x, packed, residual, out_channels, kernel_size, stride, padding, dilation, {{}, {}, pre_activation},
               mid_activation, activation_code);
  const Conv& conv = op.conv;
  if (!pools) {
    const Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
    if (y.numel() > 0) run(op, y);
    return in_format_of(x, y);
  }
  STD_TORCH_CHECK(!residual, "residual can't be combined with max_pool");
  const auto [n, c, pooled_h, pooled_w] = max_pooled_size({conv.n, out_channels, conv.out_h, conv.out_w}, max_pool);
  Tensor y = empty_channels_last(x, conv.n, out_channels, pooled_h, pooled_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);
  op.pointwise.y_storage = compute_storage(op.storage);
  Pool2dTile pool{};
  pool.height = conv.out_h;
  pool.width = conv.out_w;
  pool.channels = out_channels;
  pool.y_storage = op.storage;
  pool.out_width = pooled_w;
  pool.y_pixel = out_channels;
  pool.window = {max_pool[0], max_pool[0], max_pool[1], max_pool[1], 1, 1, max_pool[2], max_pool[2]};
  run_pooled(op, pool, pooled_h, y);
  return in_format_of(x, y);
}

Tensor separable_conv2d(Tensor x, Tensor dw_weight, Maybe dw_bias, Tensor pw_weight, Maybe pw_bias, Maybe residual,
                        Ints stride, Ints padding, Ints dilation, bool pointwise_first, int64_t pre_activation,
                        int64_t mid_activation, int64_t activation_code, int64_t backend) {
  STD_TORCH_CHECK(dw_weight.scalar_type() == x.scalar_type() && pw_weight.scalar_type() == x.scalar_type(),
                  "dw_weight and pw_weight must have x's dtype");
  const Tensor packed = pack_separable_conv2d(dw_weight, dw_bias, pw_weight, pw_bias, pointwise_first);
  return separable_conv2d_packed(x, packed, residual, (pointwise_first ? dw_weight : pw_weight).size(0),
                                 {dw_weight.size(2), dw_weight.size(3)}, stride, padding, dilation, pointwise_first,
                                 pre_activation, mid_activation, activation_code, {-1}, backend);
}

std::tuple<Tensor, Tensor, Tensor> separable_conv2d_stats(Tensor x, Tensor dw_weight, Maybe dw_bias, Tensor pw_weight,
                                                          Maybe pw_bias, Maybe scale, Maybe shift, Ints stride,
                                                          Ints padding, Ints dilation, int64_t pre_activation,
                                                          int64_t mid_activation, int64_t backend) {
  check_backend(backend);
  check_scale_shift(scale, shift, x);
  STD_TORCH_CHECK(dw_weight.scalar_type() == x.scalar_type() && pw_weight.scalar_type() == x.scalar_type(),
                  "dw_weight and pw_weight must have x's dtype");
  const Tensor packed = pack_separable_conv2d(dw_weight, dw_bias, pw_weight, pw_bias, false);
  const Separable op(x, packed, std::nullopt, pw_weight.size(0), {dw_weight.size(2), dw_weight.size(3)}, stride,
                     padding, dilation, prologue_of(scale, shift, pre_activation), mid_activation, 0);
  const Conv& conv = op.conv;
  const Tensor y = empty_channels_last(x, conv.n, pw_weight.size(0), conv.out_h, conv.out_w, x.scalar_type());
  BandSums sums(y, true);
  const int64_t step = std::max<int64_t>(1, kTileBytes / std::max<int64_t>(1, op.tile_bytes(1)));
  for_each(sums.count(), [&](const Worker& worker, int64_t i) {
    const auto [begin, end] = sums.rows(i);
    for (int64_t row = begin; row < end; row += step)
      op.rows(worker, sums.image(i), 1, row, std::min(row + step, end), y);
    sums.add(i);
  });
  return {in_format_of(x, y), sums.sum(), sums.squares()};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&cnnfast::cpu::separable_conv2d));
  m.impl("separable_conv2d_packed", TORCH_BOX(&cnnfast::cpu::separable_conv2d_packed));
  m.impl("separable_conv2d_stats", TORCH_BOX(&cnnfast::cpu::separable_conv2d_stats));
  m.impl("pack_separable_conv2d", TORCH_BOX(&cnnfast::cpu::pack_separable_conv2d));
}
