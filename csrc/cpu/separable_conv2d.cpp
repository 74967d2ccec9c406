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
  Tensor x;        // channels_last
  Maybe residual;  // channels_last
  DepthwiseTile depthwise;
  GemmTile pointwise;
  int64_t row;  // of the intermediate, in scalars

  // Of a scalar of the intermediate.
  int64_t itemsize() const { return storage_size(pointwise.a_storage); }
  int64_t tile_bytes(int64_t rows) const { return rows * conv.out_w * row * itemsize(); }

  // Rows [begin, end) of image n, into `tile` whose first row is tile_begin.
  void first_stage(const Worker& worker, int64_t n, int64_t tile_begin, int64_t begin, int64_t end, char* tile) const {
    constexpr int64_t kRows = 4;  // a part: an even number, since the kernel goes by two
    worker.each_part(ceil_div(end - begin, kRows), [&](int64_t k) {
      DepthwiseTile t = depthwise;
      t.x = bytes_of(x) + n * conv.h * depthwise.x_row * static_cast<int64_t>(x.element_size());
      t.row_begin = begin + k * kRows;
      t.row_end = std::min(t.row_begin + kRows, end);
      t.y = tile + (t.row_begin - tile_begin) * depthwise.y_row * itemsize();
      table.depthwise[static_cast<int>(storage)](t);
      clear_tail(pointwise, static_cast<char*>(t.y), (t.row_end - t.row_begin) * conv.out_w);
    });
  }

  // The product for the same rows, from `tile` (row `begin`) to y (row `begin` too).
  GemmTile second_stage(int64_t n, int64_t begin, int64_t end, const char* tile, char* y) const {
    GemmTile g = pointwise;
    g.a = tile;
    g.rows = (end - begin) * conv.out_w;
    g.y = y;
    const int64_t first = (n * conv.out_h + begin) * conv.out_w * pointwise.residual_row;
    g.residual = residual ? bytes_of(*residual) + first * static_cast<int64_t>(x.element_size()) : nullptr;
    return g;
  }
};

void run(const Separable& op, Tensor& y) {
  const Conv& conv = op.conv;
  const Bands bands = bands_of(conv, op.tile_bytes(1), 0, op.pointwise.depth * op.pointwise.cols * op.itemsize());
  const int64_t y_row_bytes = conv.out_w * op.pointwise.y_row * static_cast<int64_t>(y.element_size());
  for_each(bands.count, [&](const Worker& worker, int64_t i) {
    const int64_t n = i / bands.per_image, begin = i % bands.per_image * bands.rows;
    const int64_t end = std::min(begin + bands.rows, conv.out_h);
    char* tile = scratch(Slot::depthwise, op.tile_bytes(bands.rows));
    op.first_stage(worker, n, begin, begin, end, tile);
    char* rows = mutable_bytes_of(y) + (n * conv.out_h + begin) * y_row_bytes;
    gemm_in_parts(worker, op.table, op.second_stage(n, begin, end, tile, rows));
  });
}

