// The gradients of a pointwise convolution: g, the product's input a and a's gradient da are only ever tiles in L2.
// Tiling: a task is a range of pixels of all images, a few at a time: g and a as operands, da = g W, from it dx and the
// sums of scale and shift, and the range's own part of dW = sum of g (x) a. Where the weights are many, dW is made in a
// second pass, whose tasks are blocks of it and ranges of pixels. All follow from the shape alone, and parts are added in
// their order: the same bits on any number of threads.
// Bytes: grad, y and x read once (with many weights twice), dx written once.
#include "pointwise_gradients.h"

#include <cstring>

#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

// g, or a: what makes it, and of which channels.
struct Side {
  Storage storage;
  const char *x, *residual, *scale, *shift;
  int64_t channels, activation;

  bool as_stored() const { return !residual && !scale && !shift && activation == 0; }
  const char* pixel(int64_t first) const { return x + first * channels * storage_size(storage); }
  // Channels [channel, channel + count) of pixels [first, first + pixels).
  OperandTile tile(int64_t first, int64_t pixels, int64_t channel, int64_t count) const {
    const int64_t at = (first * channels + channel) * storage_size(storage), in = channel * compute_size(storage);
    OperandTile t{};
    t.x = x + at;
    t.residual = residual ? residual + at : nullptr;
    t.x_pixel = channels;
    t.scale = scale ? scale + in : nullptr;
    t.shift = shift ? shift + in : nullptr;
    t.pixels = pixels;
    t.channels = count;
    t.activation = cpu::activation(activation);
    return t;
  }
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
// Part i of `parts` even ones, in multiples of `unit`.
Range part_of(int64_t all, int64_t parts, int64_t i, int64_t unit = 1) {
  const int64_t units = ceil_div(all, unit);
  return {std::min(all, units * i / parts * unit), std::min(all, units * (i + 1) / parts * unit)};
}

const char* bytes_of(const Maybe& t) { return t ? cpu::bytes_of(*t) : nullptr; }

// How products are made: by FMA in the compute type; on AMX in bfloat16, or of floats in planes (products.h).
enum class By { fma, bf16, planes };

class Op {
 public:
  Op(const PointwiseGradientsOf& of, PointwiseGradients& gradients)
      : of_(of),
        gradients_(gradients),
        storage_(storage_of(of.x, "x")),
        table_(kernels(storage_)),
        scalar_(compute_size(storage_)),
        pixels_(of.x.size(0) * of.x.size(2) * of.x.size(3)),
        in_(of.x.size(1)),
        out_(of.grad.size(1)),
        g_{storage_of(of.grad, "grad"),
           cpu::bytes_of(of.y ? *of.y : of.grad),
           of.y ? cpu::bytes_of(of.grad) : nullptr,
           bytes_of(of.twice_grad_squares),
           bytes_of(of.grad_sum),
           out_,
           0},
        a_{storage_, cpu::bytes_of(of.x), nullptr, bytes_of(of.scale), bytes_of(of.shift), in_, of.pre_activation},
        g_left_(out_ <= in_ || in_ * out_ * scalar_ > kWeightBytes),
        by_(how()),
        operand_(by_ == By::bf16 ? Storage::bf16 : compute_storage(storage_)),
        input_wanted_(gradients.x_wanted || gradients.scale_wanted || gradients.shift_wanted),
        tile_(by_ == By::fma    ? 128
              : by_ == By::bf16 ? 256
                                : 160) {}

