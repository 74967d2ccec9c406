// squeeze_excite on the CPU: y = post_activation(x * gates + residual), gates from the means of x's channels.
// Tiling: an image a task. Its rows' sums first, then two products of one row, then the rows again, scaled; idle threads
// (one image) help with rows. The sums are added up row after row, so that the bits don't depend on who summed what.
// Bytes: x twice (the second time from the cache, where an image fits), residual once, y written once.
#include "squeeze_excite.h"

#include "channels.h"
#include "ops.h"
#include "stages.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kGateChain = 32;            // channels
constexpr int64_t kSharedBytes = 128 * 1024;  // of a product's weights

}  // namespace

void Excite::gates(const Worker& worker, const KernelTable& table, Storage storage, const char* row_sums, int64_t rows,
                   int64_t pixels, char* gates) const {
  const Storage compute = compute_storage(storage);
  const int64_t itemsize = compute_size(storage);
  char* const mean = scratch(Slot::excite, (reduce.in + round_up(reduce.out, kPanel)) * itemsize);
  char* const hidden = mean + reduce.in * itemsize;
  add_rows(table, storage, row_sums, rows, reduce.in, 1.0 / static_cast<double>(pixels), mean);
  // Short chains that are added up: there is little to do, and a gate's error is the same for a whole channel.
  const auto product = [&](const PointwiseWeights& weights, const char* from, char* to, int64_t activation_code) {
    GemmTile whole = packed_gemm(weights, compute, compute, activation_code);
    whole.rows = 1;
    const auto columns = [&](int64_t first, int64_t count) {
      const GemmTile part = columns_of(whole, first, count);
      for (int64_t k = 0; k < weights.in; k += kGateChain) {
        GemmTile g = part;
        g.depth = std::min(kGateChain, weights.in - k);
        g.a = from + k * itemsize;
        g.b = static_cast<const char*>(part.b) + k * kPanel * itemsize;
        g.y = to + first * itemsize;
        if (k > 0) {
          g.bias = nullptr;
          g.residual = g.y;
        }
        if (k + g.depth < weights.in) g.activation = cpu::activation(0);
        multiply(table, g);
      }
    };
    // Weights that are slow to read: idle threads help with them.
    const int64_t at_once = weights.in * weights.out * itemsize > kSharedBytes ? 4 * kPanel : weights.out;
    worker.each_part(ceil_div(weights.out, at_once),
                     [&](int64_t k) { columns(k * at_once, std::min(at_once, weights.out - k * at_once)); });
  };
  product(reduce, mean, hidden, activation);
  product(expand, hidden, gates, gate_activation);
}

Tensor squeeze_excite_packed(Tensor x, Tensor packed, Maybe residual, int64_t activation_code, int64_t gate_activation,
                             int64_t post_activation, int64_t backend) {
  check_backend(backend);
  const Storage storage = storage_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (N, C, H, W), got ", x.dim());
  check_residual(residual, x, x.size(0), x.size(1), x.size(2), x.size(3));
  PackedReader reader(packed, PackedOp::squeeze_excite, x, x.size(1), x.size(1), 1, 1);
  const int64_t squeezed = reader.header().squeezed_channels;
  const PointwiseWeights reduce = reader.excite(x.size(1), squeezed);
  const Excite excite{reduce, reader.excite(squeezed, x.size(1)), activation_code, gate_activation};

  const Tensor xs = channels_last(x);
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  const Rows rows = rows_of(x);
  Tensor y = empty_channels_last(x, x.size(0), rows.channels, rows.height, rows.width, x.scalar_type());
  const KernelTable& table = kernels(storage);
  ScaleTile whole{};
  whole.x_pixel = whole.y_pixel = whole.channels = rows.channels;
  whole.y_storage = storage;
  whole.activation = activation(post_activation);
  const int64_t itemsize = compute_size(storage);
  for_each(y.numel() ? x.size(0) : 0, [&](const Worker& worker, int64_t n) {
    const int64_t image = n * rows.height * rows.bytes();
    char* const row_sums = scratch(Slot::sums, (rows.height + 1) * rows.channels * itemsize);
    char* const gates = row_sums + rows.height * rows.channels * itemsize;
    worker.each_part(rows.parts(), [&](int64_t k) {
      const auto [begin, end] = rows[k];
      sum_rows(table, storage, rows, bytes_of(xs) + image, nullptr, begin, end, row_sums);
    });
    excite.gates(worker, table, storage, row_sums, rows.height, rows.height * rows.width, gates);
    worker.each_part(rows.parts(), [&](int64_t k) {
      const auto [begin, end] = rows[k];
      const int64_t first = image + begin * rows.bytes();
      ScaleTile t = whole;
      t.x = bytes_of(xs) + first;
      t.scale = gates;
      t.residual = rs ? bytes_of(*rs) + first : nullptr;
      t.y = mutable_bytes_of(y) + first;
      t.pixels = (end - begin) * rows.width;
      table.scale_channels[static_cast<int>(storage)](t);
    });
  });
  return in_format_of(x, y);
}