// y: the pooled image; `pool` has its sizes.
void run_pooled(const Separable& op, const MaxPoolTile& pool, int64_t pooled_h, Tensor& y) {
  const Conv& conv = op.conv;
  const int64_t row_bytes = conv.out_w * op.pointwise.y_row * compute_size(op.storage);
  const int64_t pooled_row_bytes = pool.out_width * pool.channels * static_cast<int64_t>(y.element_size());
  // Pooled rows at a time: their convolved rows fill a tile, and are pixels enough to be worth reading the weights for.
  constexpr int64_t kPixels = 256;
  const int64_t step = std::max({int64_t{1}, kTileBytes / op.tile_bytes(1) / pool.stride,
                                 ceil_div(kPixels, std::max<int64_t>(1, conv.out_w * pool.stride))});
  const int64_t tasks = ceil_div(torch::stable::get_num_threads(), conv.n);
  const int64_t rows = ceil_div(pooled_h, tasks), per_image = ceil_div(pooled_h, rows);
  const int64_t held_rows = (step - 1) * pool.stride + pool.kernel;
  for_each(conv.n * per_image, [&](const Worker& worker, int64_t i) {
    const int64_t n = i / per_image, task_begin = i % per_image * rows,
                  task_end = std::min(task_begin + rows, pooled_h);
    char* tile = scratch(Slot::depthwise, op.tile_bytes(held_rows));
    char* convolved = scratch(Slot::expanded, held_rows * row_bytes);
    int64_t held = std::max<int64_t>(0, task_begin * pool.stride - pool.padding), done = held;  // rows [held, done)
    for (int64_t begin = task_begin; begin < task_end; begin += step) {
      const int64_t end = std::min(begin + step, task_end);
      const int64_t first = std::max<int64_t>(0, begin * pool.stride - pool.padding);
      const int64_t last = std::min(conv.out_h, (end - 1) * pool.stride - pool.padding + pool.kernel);
      if (first > held) {
        if (done > first) std::memmove(convolved, convolved + (first - held) * row_bytes, (done - first) * row_bytes);
        held = first;
        done = std::max(done, first);
      }
      if (last > done) {
        op.first_stage(worker, n, done, done, last, tile);
        gemm_in_parts(worker, op.table, op.second_stage(n, done, last, tile, convolved + (done - held) * row_bytes));
        done = last;
      }
      MaxPoolTile t = pool;
      t.x = convolved;
      t.x_first_row = held;
      t.row_begin = begin;
      t.row_end = end;
      t.y = mutable_bytes_of(y) + (n * pooled_h + begin) * pooled_row_bytes;
      op.table.max_pool[compute_index(op.storage)](t);
    }
  });
}

}  // namespace

Tensor separable_conv2d_packed(Tensor x, Tensor packed, Maybe residual, int64_t out_channels, Ints kernel_size,
                               Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t mid_activation,
                               int64_t activation_code, Ints max_pool, int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  const Storage storage = storage_of(x, "x");
  const Conv conv = conv_of(x, kernel_size[0], kernel_size[1], stride, padding, dilation);
  check_residual(residual, x, conv.n, out_channels, conv.out_h, conv.out_w);
  PackedReader reader(packed, PackedOp::separable_conv2d, x, -1, out_channels, kernel_size[0], kernel_size[1]);
  const int64_t mid = reader.header().mid_channels;
  STD_TORCH_CHECK(conv.c > 0 && mid % conv.c == 0, "packed has ", mid, " depthwise channels, not a multiple of x's ",
                  conv.c);
  const DepthwiseWeights dw = reader.depthwise(mid);
  const PointwiseWeights pw = reader.pointwise(mid, out_channels);
  const KernelTable& table = kernels(storage);
  const Storage between = operand_storage(table, storage, pw);

  Separable op{storage,
               table,
               conv,
               channels_last(x),
               residual ? Maybe(channels_last(*residual)) : std::nullopt,
               depthwise_tile(conv, dw, between, pre_activation, mid_activation),
               packed_gemm(pw, between, storage, activation_code),
               padded_row(mid, storage_size(between))};
  op.depthwise.multiplier = mid / conv.c;
  op.depthwise.x_pixel = conv.c;
  op.depthwise.x_row = conv.w * conv.c;
  op.depthwise.y_pixel = op.row;
  op.depthwise.y_row = conv.out_w * op.row;
  op.pointwise.a_row = op.row;
  op.pointwise.y_row = op.pointwise.residual_row = out_channels;

  if (max_pool.size() == 1 && max_pool[0] == -1) {
    Tensor y = empty_channels_last(x, conv.n, out_channels, conv.out_h, conv.out_w, x.scalar_type());
    if (y.numel() > 0) run(op, y);
    return in_format_of(x, y);
  }
  STD_TORCH_CHECK(!residual, "residual can't be combined with max_pool");
  STD_TORCH_CHECK(
      max_pool.size() == 3 && max_pool[0] > 0 && max_pool[1] > 0 && max_pool[2] >= 0 && 2 * max_pool[2] <= max_pool[0],
      "max_pool must be a positive kernel and stride, and a padding of at most half the kernel");
  const auto pooled = [&](int64_t size) { return (size + 2 * max_pool[2] - max_pool[0]) / max_pool[1] + 1; };
  STD_TORCH_CHECK(std::min(conv.out_h, conv.out_w) + 2 * max_pool[2] >= max_pool[0],
                  "max_pool's kernel is larger than the padded result");
  const int64_t pooled_h = pooled(conv.out_h), pooled_w = pooled(conv.out_w);
  Tensor y = empty_channels_last(x, conv.n, out_channels, pooled_h, pooled_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);
  op.pointwise.y_storage = compute_storage(storage);
  MaxPoolTile pool{};
  pool.height = conv.out_h;
  pool.width = conv.out_w;
  pool.channels = out_channels;
  pool.y_storage = storage;
  pool.out_width = pooled_w;
  pool.kernel = max_pool[0];
  pool.stride = max_pool[1];
  pool.padding = max_pool[2];
  run_pooled(op, pool, pooled_h, y);
  return in_format_of(x, y);
}