  void run() {
    if (by_ != By::fma) no_bias_ = zeros({round_up(std::max(in_, out_), kPanel)});
    if (input_wanted_) pack_weight();
    if (gradients_.x_wanted)
      gradients_.x = empty_channels_last(of_.x, of_.x.size(0), in_, of_.x.size(2), of_.x.size(3), of_.x.scalar_type());
    const bool sums = gradients_.scale_wanted || gradients_.shift_wanted || gradients_.bias_wanted;
    const bool first_pass = input_wanted_ || gradients_.bias_wanted;
    const int64_t weights = in_ * out_ * scalar_, tiles = std::max<int64_t>(1, pixels_ / tile_);
    const bool together = weights <= kWeightBytes;
    const int64_t ranges = together
                               ? std::min(tiles, std::clamp<int64_t>(kPartBytes / std::max<int64_t>(1, weights), 4, 16))
                               : std::min<int64_t>(tiles, 64);
    if (sums) sums_ = zeros({ranges, 2 * in_ + out_});
    if (together) {
      if (gradients_.weight_wanted) parts_ = parts(ranges);
      const Range rows{0, left().channels}, cols{0, right().channels};
      for_each(ranges, [&](int64_t i) {
        range(part_of(pixels_, ranges, i), i, first_pass, gradients_.weight_wanted, rows, cols);
      });
    } else {
      if (first_pass) for_each(ranges, [&](int64_t i) { range(part_of(pixels_, ranges, i), i, true, false, {}, {}); });
      if (gradients_.weight_wanted) weight_in_blocks(tiles);
    }
    if (gradients_.weight_wanted) gradients_.weight = weight();
    if (sums) {
      Tensor total = totals();
      const auto take = [&](bool wanted, Maybe& to, int64_t first, int64_t count) {
        if (wanted) to = torch::stable::clone(torch::stable::narrow(total, 0, first, count));
      };
      take(gradients_.shift_wanted, gradients_.shift, 0, in_);
      take(gradients_.scale_wanted, gradients_.scale, in_, in_);
      take(gradients_.bias_wanted, gradients_.bias, 2 * in_, out_);
    }
  }

 private:
  // Of dW, as many bytes as stay in L2 beside a tile of pixels; of all its parts.
  static constexpr int64_t kWeightBytes = 256 * 1024, kPartBytes = 1024 * 1024;

  const PointwiseGradientsOf& of_;
  PointwiseGradients& gradients_;
  Storage storage_;
  const KernelTable& table_;
  int64_t scalar_, pixels_, in_, out_;
  Side g_, a_;
  bool g_left_;
  By by_;
  Storage operand_;
  bool input_wanted_;
  int64_t tile_;  // pixels at a time
  Maybe packed_, no_bias_, sums_, parts_;
  GemmTile product_{};

  // dW is left^T right, or its transpose is: where it is small its columns are the more of the channels.
  const Side& left() const { return g_left_ ? g_ : a_; }
  const Side& right() const { return g_left_ ? a_ : g_; }

  By how() const {
    const bool stored = g_.as_stored() && a_.as_stored();
    if (table_.gemm_bf16 && storage_ == Storage::bf16 && g_.storage == Storage::bf16 && (of_.may_round || stored))
      return By::bf16;
    // Enough channels to be worth splitting the other side's.
    constexpr int64_t kChannels = 96;
    return table_.gemm_planes && storage_ != Storage::f64 && std::min(in_, out_) >= kChannels ? By::planes : By::fma;
  }
  Tensor zeros(const Ints& size) const {
    Tensor t = torch::stable::empty(size, compute_dtype(storage_), std::nullopt, of_.x.device());
    torch::stable::zero_(t);
    return t;
  }
  Tensor parts(int64_t ranges) const {
    const Ints size{ranges, in_ * out_};
    return pixels_ == 0 ? zeros(size)
                        : torch::stable::empty(size, compute_dtype(storage_), std::nullopt, of_.x.device());
  }

  // W^T for da = g W: a panel holds channels of a, its depth is g's: rows of the weight as operands have them.
  void pack_weight() {
    const Tensor weight = torch::stable::contiguous(of_.weight, MemoryFormat::Contiguous);
    const Side side{storage_of(weight, "weight"), cpu::bytes_of(weight), nullptr, nullptr, nullptr, in_, 0};
    const int64_t depth = by_ == By::bf16 ? round_up(out_, kPairDepth) : out_, panels = ceil_div(in_, kPanel);
    packed_ = torch::stable::empty(Ints{panels * depth * kPanel * storage_size(operand_)}, ScalarType::Byte,
                                   std::nullopt, weight.device());
    char* const to = mutable_bytes_of(*packed_);
    constexpr int64_t kTogether = 8;
    for_each(out_ ? ceil_div(panels, kTogether) : 0, [&](int64_t i) {
      const int64_t channel = i * kTogether * kPanel;
      OperandTile t = side.tile(0, out_, channel, std::min(kTogether * kPanel, in_ - channel));
      t.panel = depth * kPanel;
      t.panels = to + i * kTogether * t.panel * storage_size(operand_);
      operand(side, t);
    });
    product_.a_depth = 1;
    product_.b = to;
    product_.b_panel = depth * kPanel;
    product_.bias = by_ == By::fma ? nullptr : no_bias_->const_data_ptr();
    product_.a_storage = product_.b_storage = operand_;
    product_.y_storage = compute_storage(storage_);
    product_.depth = out_;
    product_.cols = in_;
    product_.activation = activation(0);
    product_.in_planes = by_ == By::planes;
  }

