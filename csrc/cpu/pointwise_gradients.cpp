// The gradients of a pointwise convolution: g, the product's input a and a's gradient da are only ever tiles in L2.
// Tiling: a task is a range of pixels of all images, a few at a time: g and a as operands, da = g W, from it dx and the
// sums of scale and shift, and the range's own part of dW = sum of g (x) a. Where the weights are many, dW is made in a
// second pass, whose tasks are blocks of it and ranges of pixels. All follow from the shape alone, and parts are added in
// their order: the same bits on any number of threads.
// Bytes: grad, y and x read once (with many weights twice), dx written once.
#include "pointwise_gradients.h"

#include <cstring>

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
        transposed_(out_ > in_) {
    // dW's columns are the more of the channels.
    rows_ = transposed_ ? &a_ : &g_;
    cols_ = transposed_ ? &g_ : &a_;
    input_wanted_ = gradients.x_wanted || gradients.scale_wanted || gradients.shift_wanted;
  }

  void run() {
    if (input_wanted_) {
      Tensor weight = to_dtype(of_.weight, compute_dtype(storage_));
      packed_ = pack_pointwise_conv2d(torch::stable::transpose(weight, 0, 1), std::nullopt);
      PackedReader reader(*packed_, PackedOp::pointwise_conv2d, weight, out_, in_, 1, 1);
      product_ = packed_gemm(reader.pointwise(out_, in_), compute_storage(storage_), compute_storage(storage_), 0);
    }
    if (gradients_.x_wanted)
      gradients_.x = empty_channels_last(of_.x, of_.x.size(0), in_, of_.x.size(2), of_.x.size(3), of_.x.scalar_type());
    const bool sums = gradients_.scale_wanted || gradients_.shift_wanted || gradients_.bias_wanted;
    const int64_t weights = in_ * out_ * scalar_, blocks = std::max<int64_t>(1, pixels_ / kPixels);
    const bool together = weights <= kWeightBytes;
    const int64_t ranges =
        together ? std::min(blocks, std::clamp<int64_t>(kPartBytes / std::max<int64_t>(1, weights), 4, 16))
                 : std::min<int64_t>(blocks, 64);
    if (sums) sums_ = zeros({ranges, 2 * in_ + out_});
    const bool first_pass = input_wanted_ || gradients_.bias_wanted;
    if (together) {
      if (gradients_.weight_wanted) parts_ = zeros({ranges, in_ * out_});
      for_each(ranges, [&](int64_t i) { range(part_of(pixels_, ranges, i), i, first_pass, true, all_rows(), all_cols()); });
    } else {
      if (first_pass)
        for_each(ranges, [&](int64_t i) { range(part_of(pixels_, ranges, i), i, true, false, {}, {}); });
      if (gradients_.weight_wanted) weight_in_blocks(blocks);
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
  // Pixels at a time; of dW, as many bytes as stay in L2 beside a tile of them; of all parts of dW.
  static constexpr int64_t kPixels = 128, kWeightBytes = 256 * 1024, kPartBytes = 1024 * 1024;

  const PointwiseGradientsOf& of_;
  PointwiseGradients& gradients_;
  Storage storage_;
  const KernelTable& table_;
  int64_t scalar_, pixels_, in_, out_;
  Side g_, a_;
  bool transposed_, input_wanted_;
  const Side *rows_, *cols_;  // of dW, or of its transpose
  Maybe packed_, sums_, parts_;
  GemmTile product_{};

  Range all_rows() const { return {0, rows_->channels}; }
  Range all_cols() const { return {0, cols_->channels}; }
  Tensor zeros(const Ints& size) const {
    Tensor t = torch::stable::empty(size, compute_dtype(storage_), std::nullopt, of_.x.device());
    torch::stable::zero_(t);
    return t;
  }

  void weight_in_blocks(int64_t blocks) {
    // Blocks of dW that stay in L2, and ranges of pixels so that there are some tasks.
    const int64_t side = 384, row_parts = ceil_div(rows_->channels, side), col_parts = ceil_div(cols_->channels, side),
                  parts = row_parts * col_parts, ranges = std::min(blocks, ceil_div(8, parts));
    parts_ = zeros({ranges, in_ * out_});
    for_each(parts * ranges, [&](int64_t i) {
      const int64_t r = i / parts, row = i % parts / col_parts, col = i % col_parts;
      range(part_of(pixels_, ranges, r), r, false, true, part_of(rows_->channels, row_parts, row),
            part_of(cols_->channels, col_parts, col, kPanel));
    });
  }

  // Pixels of a range: dx and sums, if `first_pass`; block rows x cols of dW, if `weight`.
  void range(Range pixels, int64_t index, bool first_pass, bool weight, Range rows, Range cols) const {
    weight = weight && gradients_.weight_wanted;
    const int64_t panel = kPixels * kPanel, panels = round_up(cols.size(), kPanel) * kPixels;
    const bool g_is_rows = rows_ == &g_;
    const int64_t g_row = padded_row(out_, scalar_), a_row = padded_row(in_, scalar_);
    const int64_t sizes[] = {kPixels * g_row, kPixels * a_row, panels, kPixels * a_row};
    char* at = scratch(Slot::gradients, (sizes[0] + sizes[1] + sizes[2] + sizes[3]) * scalar_);
    char* buffers[4];
    for (int i = 0; i < 4; ++i) {
      buffers[i] = at;
      at += sizes[i] * scalar_;
    }
    for (int64_t first = pixels.begin; first < pixels.end; first += kPixels) {
      const int64_t count = std::min(kPixels, pixels.end - first);
      const bool whole_g = first_pass, panels_of_g = weight && !g_is_rows, rows_of_g = first_pass || (weight && g_is_rows);
      const char* g_rows = nullptr;
      int64_t g_rows_row = g_row, g_channel = 0;
      {
        const Range part = whole_g ? Range{0, out_} : g_is_rows ? rows : cols;
        OperandTile t = g_.tile(first, count, part.begin, part.size());
        g_channel = part.begin;
        const bool in_place = rows_of_g && g_.as_stored() && g_.storage == compute_storage(storage_);
        if (in_place) {
          g_rows = static_cast<const char*>(t.x);
          g_rows_row = out_;
        } else if (rows_of_g) {
          t.rows = buffers[0];
          t.row = g_row;
          g_rows = buffers[0];
        }
        if (panels_of_g) {
          t.panels = buffers[2];
          t.panel = panel;
        }
        if (t.rows || t.panels) table_.operand[static_cast<int>(g_.storage)](t);
      }
      const char* a_rows = nullptr;
      int64_t a_rows_row = a_row;
      if (weight) {
        const Range part = g_is_rows ? cols : rows;
        OperandTile t = a_.tile(first, count, part.begin, part.size());
        if (g_is_rows) {
          t.panels = buffers[2];
          t.panel = panel;
        } else if (a_.as_stored() && a_.storage == compute_storage(storage_)) {
          a_rows = static_cast<const char*>(t.x);
          a_rows_row = in_;
        } else {
          t.rows = buffers[1];
          t.row = a_row;
          a_rows = buffers[1];
        }
        if (t.rows || t.panels) table_.operand[static_cast<int>(a_.storage)](t);
      }
      if (first_pass && input_wanted_) input(first, count, g_rows, g_rows_row, buffers[3], a_row, index);
      if (first_pass && gradients_.bias_wanted) add_bias(g_rows, g_rows_row, count, index);
      if (weight) {
        GemmTile g{};
        g.a = g_is_rows ? g_rows + (rows.begin - g_channel) * scalar_ : a_rows;
        g.a_row = 1;
        g.a_depth = g_is_rows ? g_rows_row : a_rows_row;
        g.b = buffers[2];
        g.b_panel = panel;
        g.b_depth = kPanel;
        g.packed = true;
        g.a_storage = g.b_storage = g.y_storage = compute_storage(storage_);
        g.y_row = g.residual_row = cols_->channels;
        g.y = part(index) + (rows.begin * g.y_row + cols.begin) * scalar_;
        g.residual = g.y;
        g.rows = rows.size();
        g.cols = cols.size();
        g.depth = count;
        g.activation = activation(0);
        multiply(table_, g);
      }
    }
  }

  // dx, and what the sums of scale and shift have of it.
  void input(int64_t first, int64_t count, const char* g, int64_t g_row, char* scratch_rows, int64_t row,
             int64_t index) const {
    GemmTile t = product_;
    t.a = g;
    t.a_row = g_row;
    t.rows = count;
    const int64_t at = first * in_ * storage_size(storage_);
    char* const dx = gradients_.x ? mutable_bytes_of(*gradients_.x) + at : nullptr;
    const bool direct = a_.as_stored();
    t.y = direct ? dx : scratch_rows;
    t.y_row = direct ? in_ : row;
    if (direct) t.y_storage = storage_;
    multiply(table_, t);
    if (direct) return;
    GradInputTile e{};
    e.grad = scratch_rows;
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

  void add_bias(const char* g, int64_t g_row, int64_t count, int64_t index) const {
    // Sums of a tile beside those of the tiles before, as two rows that are added.
    char* const two = scratch(Slot::sums, 2 * out_ * scalar_);
    char* const to = sums(index) + 2 * in_ * scalar_;
    std::memcpy(two, to, out_ * scalar_);
    ChannelSumsTile t{};
    t.x = g;
    t.x_pixel = g_row;
    t.channels = out_;
    t.pixels = count;
    t.run = ChannelSumsTile::kRun;
    t.factor = 1;
    t.sums = two + out_ * scalar_;
    table_.channel_sums[static_cast<int>(compute_storage(storage_))](t);
    add_rows(table_, storage_, two, 2, out_, 1, to);
  }

  char* sums(int64_t range) const { return mutable_bytes_of(*sums_) + range * (2 * in_ + out_) * scalar_; }
  char* part(int64_t range) const { return mutable_bytes_of(*parts_) + range * in_ * out_ * scalar_; }

  Tensor totals() const {
    Tensor total = torch::stable::empty(Ints{2 * in_ + out_}, compute_dtype(storage_), std::nullopt, of_.x.device());
    add_rows(table_, storage_, cpu::bytes_of(*sums_), sums_->size(0), 2 * in_ + out_, 1, mutable_bytes_of(total));
    return total;
  }

  // The parts of dW, added in their order.
  Tensor weight() const {
    const int64_t rows = rows_->channels, cols = cols_->channels, ranges = parts_->size(0);
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
    return transposed_ ? torch::stable::contiguous(torch::stable::transpose(sum, 0, 1)) : sum;
  }
};

}  // namespace

void pointwise_gradients(const PointwiseGradientsOf& of, PointwiseGradients& gradients) { Op(of, gradients).run(); }

}  // namespace cnnfast::cpu
