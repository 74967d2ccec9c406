// scale_shift and scale_shift_excite on the CPU: what is left of batch normalisation, activation, residual and squeeze-excite
// between convolutions that are trained.
// Tiling: rows of an image that make kPartBytes a task. Sums of a task's rows by themselves, added up in order: their bits
// don't depend on who summed what.
// Bytes: forward x (and residual) once, y written once; backward grad, x (and residual) once, dx (and dresidual) written once.
// With squeeze-excite x, and backward grad, once more: the gates come of sums over a whole image.
#include "scale_shift.h"

#include "ops.h"
#include "squeeze_excite.h"

namespace cnnfast::cpu {

namespace {

const char* bytes_or_null(const Maybe& t) { return t ? bytes_of(*t) : nullptr; }

// Row n of (N, C, 1, 1).
const char* row_of(const Maybe& t, int64_t n) {
  return t ? bytes_of(*t) + n * t->size(1) * static_cast<int64_t>(t->element_size()) : nullptr;
}

// y = activation(x * scale + shift + residual) * gates
Tensor forward(const Scaled& of, const Maybe& residual, const Maybe& gates) {
  const Storage storage = storage_of(of.x, "x");
  const ImageParts parts(of.x);
  const Tensor y =
      empty_channels_last(of.x, of.x.size(0), of.x.size(1), of.x.size(2), of.x.size(3), of.x.scalar_type());
  for_each(parts.count(), [&](int64_t i) {
    ScaleTile t{};
    t.x = bytes_of(of.x) + parts.offset(i);
    t.scale = bytes_or_null(of.scale);
    t.shift = bytes_or_null(of.shift);
    t.residual = residual ? bytes_of(*residual) + parts.offset(i) : nullptr;
    t.gate = row_of(gates, parts.image(i));
    t.y = mutable_bytes_of(y) + parts.offset(i);
    t.x_pixel = t.y_pixel = t.channels = parts.rows.channels;
    t.y_storage = storage;
    t.pixels = parts.pixels(i);
    t.activation = activation(of.activation);
    kernels(storage).scale_channels[static_cast<int>(storage)](t);
  });
  return y;
}

}  // namespace

Scaled::Scaled(const Tensor& x, const Maybe& scale, const Maybe& shift, int64_t activation)
    : x(channels_last(x)), scale(contiguous(scale)), shift(contiguous(shift)), activation(activation) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (N, C, H, W), got ", x.dim());
  check_scale_shift(scale, shift, x);
}

ScaledGradients scale_shift_gradients(const Tensor& grad, const Scaled& of, const Maybe& residual, const Maybe& gates,
                                      const Maybe& mean_grads, bool wants_x, bool wants_residual) {
  const Storage storage = storage_of(of.x, "x");
  const ImageParts parts(of.x);
  const auto image = [&](bool wanted) {
    return wanted
               ? empty_channels_last(of.x, of.x.size(0), of.x.size(1), of.x.size(2), of.x.size(3), of.x.scalar_type())
               : no_gradient(of.x);
  };
  const Tensor dx = image(wants_x), dresidual = image(wants_residual);
  const PartSums sums(of.x, parts), sums_by_x(of.x, parts);
  for_each(parts.count(), [&](int64_t i) {
    ScaleShiftGradTile t{};
    t.grad = bytes_of(grad) + parts.offset(i);
    t.x = bytes_of(of.x) + parts.offset(i);
    t.scale = bytes_or_null(of.scale);
    t.shift = bytes_or_null(of.shift);
    t.residual = residual ? bytes_of(*residual) + parts.offset(i) : nullptr;
    t.gate = row_of(gates, parts.image(i));
    t.mean_grad = row_of(mean_grads, parts.image(i));
    t.dx = wants_x ? mutable_bytes_of(dx) + parts.offset(i) : nullptr;
    t.dresidual = wants_residual ? mutable_bytes_of(dresidual) + parts.offset(i) : nullptr;
    t.sum = sums.of(i);
    t.sum_by_x = sums_by_x.of(i);
    t.pixels = parts.pixels(i);
    t.channels = parts.rows.channels;
    t.activation = activation(of.activation);
    kernels(storage).scale_shift_grad[static_cast<int>(storage)](t);
  });
  return {dx, dresidual, sums_by_x.total(), sums.total()};
}