  void operand(const Side& side, const OperandTile& t) const {
    if (!t.rows && !t.panels && !t.columns) return;
    by_ == By::bf16 ? table_.operand_bf16(t) : table_.operand[static_cast<int>(side.storage)](t);
  }

  void weight_in_blocks(int64_t tiles) {
    // Blocks of dW that stay in L2, and ranges of pixels so that there are some tasks.
    constexpr int64_t kSide = 384, kTasks = 8;
    const int64_t row_parts = ceil_div(left().channels, kSide), col_parts = ceil_div(right().channels, kSide),
                  blocks = row_parts * col_parts, ranges = std::min(tiles, ceil_div(kTasks, blocks));
    parts_ = parts(ranges);
    for_each(blocks * ranges, [&](int64_t i) {
      const int64_t r = i / blocks, row = i % blocks / col_parts, col = i % col_parts;
      range(part_of(pixels_, ranges, r), r, false, true, part_of(left().channels, row_parts, row, kPanel),
            part_of(right().channels, col_parts, col, 2 * kPanel));
    });
  }

  // A side of the products, of a tile.
  struct Rows {
    const char* at;
    int64_t row;
  };

  // Where a tile's operands are, in this thread's scratch.
  struct Buffers {
    char *g_rows, *a_rows, *da, *columns, *panels, *other_part;
    int64_t g_row, a_row, panel, column;
  };
  Buffers buffers(int64_t rows, int64_t cols) const {
    Buffers b{};
    const int64_t item = storage_size(operand_);
    b.g_row = padded_row(out_, item);
    b.a_row = padded_row(in_, scalar_);
    b.panel = (tile_ + 2) * kPanel;  // an odd number of lines, in pairs too
    b.column = tile_ + kPairDepth;
    const auto whole = [](int64_t bytes) { return round_up(bytes, 64); };
    const int64_t sizes[] = {whole(tile_ * b.g_row * item),
                             whole(tile_ * b.a_row * scalar_),
                             whole(tile_ * b.a_row * scalar_),
                             by_ == By::fma ? 0 : whole(rows * b.column * item),
                             whole(round_up(cols, kPanel) * (tile_ + 2) * item),
                             by_ == By::fma ? 0 : whole(rows * cols * scalar_)};
    int64_t all = 0;
    for (const int64_t size : sizes) all += size;
    char* at = scratch(Slot::gradients, all);
    int i = 0;
    for (char** to : {&b.g_rows, &b.a_rows, &b.da, &b.columns, &b.panels, &b.other_part}) {
      *to = at;
      at += sizes[i++];
    }
    return b;
  }

  // Channels of a side as what is asked for. Rows: where they are, or to be in `buffer`.
  Rows operands(const Side& side, int64_t first, int64_t count, Range channels, bool rows, char* buffer, int64_t row,
                bool columns, bool panels, const Buffers& b) const {
    OperandTile t = side.tile(first, count, channels.begin, channels.size());
    Rows result{};
    // Whole tiles of AMX are read beyond a row's end.
    const bool in_place = side.as_stored() && side.storage == operand_ &&
                          (operand_ != Storage::bf16 || channels.size() % kPairDepth == 0);
    if (rows && in_place) result = {static_cast<const char*>(t.x), side.channels};
    if (rows && !in_place) {
      t.rows = buffer;
      t.row = row;
      result = {buffer, row};
    }
    if (panels) {
      t.panels = b.panels;
      t.panel = b.panel;
    }
    if (by_ == By::bf16 && columns) {
      t.columns = b.columns;
      t.column = b.column;
    }
    operand(side, t);
    return result;
  }

