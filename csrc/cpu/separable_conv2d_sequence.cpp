// Separable convolutions one after another on the CPU, and a max pooling, in one pass over the image: what lies between
// them is only ever a few rows in L2. Xception's entry flow would write 11 MB between two such convolutions and read it
// back.
// Tiling: a range of output rows a task, a few of them at a time. Each level keeps the rows of its result that the next
// level will read again; where a task begins they are computed anew, (kernel_h - 1) rows a level.
// Bytes: x read once, y written once, the weights read once for each few rows: fused only where those and the rows fit.
#include <cstring>

#include "separable_conv2d.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kSequenceBytes = 1'300'000;  // of rows and intermediates: most of an L2, beside the weights
constexpr int64_t kPixels = 256;               // that a few rows should have, to be worth reading the weights for

struct Level {
  Separable op;
  int64_t row_bytes;  // of its result
  int64_t capacity;   // rows of it that are kept
};

// Rows [held, done) of a level's result.
struct Rows {
  char* data;
  int64_t held, done;

  void drop_before(int64_t row, int64_t row_bytes) {
    if (row <= held) return;
    if (row < done) std::memmove(data, data + (row - held) * row_bytes, (done - row) * row_bytes);
    held = row;
    done = std::max(done, row);
  }
};

struct Sequence {
  std::vector<Level> levels;
  std::optional<MaxPoolTile> pool;  // sizes, without pointers
  int64_t step;                     // output rows at a time

  const Level& last() const { return levels.back(); }
  int64_t rows_bytes() const {
    int64_t bytes = 0;
    for (const Level& level : levels) bytes += level.capacity * level.row_bytes;
    return bytes;
  }
  int64_t tile_bytes() const {
    int64_t bytes = 0;
    for (const Level& level : levels) bytes = std::max(bytes, level.op.tile_bytes(level.capacity));
    return bytes;
  }
  // Rows of the last level that output rows [begin, end) read.
  std::pair<int64_t, int64_t> read_rows(int64_t begin, int64_t end) const {
    if (!pool) return {begin, end};
    return {std::max<int64_t>(0, begin * pool->stride - pool->padding),
            std::min(pool->height, (end - 1) * pool->stride - pool->padding + pool->kernel)};
  }
};

// Rows [.done, end) of one level, from the level below it or from x.
void compute(const Level& level, const char* below, int64_t below_first_row, Rows& rows, int64_t end, char* to,
             char* tile) {
  if (end <= rows.done) return;
  level.op.first_stage(below, below_first_row, rows.done, end, tile);
  level.op.table->gemm[compute_index(level.op.storage)](level.op.second_stage(end - rows.done, tile, to));
  rows.done = end;
}

void run(const Sequence& s, const Tensor& x, Tensor& y) {
  const int64_t n = y.size(0), out_h = y.size(2), levels = static_cast<int64_t>(s.levels.size());
  const int64_t x_bytes = x.numel() / n * static_cast<int64_t>(x.element_size());
  const int64_t y_bytes = y.numel() / n * static_cast<int64_t>(y.element_size());
  // Tasks an image: two a thread, fewer where the rows that two tasks both compute would be over a twentieth.
  int64_t shared = s.pool ? std::max<int64_t>(0, s.pool->kernel - s.pool->stride) : 0;
  for (int64_t l = 1; l < levels; ++l)
    shared += (s.levels[l].op.conv.window.kernel_h - 1) * s.levels[l].op.conv.window.dilation_h;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t worthwhile = s.last().op.conv.out_h / std::max<int64_t>(1, 20 * shared);
  const int64_t tasks = ceil_div(std::clamp(worthwhile * n, threads, 2 * threads), n);
  const int64_t task_rows = ceil_div(out_h, tasks), per_image = ceil_div(out_h, task_rows);

  for_each(n * per_image, [&](int64_t i) {
    const int64_t image = i / per_image, task_begin = i % per_image * task_rows;
    const int64_t task_end = std::min(task_begin + task_rows, out_h);
    const char* x_image = bytes_of(x) + image * x_bytes;
    char* y_image = mutable_bytes_of(y) + image * y_bytes;
    char* tile = scratch(Slot::depthwise, s.tile_bytes());
    char* data = scratch(Slot::expanded, s.rows_bytes());
    std::vector<Rows> rows(s.levels.size());
    int64_t first = s.read_rows(task_begin, task_end).first;
    for (int64_t l = levels; l-- > 0;) {
      rows[l] = {data, first, first};
      data += s.levels[l].capacity * s.levels[l].row_bytes;
      first = input_rows(s.levels[l].op.conv, first, first + 1).first;
    }
    std::vector<int64_t> wanted(s.levels.size());  // each level's rows before this one, for the step's output
    for (int64_t begin = task_begin; begin < task_end; begin += s.step) {
      const int64_t end = std::min(begin + s.step, task_end);
      const auto [read, read_end] = s.read_rows(begin, end);
      for (int64_t l = levels; l-- > 0;) {
        const bool top = l + 1 == levels;
        const auto needs = [&](int64_t from, int64_t to) { return input_rows(s.levels[l + 1].op.conv, from, to); };
        wanted[l] = top ? read_end : needs(rows[l + 1].done, wanted[l + 1]).second;
        rows[l].drop_before(top ? read : needs(rows[l + 1].done, wanted[l + 1]).first, s.levels[l].row_bytes);
      }
      for (int64_t l = 0; l < levels; ++l) {
        const Level& level = s.levels[l];
        const bool into_y = l + 1 == levels && !s.pool;
        char* to = into_y ? y_image + rows[l].done * level.row_bytes
                          : rows[l].data + (rows[l].done - rows[l].held) * level.row_bytes;
        compute(level, l ? rows[l - 1].data : x_image, l ? rows[l - 1].held : 0, rows[l], wanted[l], to, tile);
      }
      if (!s.pool) continue;
      MaxPoolTile t = *s.pool;
      t.x = rows.back().data;
      t.x_first_row = rows.back().held;
      t.row_begin = begin;
      t.row_end = end;
      t.y = y_image + begin * (y_bytes / out_h);
      s.last().op.table->max_pool[compute_index(s.last().op.storage)](t);
    }
  });
}