Tensor squeeze_excite(Tensor x, Tensor reduce_weight, Maybe reduce_bias, Tensor expand_weight, Maybe expand_bias,
                      Maybe residual, int64_t activation_code, int64_t gate_activation, int64_t post_activation,
                      int64_t backend) {
  STD_TORCH_CHECK(reduce_weight.scalar_type() == x.scalar_type() && expand_weight.scalar_type() == x.scalar_type(),
                  "reduce_weight and expand_weight must have x's dtype");
  const Tensor packed = pack_squeeze_excite(reduce_weight, reduce_bias, expand_weight, expand_bias);
  return squeeze_excite_packed(x, packed, residual, activation_code, gate_activation, post_activation, backend);
}

ExciteTensors::Forward ExciteTensors::forward(const Tensor& x) const {
  return of_means(channel_sums(x, std::nullopt, 1.0 / static_cast<double>(x.size(2) * x.size(3))));
}

ExciteTensors::Forward ExciteTensors::of_means(const Tensor& mean) const {
  const Ints unit{1, 1};
  const Tensor hidden =
      pointwise_conv2d(mean, reduce_weight, reduce_bias, std::nullopt, std::nullopt, unit, activation, 0);
  return {mean, hidden,
          pointwise_conv2d(hidden, expand_weight, expand_bias, std::nullopt, std::nullopt, unit, gate_activation, 0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ExciteTensors::backward(const Tensor& grad, const Tensor& x,
                                                                           const Forward& kept,
                                                                           int64_t output_mask) const {
  auto [dreduce, dreduce_bias, dexpand, dexpand_bias, share] =
      of_gates(channel_sums(grad, x, 1), kept, x.size(2) * x.size(3), output_mask);
  return {dreduce, dreduce_bias, dexpand, dexpand_bias, scaled_channels(grad, kept.gates, share, std::nullopt, 0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ExciteTensors::of_gates(const Tensor& dgates, const Forward& kept,
                                                                           int64_t pixels, int64_t output_mask) const {
  const Ints unit{1, 1};
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  const auto backward = [&](const Tensor& grad, const Tensor& x, const Tensor& weight, const Maybe& bias, int64_t code,
                            int64_t mask) {
    return pointwise_conv2d_backward(grad, x, weight, bias, std::nullopt, std::nullopt, unit, code, mask, 0);
  };
  const auto [dhidden, dexpand, dexpand_bias, no_gate, no_residual] =
      backward(dgates, kept.hidden, expand_weight, expand_bias, gate_activation, 1 | bit(2) << 1 | bit(3) << 2);
  const auto [dmean, dreduce, dreduce_bias, none, nothing] =
      backward(dhidden, kept.mean, reduce_weight, reduce_bias, activation, 1 | bit(0) << 1 | bit(1) << 2);
  // A mean hands the same share of its gradient to each pixel.
  const Tensor share = channel_sums(dmean, std::nullopt, 1.0 / static_cast<double>(pixels));
  return {dreduce, dreduce_bias, dexpand, dexpand_bias, share};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward(
    Tensor grad, Tensor x, Tensor reduce_weight, Maybe reduce_bias, Tensor expand_weight, Maybe expand_bias,
    Maybe residual, int64_t activation_code, int64_t gate_activation, int64_t post_activation, int64_t output_mask,
    int64_t backend) {
  check_backend(backend);
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  const Tensor xs = channels_last(to_dtype(x, dtype));
  const ExciteTensors excite{to_dtype(reduce_weight, dtype),
                             to_dtype(reduce_bias, dtype),
                             to_dtype(expand_weight, dtype),
                             to_dtype(expand_bias, dtype),
                             activation_code,
                             gate_activation};
  check_residual(grad, grad, x.size(0), x.size(1), x.size(2), x.size(3));
  Tensor g = channels_last(to_dtype(grad, dtype));
  const ExciteTensors::Forward kept = excite.forward(xs);
  if (post_activation != 0) {
    const Maybe rs = residual ? Maybe(channels_last(to_dtype(*residual, dtype))) : std::nullopt;
    g = activation_backward(g, scaled_channels(xs, kept.gates, std::nullopt, rs, 0), post_activation);
  }
  const auto [dreduce, dreduce_bias, dexpand, dexpand_bias, dx] = excite.backward(g, xs, kept, output_mask >> 1);
  const auto like = [](const Tensor& gradient, const Maybe& of, const Tensor& otherwise) {
    return to_dtype(gradient, of ? of->scalar_type() : otherwise.scalar_type());
  };
  return {bit(0) ? image_gradient(x, dx) : no_gradient(x),
          to_dtype(dreduce, reduce_weight.scalar_type()),
          like(dreduce_bias, reduce_bias, reduce_weight),
          to_dtype(dexpand, expand_weight.scalar_type()),
          like(dexpand_bias, expand_bias, expand_weight),
          bit(5) && residual ? image_gradient(*residual, g) : no_gradient(x)};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("squeeze_excite", TORCH_BOX(&cnnfast::cpu::squeeze_excite));
  m.impl("squeeze_excite_backward", TORCH_BOX(&cnnfast::cpu::squeeze_excite_backward));
  m.impl("squeeze_excite_packed", TORCH_BOX(&cnnfast::cpu::squeeze_excite_packed));
  m.impl("pack_squeeze_excite", TORCH_BOX(&cnnfast::cpu::pack_squeeze_excite));
}