  // Pixels of a range: dx and sums, if `first_pass`; block rows x cols of dW, if `weight`.
  void range(Range pixels, int64_t index, bool first_pass, bool weight, Range rows, Range cols) const {
    const Buffers b = buffers(rows.size(), cols.size());
    // Of left: columns on AMX, where floats are turned from rows; else rows.
    const bool left_rows = weight && by_ != By::bf16, left_columns = weight && by_ != By::fma;
    char* from = nullptr;
    for (int64_t first = pixels.begin, tiles = ceil_div(pixels.size(), tile_); first < pixels.end; first += tile_) {
      const int64_t count = std::min(tile_, pixels.end - first);
      const Range g_channels = first_pass ? Range{0, out_} : g_left_ ? rows : cols;
      const Rows g = operands(g_, first, count, g_channels, first_pass || (left_rows && g_left_), b.g_rows, b.g_row,
                              left_columns && g_left_, weight && !g_left_, b);
      if (first_pass && input_wanted_) input(first, count, g, b.da, b.a_row, index);
      if (first_pass && gradients_.bias_wanted) add_bias(g, count, index);
      if (!weight) continue;
      const Rows a = operands(a_, first, count, g_left_ ? cols : rows, left_rows && !g_left_, b.a_rows, b.a_row,
                              left_columns && !g_left_, g_left_, b);
      GemmTile t{};
      const Rows& l = g_left_ ? g : a;
      if (by_ == By::fma) {
        t.a = l.at;
        t.a_row = 1;
        t.a_depth = l.row;
      } else {
        if (by_ == By::planes) table_.transpose({l.at, l.row, count, rows.size(), b.columns, b.column});
        t.a = b.columns;
        t.a_row = b.column;
        t.a_depth = 1;
        t.bias = no_bias_->const_data_ptr();
        t.in_planes = by_ == By::planes;
      }
      t.b = b.panels;
      t.b_panel = b.panel;
      t.a_storage = t.b_storage = operand_;
      t.y_storage = compute_storage(storage_);
      t.rows = rows.size();
      t.cols = cols.size();
      t.depth = count;
      t.activation = activation(0);
      // A product on AMX may make rows twice, so that it doesn't add to what it reads; the last goes to the part.
      char* const part =
          mutable_bytes_of(*parts_) + (index * in_ * out_ + rows.begin * right().channels + cols.begin) * scalar_;
      const bool to_part = by_ == By::fma || --tiles % 2 == 0;
      t.residual = from;
      t.residual_row = from == part ? right().channels : cols.size();
      from = to_part ? part : b.other_part;
      t.y = from;
      t.y_row = to_part ? right().channels : cols.size();
      look_ahead(t, first + tile_, false);
      multiply(table_, t);
    }
  }

  // Has a product by FMA bring what the next tile reads, the larger images' part of it.
  void look_ahead(GemmTile& t, int64_t first, bool input) const {
    if (by_ != By::fma || first >= pixels_) return;
    const Side& side = out_ >= in_ ? g_ : a_;
    const int64_t pixel = side.channels * storage_size(side.storage), bytes = std::min(tile_, pixels_ - first) * pixel;
    const char* const x = side.x + first * pixel;
    if (side.residual) {
      t.ahead = input ? side.residual + first * pixel : x;
      t.ahead_bytes = bytes;
    } else {
      t.ahead = input ? x : x + bytes / 2;
      t.ahead_bytes = bytes / 2;
    }
  }