// Tiles for `step` output rows at a time.
void plan(Sequence& s, int64_t step) {
  s.step = step;
  int64_t rows = s.pool ? (step - 1) * s.pool->stride + s.pool->kernel : step;
  for (int64_t l = static_cast<int64_t>(s.levels.size()); l-- > 0;) {
    s.levels[l].capacity = rows;
    const Window& w = s.levels[l].op.conv.window;
    rows = (rows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1;
  }
}

}  // namespace

Tensor separable_conv2d_sequence(Tensor x, std::vector<Tensor> packed, Ints out_channels, Ints kernel_size,
                                 Ints padding, Ints dilation, int64_t pre_activation, int64_t mid_activation,
                                 Ints activations, Ints max_pool, int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(kernel_size.size() == 2, "kernel_size must have 2 elements");
  STD_TORCH_CHECK(!packed.empty() && out_channels.size() == packed.size() && activations.size() == packed.size(),
                  "packed, out_channels and activations must be of one length, at least 1");
  const Storage storage = storage_of(x, "x"), compute = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const bool pooled = max_pool.size() == 3;
  STD_TORCH_CHECK(pooled || (max_pool.size() == 1 && max_pool[0] == -1), "max_pool must have 3 elements, or be [-1]");

  Sequence s{};
  Conv conv = conv_of(x, kernel_size[0], kernel_size[1], {1, 1}, padding, dilation);
  for (size_t l = 0; l < packed.size(); ++l) {
    const bool first = l == 0, last = l + 1 == packed.size();
    if (!first)
      conv = conv_of_sizes(conv.n, out_channels[l - 1], conv.out_h, conv.out_w, kernel_size[0], kernel_size[1], {1, 1},
                           padding, dilation);
    const Storage y_storage = last && !pooled ? storage : compute;
    s.levels.push_back({separable_of(packed[l], first ? storage : compute, y_storage, conv, out_channels[l],
                                     first ? pre_activation : 0, mid_activation, activations[l]),
                        conv.out_w * out_channels[l] * storage_size(y_storage), 0});
  }
  int64_t out_h = conv.out_h, out_w = conv.out_w;
  if (pooled) {
    const int64_t kernel = max_pool[0], stride = max_pool[1], pad = max_pool[2];
    STD_TORCH_CHECK(kernel > 0 && stride > 0 && pad >= 0 && 2 * pad <= kernel,
                    "max_pool must be a positive kernel and stride, and a padding of at most half the kernel");
    STD_TORCH_CHECK(std::min(out_h, out_w) + 2 * pad >= kernel, "max_pool's kernel is larger than the padded result");
    MaxPoolTile pool{};
    pool.height = out_h;
    pool.width = out_w;
    pool.channels = out_channels.back();
    pool.y_storage = storage;
    out_h = (out_h + 2 * pad - kernel) / stride + 1;
    out_w = (out_w + 2 * pad - kernel) / stride + 1;
    pool.out_width = out_w;
    pool.kernel = kernel;
    pool.stride = stride;
    pool.padding = pad;
    s.pool = pool;
  }
  Tensor y = empty_channels_last(x, conv.n, out_channels.back(), out_h, out_w, x.scalar_type());
  if (y.numel() == 0) return in_format_of(x, y);

  Tensor rest = channels_last(x);
  const int64_t rows_a_row = s.pool ? s.pool->stride : 1;
  plan(s, std::max<int64_t>(1, ceil_div(kPixels, std::max<int64_t>(1, conv.out_w * rows_a_row))));
  // What would not stay in L2 together runs one by one, the last one always with its pooling.
  while (s.levels.size() > 1 && s.rows_bytes() + s.tile_bytes() > kSequenceBytes) {
    const size_t l = packed.size() - s.levels.size();
    rest = separable_conv2d_packed(rest, packed[l], std::nullopt, out_channels[l], kernel_size, {1, 1}, padding,
                                   dilation, l == 0 ? pre_activation : 0, mid_activation, activations[l], backend);
    s.levels.erase(s.levels.begin());
    Level& first = s.levels.front();
    first.op = separable_of(packed[l + 1], storage, first.op.pointwise.y_storage, first.op.conv, out_channels[l + 1], 0,
                            mid_activation, activations[l + 1]);
  }
  run(s, rest, y);
  return in_format_of(x, y);
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("separable_conv2d_sequence", TORCH_BOX(&cnnfast::cpu::separable_conv2d_sequence));
}