namespace {

// The means of activation(x * scale + shift), and the sums of their products with grad, (N, C, 1, 1).
struct Squeezed {
  Tensor means;
  Maybe by_grad;
};
Squeezed squeezed(const Scaled& of, const Maybe& grad) {
  const Storage storage = storage_of(of.x, "x");
  const ImageParts parts(of.x);
  const PartSums sums(of.x, parts);
  const auto by_grad = grad ? std::optional<PartSums>(PartSums(of.x, parts)) : std::nullopt;
  for_each(parts.count(), [&](int64_t i) {
    ScaleShiftSumsTile t{};
    t.x = bytes_of(of.x) + parts.offset(i);
    t.scale = bytes_or_null(of.scale);
    t.shift = bytes_or_null(of.shift);
    t.grad = grad ? bytes_of(*grad) + parts.offset(i) : nullptr;
    t.sum = sums.of(i);
    t.sum_by_grad = by_grad ? by_grad->of(i) : nullptr;
    t.pixels = parts.pixels(i);
    t.channels = parts.rows.channels;
    t.activation = activation(of.activation);
    kernels(storage).scale_shift_sums[static_cast<int>(storage)](t);
  });
  const double pixels = static_cast<double>(parts.rows.height * parts.rows.width);
  return {sums.by_image(1 / pixels), by_grad ? Maybe(by_grad->by_image(1)) : std::nullopt};
}

ExciteTensors excite_of(const Tensor& x, const Tensor& reduce_weight, const Maybe& reduce_bias,
                        const Tensor& expand_weight, const Maybe& expand_bias, int64_t activation_code,
                        int64_t gate_activation) {
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  return {to_dtype(reduce_weight, dtype),
          to_dtype(reduce_bias, dtype),
          to_dtype(expand_weight, dtype),
          to_dtype(expand_bias, dtype),
          activation_code,
          gate_activation};
}

}  // namespace

Tensor scale_shift(Tensor x, Tensor scale, Tensor shift, Maybe residual, int64_t activation_code, int64_t backend) {
  check_backend(backend);
  const Scaled of(x, scale, shift, activation_code);
  check_residual(residual, x, x.size(0), x.size(1), x.size(2), x.size(3));
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  return in_format_of(x, forward(of, rs, std::nullopt));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scale_shift_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift,
                                                                Maybe residual, int64_t activation_code,
                                                                int64_t output_mask, int64_t backend) {
  check_backend(backend);
  const Scaled of(x, scale, shift, activation_code);
  check_residual(grad, x, x.size(0), x.size(1), x.size(2), x.size(3));
  check_residual(residual, x, x.size(0), x.size(1), x.size(2), x.size(3));
  const Maybe rs = residual ? Maybe(channels_last(*residual)) : std::nullopt;
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  const ScaledGradients g =
      scale_shift_gradients(channels_last(grad), of, rs, std::nullopt, std::nullopt, bit(0), bit(3) && residual);
  return {bit(0) ? image_gradient(x, g.x) : g.x, bit(1) ? g.scale : no_gradient(scale),
          bit(2) ? g.shift : no_gradient(shift),
          bit(3) && residual ? image_gradient(*residual, g.residual) : no_gradient(x)};
}

Tensor scale_shift_excite(Tensor x, Tensor scale, Tensor shift, Tensor reduce_weight, Maybe reduce_bias,
                          Tensor expand_weight, Maybe expand_bias, int64_t activation_code, int64_t se_activation,
                          int64_t gate_activation, int64_t backend) {
  check_backend(backend);
  const Scaled of(x, scale, shift, activation_code);
  const ExciteTensors excite =
      excite_of(x, reduce_weight, reduce_bias, expand_weight, expand_bias, se_activation, gate_activation);
  if (x.numel() == 0) return in_format_of(x, forward(of, std::nullopt, std::nullopt));
  return in_format_of(x, forward(of, std::nullopt, excite.of_means(squeezed(of, std::nullopt).means).gates));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scale_shift_excite_backward(
    Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor reduce_weight, Maybe reduce_bias, Tensor expand_weight,
    Maybe expand_bias, int64_t activation_code, int64_t se_activation, int64_t gate_activation, int64_t output_mask,
    int64_t backend) {
  check_backend(backend);
  const Scaled of(x, scale, shift, activation_code);
  check_residual(grad, x, x.size(0), x.size(1), x.size(2), x.size(3));
  const ExciteTensors excite =
      excite_of(x, reduce_weight, reduce_bias, expand_weight, expand_bias, se_activation, gate_activation);
  const Tensor g = channels_last(grad);
  const Squeezed sums = squeezed(of, g);
  const ExciteTensors::Forward kept = excite.of_means(sums.means);
  const auto [dreduce, dreduce_bias, dexpand, dexpand_bias, share] =
      excite.of_gates(*sums.by_grad, kept, x.size(2) * x.size(3), output_mask >> 3);
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  const ScaledGradients gradients = scale_shift_gradients(g, of, std::nullopt, kept.gates, share, bit(0), false);
  const auto like = [](const Tensor& gradient, const Maybe& of, const Tensor& otherwise) {
    return to_dtype(gradient, of ? of->scalar_type() : otherwise.scalar_type());
  };
  return {bit(0) ? image_gradient(x, gradients.x) : gradients.x,
          bit(1) ? gradients.scale : no_gradient(scale),
          bit(2) ? gradients.shift : no_gradient(shift),
          to_dtype(dreduce, reduce_weight.scalar_type()),
          like(dreduce_bias, reduce_bias, x),
          to_dtype(dexpand, expand_weight.scalar_type()),
          like(dexpand_bias, expand_bias, x)};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("scale_shift", TORCH_BOX(&cnnfast::cpu::scale_shift));
  m.impl("scale_shift_backward", TORCH_BOX(&cnnfast::cpu::scale_shift_backward));
  m.impl("scale_shift_excite", TORCH_BOX(&cnnfast::cpu::scale_shift_excite));
  m.impl("scale_shift_excite_backward", TORCH_BOX(&cnnfast::cpu::scale_shift_excite_backward));
}