Tensor separable_conv2d(Tensor x, Tensor dw_weight, Maybe dw_bias, Tensor pw_weight, Maybe pw_bias, Maybe residual,
                        Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t mid_activation,
                        int64_t activation_code, int64_t backend) {
  STD_TORCH_CHECK(dw_weight.scalar_type() == x.scalar_type() && pw_weight.scalar_type() == x.scalar_type(),
                  "dw_weight and pw_weight must have x's dtype");
  const Tensor packed = pack_separable_conv2d(dw_weight, dw_bias, pw_weight, pw_bias);
  return separable_conv2d_packed(x, packed, residual, pw_weight.size(0), {dw_weight.size(2), dw_weight.size(3)}, stride,
                                 padding, dilation, pre_activation, mid_activation, activation_code, {-1}, backend);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_conv2d_backward(
    Tensor grad, Tensor x, Tensor dw_weight, Maybe dw_bias, Tensor pw_weight, Maybe pw_bias, Maybe residual,
    Ints stride, Ints padding, Ints dilation, int64_t pre_activation, int64_t mid_activation, int64_t activation_code,
    int64_t output_mask, int64_t backend) {
  // The intermediate is computed again, not kept. Everything in the compute type: it is never rounded to x's dtype.
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const Ints unit{1, 1};
  const Tensor xs = to_dtype(x, dtype), dws = to_dtype(dw_weight, dtype), pws = to_dtype(pw_weight, dtype);
  const Maybe dbs = to_dtype(dw_bias, dtype), pbs = to_dtype(pw_bias, dtype), rs = to_dtype(residual, dtype);
  const Tensor mid = depthwise_conv2d(xs, dws, dbs, stride, padding, dilation, pre_activation, mid_activation, backend);
  const int64_t pointwise_mask = (output_mask & 7 ? 1 : 0) | (output_mask >> 3 & 1) << 1 | (output_mask >> 4 & 1) << 2 |
                                 (output_mask >> 5 & 1) << 3;
  const auto [dmid, dpw, dpb, dres] = pointwise_conv2d_backward(to_dtype(grad, dtype), mid, pws, pbs, rs, unit,
                                                                activation_code, pointwise_mask, backend);
  const auto [dx, ddw, ddb] = output_mask & 7
                                  ? depthwise_conv2d_backward(dmid, xs, dws, dbs, stride, padding, dilation,
                                                              pre_activation, mid_activation, output_mask & 7, backend)
                                  : std::tuple(no_gradient(xs), no_gradient(dws), no_gradient(dws));
  const auto wanted = [&](int bit) { return (output_mask >> bit & 1) != 0; };
  return {wanted(0) ? image_gradient(x, channels_last(dx)) : no_gradient(x),
          to_dtype(ddw, dw_weight.scalar_type()),
          to_dtype(ddb, dw_bias ? dw_bias->scalar_type() : dw_weight.scalar_type()),
          to_dtype(dpw, pw_weight.scalar_type()),
          to_dtype(dpb, pw_bias ? pw_bias->scalar_type() : pw_weight.scalar_type()),
          wanted(5) && residual ? image_gradient(*residual, channels_last(dres)) : no_gradient(x)};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&cnnfast::cpu::separable_conv2d));
  m.impl("separable_conv2d_backward", TORCH_BOX(&cnnfast::cpu::separable_conv2d_backward));
  m.impl("separable_conv2d_packed", TORCH_BOX(&cnnfast::cpu::separable_conv2d_packed));
  m.impl("pack_separable_conv2d", TORCH_BOX(&cnnfast::cpu::pack_separable_conv2d));
}
