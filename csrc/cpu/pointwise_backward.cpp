// The gradients of a pointwise convolution: g, the product's input a and a's gradient da are only ever tiles in L2.
// Tiling: a task is a range of pixels of all images, a few at a time: g and a as operands, da = g W, from it dx and the
// sums of scale and shift, and the range's own part of dW = sum of g (x) a. Where the weights are many, dW is made in a
// second pass, whose tasks are blocks of it and ranges of pixels. All follow from the shape alone, and parts are added in
// their order: the same bits on any number of threads.
// Bytes: grad, y and x read once (with many weights twice), dx written once.
#include "pointwise_backward_walk.h"

#include "ops.h"

namespace cnnfast::cpu {

namespace {

// Of dW, as many bytes as stay in L2 beside a tile of pixels; of all its parts.
constexpr int64_t kWeightBytes = 256 * 1024, kPartBytes = 1024 * 1024;

// Part i of `parts` even ones, in multiples of `unit`.
Range part_of(int64_t all, int64_t parts, int64_t i, int64_t unit = 1) {
  const int64_t units = ceil_div(all, unit);
  return {std::min(all, units * i / parts * unit), std::min(all, units * (i + 1) / parts * unit)};
}

const char* bytes_of(const Maybe& t) { return t ? cpu::bytes_of(*t) : nullptr; }

}  // namespace

OperandTile Side::tile(int64_t first, int64_t pixels, int64_t channel, int64_t count) const {
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

PointwiseBackward::PointwiseBackward(const PointwiseGradientsOf& of, PointwiseGradients& gradients)
    : of(of),
      gradients(gradients),
      storage(storage_of(of.x, "x")),
      table(kernels(storage)),
      scalar(compute_size(storage)),
      pixels(of.x.size(0) * of.x.size(2) * of.x.size(3)),
      in(of.x.size(1)),
      out(of.grad.size(1)),
      g{storage_of(of.grad, "grad"),
        cpu::bytes_of(of.y ? *of.y : of.grad),
        of.y ? cpu::bytes_of(of.grad) : nullptr,
        bytes_of(of.twice_grad_squares),
        bytes_of(of.grad_sum),
        out,
        0},
      a{storage, cpu::bytes_of(of.x), nullptr, bytes_of(of.scale), bytes_of(of.shift), in, of.pre_activation},
      g_left(out <= in || in * out * scalar > kWeightBytes),
      by(how()),
      operands(by == By::bf16 ? Storage::bf16 : compute_storage(storage)),
      input_wanted(gradients.x_wanted || gradients.scale_wanted || gradients.shift_wanted),
      tile(by == By::fma    ? 128
           : by == By::bf16 ? 256
                            : 160) {}

void PointwiseBackward::run() {
  if (by != By::fma) no_bias = zeros({round_up(std::max(in, out), kPanel)});
  if (input_wanted) pack_weight();
  if (gradients.x_wanted)
    gradients.x = empty_channels_last(of.x, of.x.size(0), in, of.x.size(2), of.x.size(3), of.x.scalar_type());
  const bool any_sums = gradients.scale_wanted || gradients.shift_wanted || gradients.bias_wanted;
  const bool first_pass = input_wanted || gradients.bias_wanted;
  const int64_t weights = in * out * scalar, tiles = std::max<int64_t>(1, pixels / tile);
  const bool together = weights <= kWeightBytes;
  const int64_t ranges = together
                             ? std::min(tiles, std::clamp<int64_t>(kPartBytes / std::max<int64_t>(1, weights), 4, 16))
                             : std::min<int64_t>(tiles, 64);
  if (any_sums) sums = zeros({ranges, 2 * in + out});
  const auto each_range = [&](bool weight, Range rows, Range cols) {
    for_each(ranges, [&](int64_t i) { walk(*this, {part_of(pixels, ranges, i), i, first_pass, weight, rows, cols}); });
  };
  if (together) {
    if (gradients.weight_wanted) parts = parts_of(ranges);
    each_range(gradients.weight_wanted, {0, left().channels}, {0, right().channels});
  } else {
    if (first_pass) each_range(false, {}, {});
    if (gradients.weight_wanted) weight_in_blocks(tiles);
  }
  if (gradients.weight_wanted) gradients.weight = weight();
  if (!any_sums) return;
  Tensor total = totals();
  const auto take = [&](bool wanted, Maybe& to, int64_t first, int64_t count) {
    if (wanted) to = torch::stable::clone(torch::stable::narrow(total, 0, first, count));
  };
  take(gradients.shift_wanted, gradients.shift, 0, in);
  take(gradients.scale_wanted, gradients.scale, in, in);
  take(gradients.bias_wanted, gradients.bias, 2 * in, out);
}

By PointwiseBackward::how() const {
  const bool stored = g.as_stored() && a.as_stored();
  if (table.gemm_bf16 && storage == Storage::bf16 && g.storage == Storage::bf16 && (of.may_round || stored))
    return By::bf16;
  // Enough channels to be worth splitting the other side's.
  constexpr int64_t kChannels = 96;
  return table.gemm_planes && storage != Storage::f64 && std::min(in, out) >= kChannels ? By::planes : By::fma;
}

Tensor PointwiseBackward::zeros(const Ints& size) const {
  Tensor t = torch::stable::empty(size, compute_dtype(storage), std::nullopt, of.x.device());
  torch::stable::zero_(t);
  return t;
}

Tensor PointwiseBackward::parts_of(int64_t ranges) const {
  const Ints size{ranges, in * out};
  return pixels == 0 ? zeros(size) : torch::stable::empty(size, compute_dtype(storage), std::nullopt, of.x.device());
}

// W^T for da = g W: a panel holds channels of a, its depth is g's: rows of the weight as operands have them.
void PointwiseBackward::pack_weight() {
  const Tensor weight = torch::stable::contiguous(of.weight, MemoryFormat::Contiguous);
  const Side side{storage_of(weight, "weight"), cpu::bytes_of(weight), nullptr, nullptr, nullptr, in, 0};
  const int64_t depth = by == By::bf16 ? round_up(out, kPairDepth) : out, panels = ceil_div(in, kPanel);
  packed = torch::stable::empty(Ints{panels * depth * kPanel * storage_size(operands)}, ScalarType::Byte, std::nullopt,
                                weight.device());
  char* const to = mutable_bytes_of(*packed);
  constexpr int64_t kTogether = 8;
  for_each(out ? ceil_div(panels, kTogether) : 0, [&](int64_t i) {
    const int64_t channel = i * kTogether * kPanel;
    OperandTile t = side.tile(0, out, channel, std::min(kTogether * kPanel, in - channel));
    t.panel = depth * kPanel;
    t.panels = to + i * kTogether * t.panel * storage_size(operands);
    operand(side, t);
  });
  product.a_depth = 1;
  product.b = to;
  product.b_panel = depth * kPanel;
  product.bias = by == By::fma ? nullptr : no_bias->const_data_ptr();
  product.a_storage = product.b_storage = operands;
  product.y_storage = compute_storage(storage);
  product.depth = out;
  product.cols = in;
  product.activation = activation(0);
  product.in_planes = by == By::planes;
}

void PointwiseBackward::operand(const Side& side, const OperandTile& t) const {
  if (!t.rows && !t.panels && !t.columns) return;
  by == By::bf16 ? table.operand_bf16(t) : table.operand[static_cast<int>(side.storage)](t);
}

void PointwiseBackward::weight_in_blocks(int64_t tiles) {
  // Blocks of dW that stay in L2, and ranges of pixels so that there are some tasks.
  constexpr int64_t kSide = 384, kTasks = 8;
  const int64_t row_parts = ceil_div(left().channels, kSide), col_parts = ceil_div(right().channels, kSide),
                blocks = row_parts * col_parts, ranges = std::min(tiles, ceil_div(kTasks, blocks));
  parts = parts_of(ranges);
  for_each(blocks * ranges, [&](int64_t i) {
    const int64_t r = i / blocks, row = i % blocks / col_parts, col = i % col_parts;
    walk(*this, {part_of(pixels, ranges, r), r, false, true, part_of(left().channels, row_parts, row, kPanel),
                 part_of(right().channels, col_parts, col, 2 * kPanel)});
  });
}

Tensor PointwiseBackward::totals() const {
  Tensor total = torch::stable::empty(Ints{2 * in + out}, compute_dtype(storage), std::nullopt, of.x.device());
  add_rows(table, storage, cpu::bytes_of(*sums), sums->size(0), 2 * in + out, 1, mutable_bytes_of(total));
  return total;
}

// The parts of dW, added in their order.
Tensor PointwiseBackward::weight() const {
  const int64_t rows = left().channels, cols = right().channels, ranges = parts->size(0);
  Tensor sum = torch::stable::empty(Ints{rows, cols, 1, 1}, compute_dtype(storage), std::nullopt, of.x.device());
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
  if (scalar == 8)
    add_parts(static_cast<double*>(sum.mutable_data_ptr()), static_cast<const double*>(parts->const_data_ptr()));
  else
    add_parts(static_cast<float*>(sum.mutable_data_ptr()), static_cast<const float*>(parts->const_data_ptr()));
  if (g_left) return sum;
  Tensor turned = torch::stable::empty(Ints{cols, rows, 1, 1}, sum.scalar_type(), std::nullopt, sum.device());
  torch::stable::copy_(turned, torch::stable::transpose(sum, 0, 1));
  return turned;
}

void PointwiseGradientsOf::with_sums(const Tensor& sum, const Tensor& squares, const Tensor& image) {
  const ScalarType dtype = compute_dtype(storage_of(image, "y"));
  y = channels_last(image);
  grad_sum = torch::stable::contiguous(to_dtype(sum, dtype));
  twice_grad_squares = twice(to_dtype(squares, dtype));
}

Tensor PointwiseGradients::of(const Tensor& parameter, const Maybe& gradient) {
  return gradient ? weight_gradient(parameter, *gradient) : no_gradient(parameter);
}

void pointwise_backward(const PointwiseGradientsOf& of, PointwiseGradients& gradients) {
  PointwiseBackward(of, gradients).run();
}

}  // namespace cnnfast::cpu