  // dx, and what the sums of scale and shift have of it.
  void input(int64_t first, int64_t count, const Rows& g, char* da, int64_t row, int64_t index) const {
    GemmTile t = product_;
    t.a = g.at;
    t.a_row = g.row;
    t.rows = count;
    const int64_t at = first * in_ * storage_size(storage_);
    char* const dx = gradients_.x ? mutable_bytes_of(*gradients_.x) + at : nullptr;
    const bool direct = a_.as_stored();
    t.y = direct ? dx : da;
    t.y_row = direct ? in_ : row;
    if (direct) t.y_storage = storage_;
    look_ahead(t, first + tile_, true);
    multiply(table_, t);
    if (direct) return;
    GradInputTile e{};
    e.grad = da;
    e.grad_row = row;
    e.x = a_.pixel(first);
    e.dx = dx;
    e.x_pixel = in_;
    e.scale = a_.scale;
    e.shift = a_.shift;
    e.pixels = count;
    e.channels = in_;
    e.activation = activation(a_.activation);
    if (gradients_.shift_wanted) e.sums = sums(index);
    if (gradients_.scale_wanted) e.sums_by_x = sums(index) + in_ * scalar_;
    table_.grad_input[static_cast<int>(storage_)](e);
  }

  void add_bias(const Rows& g, int64_t count, int64_t index) const {
    // Sums of a tile beside those of the tiles before, as two rows that are added.
    char* const two = scratch(Slot::sums, 2 * out_ * scalar_);
    char* const to = sums(index) + 2 * in_ * scalar_;
    std::memcpy(two, to, out_ * scalar_);
    ChannelSumsTile t{};
    t.x = g.at;
    t.x_pixel = g.row;
    t.channels = out_;
    t.pixels = count;
    t.run = ChannelSumsTile::kRun;
    t.factor = 1;
    t.sums = two + out_ * scalar_;
    table_.channel_sums[static_cast<int>(operand_)](t);
    add_rows(table_, storage_, two, 2, out_, 1, to);
  }

  char* sums(int64_t range) const { return mutable_bytes_of(*sums_) + range * (2 * in_ + out_) * scalar_; }

  Tensor totals() const {
    Tensor total = torch::stable::empty(Ints{2 * in_ + out_}, compute_dtype(storage_), std::nullopt, of_.x.device());
    add_rows(table_, storage_, cpu::bytes_of(*sums_), sums_->size(0), 2 * in_ + out_, 1, mutable_bytes_of(total));
    return total;
  }

  // The parts of dW, added in their order.
  Tensor weight() const {
    const int64_t rows = left().channels, cols = right().channels, ranges = parts_->size(0);
    Tensor sum = torch::stable::empty(Ints{rows, cols, 1, 1}, compute_dtype(storage_), std::nullopt, of_.x.device());
    constexpr int64_t kBlock = 4096;
    const int64_t blocks = ceil_div(rows * cols, kBlock);
    const auto add_parts = [&](auto* to, const auto* from) {
      for_each(blocks, [&](int64_t i) {
        const int64_t begin = i * kBlock, end = std::min(begin + kBlock, rows * cols);
        std::copy(from + begin, from + end, to + begin);
        for (int64_t r = 1; r < ranges; ++r)
          for (int64_t k = begin; k < end; ++k) to[k] += from[r * rows * cols + k];
      });
    };
    if (scalar_ == 8)
      add_parts(static_cast<double*>(sum.mutable_data_ptr()), static_cast<const double*>(parts_->const_data_ptr()));
    else
      add_parts(static_cast<float*>(sum.mutable_data_ptr()), static_cast<const float*>(parts_->const_data_ptr()));
    if (g_left_) return sum;
    Tensor turned = torch::stable::empty(Ints{cols, rows, 1, 1}, sum.scalar_type(), std::nullopt, sum.device());
    torch::stable::copy_(turned, torch::stable::transpose(sum, 0, 1));
    return turned;
  }
};

}  // namespace

void PointwiseGradientsOf::with_sums(const Tensor& sum, const Tensor& squares, const Tensor& image) {
  const ScalarType dtype = compute_dtype(storage_of(image, "y"));
  y = channels_last(image);
  grad_sum = torch::stable::contiguous(to_dtype(sum, dtype));
  twice_grad_squares = twice(to_dtype(squares, dtype));
}

Tensor PointwiseGradients::of(const Tensor& parameter, const Maybe& gradient) {
  return gradient ? weight_gradient(parameter, *gradient) : no_gradient(parameter);
}

void pointwise_gradients(const PointwiseGradientsOf& of, PointwiseGradients& gradients) { Op(of, gradients).run(); }

}  // namespace cnnfast::cpu
