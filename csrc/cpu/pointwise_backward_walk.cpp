// A task of pointwise backward, a tile of pixels at a time: kernels/pointwise_conv2d_backward.h has what is no product.
#include "pointwise_backward_walk.h"

#include <cstring>

namespace cnnfast::cpu {

namespace {

// A side of a product, of a tile: its rows and from one to the next.
struct Operand {
  const char* at;
  int64_t row;
};

// It owns a tile's operands in this thread's scratch.
class Walk {
 public:
  Walk(const PointwiseBackward& op, const PointwiseTask& task);
  void run();

 private:
  Operand operands(const Side& side, int64_t first, int64_t count, Range channels, bool rows, char* buffer, int64_t row,
                   bool columns, bool panels) const;
  void input(int64_t first, int64_t count, const Operand& g) const;
  void add_bias(const Operand& g, int64_t count) const;
  void add_weight(const Operand& left, int64_t first, int64_t count);
  void look_ahead(GemmTile& t, int64_t first, bool input) const;

  const PointwiseBackward& op_;
  const PointwiseTask& task_;
  const int64_t g_row_, a_row_, panel_, column_;
  char *g_rows_, *a_rows_, *da_, *columns_, *panels_, *other_part_;
  int64_t tiles_;         // that are still to come
  char* from_ = nullptr;  // where dW is by now
};

Walk::Walk(const PointwiseBackward& op, const PointwiseTask& task)
    : op_(op),
      task_(task),
      g_row_(padded_row(op.out, storage_size(op.operands))),
      a_row_(padded_row(op.in, op.scalar)),
      panel_((op.tile + 2) * kPanel),  // an odd number of lines, in pairs too
      column_(op.tile + kPairDepth),
      tiles_(ceil_div(task.pixels.size(), op.tile)) {
  const int64_t item = storage_size(op.operands), rows = task.rows.size(), cols = task.cols.size();
  const auto whole = [](int64_t bytes) { return round_up(bytes, 64); };
  const int64_t sizes[] = {whole(op.tile * g_row_ * item),
                           whole(op.tile * a_row_ * op.scalar),
                           whole(op.tile * a_row_ * op.scalar),
                           op.by == By::fma ? 0 : whole(rows * column_ * item),
                           whole(round_up(cols, kPanel) * (op.tile + 2) * item),
                           op.by == By::fma ? 0 : whole(rows * cols * op.scalar)};
  int64_t all = 0;
  for (const int64_t size : sizes) all += size;
  char* at = scratch(Slot::gradients, all);
  int i = 0;
  for (char** to : {&g_rows_, &a_rows_, &da_, &columns_, &panels_, &other_part_}) {
    *to = at;
    at += sizes[i++];
  }
}

void Walk::run() {
  const bool weight = task_.weight, g_left = op_.g_left;
  // Of left: columns on AMX, where floats are turned from rows; else rows.
  const bool left_rows = weight && op_.by != By::bf16, left_columns = weight && op_.by != By::fma;
  for (int64_t first = task_.pixels.begin; first < task_.pixels.end; first += op_.tile) {
    const int64_t count = std::min(op_.tile, task_.pixels.end - first);
    const Range g_channels = task_.first_pass ? Range{0, op_.out} : g_left ? task_.rows : task_.cols;
    const Operand g = operands(op_.g, first, count, g_channels, task_.first_pass || (left_rows && g_left), g_rows_,
                               g_row_, left_columns && g_left, weight && !g_left);
    if (task_.first_pass && op_.input_wanted) input(first, count, g);
    if (task_.first_pass && op_.gradients.bias_wanted) add_bias(g, count);
    if (!weight) continue;
    const Operand a = operands(op_.a, first, count, g_left ? task_.cols : task_.rows, left_rows && !g_left, a_rows_,
                               a_row_, left_columns && !g_left, g_left);
    add_weight(g_left ? g : a, first, count);
  }
}

// Channels of a side as what is asked for. Rows: where they are, or to be in `buffer`.
Operand Walk::operands(const Side& side, int64_t first, int64_t count, Range channels, bool rows, char* buffer,
                       int64_t row, bool columns, bool panels) const {
  OperandTile t = side.tile(first, count, channels.begin, channels.size());
  Operand result{};
  // Whole tiles of AMX are read beyond a row's end.
  const bool in_place = side.as_stored() && side.storage == op_.operands &&
                        (op_.operands != Storage::bf16 || channels.size() % kPairDepth == 0);
  if (rows && in_place) result = {static_cast<const char*>(t.x), side.channels};
  if (rows && !in_place) {
    t.rows = buffer;
    t.row = row;
    result = {buffer, row};
  }
  if (panels) {
    t.panels = panels_;
    t.panel = panel_;
  }
  if (op_.by == By::bf16 && columns) {
    t.columns = columns_;
    t.column = column_;
  }
  op_.operand(side, t);
  return result;
}

// dx, and what the sums of scale and shift have of it.
void Walk::input(int64_t first, int64_t count, const Operand& g) const {
  GemmTile t = op_.product;
  t.a = g.at;
  t.a_row = g.row;
  t.rows = count;
  const PointwiseGradients& gradients = op_.gradients;
  const int64_t at = first * op_.in * storage_size(op_.storage);
  char* const dx = gradients.x ? mutable_bytes_of(*gradients.x) + at : nullptr;
  const bool direct = op_.a.as_stored();
  t.y = direct ? dx : da_;
  t.y_row = direct ? op_.in : a_row_;
  if (direct) t.y_storage = op_.storage;
  look_ahead(t, first + op_.tile, true);
  multiply(op_.table, t);
  if (direct) return;
  GradInputTile e{};
  e.grad = da_;
  e.grad_row = a_row_;
  e.x = op_.a.pixel(first);
  e.dx = dx;
  e.x_pixel = op_.in;
  e.scale = op_.a.scale;
  e.shift = op_.a.shift;
  e.pixels = count;
  e.channels = op_.in;
  e.activation = activation(op_.a.activation);
  if (gradients.shift_wanted) e.sums = op_.sums_of(task_.range);
  if (gradients.scale_wanted) e.sums_by_x = op_.sums_of(task_.range) + op_.in * op_.scalar;
  op_.table.grad_input[static_cast<int>(op_.storage)](e);
}

void Walk::add_bias(const Operand& g, int64_t count) const {
  // Sums of a tile beside those of the tiles before, as two rows that are added.
  char* const two = scratch(Slot::sums, 2 * op_.out * op_.scalar);
  char* const to = op_.sums_of(task_.range) + 2 * op_.in * op_.scalar;
  std::memcpy(two, to, op_.out * op_.scalar);
  ChannelSumsTile t{};
  t.x = g.at;
  t.x_pixel = g.row;
  t.channels = op_.out;
  t.pixels = count;
  t.run = ChannelSumsTile::kRun;
  t.factor = 1;
  t.sums = two + op_.out * op_.scalar;
  op_.table.channel_sums[static_cast<int>(op_.operands)](t);
  add_rows(op_.table, op_.storage, two, 2, op_.out, 1, to);
}

// The tile's part of dW, whose right side is in panels.
void Walk::add_weight(const Operand& left, int64_t first, int64_t count) {
  const int64_t rows = task_.rows.size(), cols = task_.cols.size(), whole_row = op_.right().channels;
  GemmTile t{};
  if (op_.by == By::fma) {
    t.a = left.at;
    t.a_row = 1;
    t.a_depth = left.row;
  } else {
    if (op_.by == By::planes) op_.table.transpose({left.at, left.row, count, rows, columns_, column_});
    t.a = columns_;
    t.a_row = column_;
    t.a_depth = 1;
    t.bias = op_.no_bias->const_data_ptr();
    t.in_planes = op_.by == By::planes;
  }
  t.b = panels_;
  t.b_panel = panel_;
  t.a_storage = t.b_storage = op_.operands;
  t.y_storage = compute_storage(op_.storage);
  t.rows = rows;
  t.cols = cols;
  t.depth = count;
  t.activation = activation(0);
  // A product on AMX may make rows twice, so that it doesn't add to what it reads; the last goes to the part.
  const int64_t at = task_.range * op_.in * op_.out + task_.rows.begin * whole_row + task_.cols.begin;
  char* const part = mutable_bytes_of(*op_.parts) + at * op_.scalar;
  const bool to_part = op_.by == By::fma || --tiles_ % 2 == 0;
  t.residual = from_;
  t.residual_row = from_ == part ? whole_row : cols;
  from_ = to_part ? part : other_part_;
  t.y = from_;
  t.y_row = to_part ? whole_row : cols;
  look_ahead(t, first + op_.tile, false);
  multiply(op_.table, t);
}

// Has a product by FMA bring what the next tile reads, the larger images' part of it.
void Walk::look_ahead(GemmTile& t, int64_t first, bool input) const {
  if (op_.by != By::fma || first >= op_.pixels) return;
  const Side& side = op_.out >= op_.in ? op_.g : op_.a;
  const int64_t pixel = side.channels * storage_size(side.storage);
  const int64_t bytes = std::min(op_.tile, op_.pixels - first) * pixel;
  const char* const x = side.x + first * pixel;
  if (side.residual) {
    t.ahead = input ? side.residual + first * pixel : x;
    t.ahead_bytes = bytes;
  } else {
    t.ahead = input ? x : x + bytes / 2;
    t.ahead_bytes = bytes / 2;
  }
}

}  // namespace

void walk(const PointwiseBackward& op, const PointwiseTask& task) { Walk(op, task).run(); }

}  // namespace cnnfast::cpu
