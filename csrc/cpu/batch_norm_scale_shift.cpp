// batch_norm_scale_shift on the CPU: a few numbers a channel, in float64: mean^2 taken from the mean of squares loses as many
// digits as mean^2 is larger than the variance.
#include "common.h"

#include <cmath>

namespace cnnfast::cpu {

namespace {

// Of one channel.
struct Statistics {
  double mean, var, rstd;
  Statistics(double sum, double squares, double count, double eps)
      : mean(sum / count),
        var(std::max(squares / count - mean * mean, 0.0)),  // below 0 by rounding alone
        rstd(1 / std::sqrt(var + eps)) {}
};

template <class S>
const S* scalars_of(const Maybe& t) {
  return t ? static_cast<const S*>(t->const_data_ptr()) : nullptr;
}

// f(S{}) for the dtype of `like`.
template <class F>
void with_dtype(const Tensor& like, const F& f) {
  if (like.scalar_type() == ScalarType::Double)
    f(double{});
  else
    f(float{});
}

double values_per_channel(const Tensor& y) { return static_cast<double>(y.size(0) * y.size(2) * y.size(3)); }

void check(const Tensor& y, const std::vector<Maybe>& rows) {
  const ScalarType dtype = compute_dtype(storage_of(y, "y"));
  for (const Maybe& row : rows)
    STD_TORCH_CHECK(!row || (row->dim() == 1 && row->size(0) == y.size(1) && row->scalar_type() == dtype),
                    "sum, squares, weight, bias and their gradients must have shape (", y.size(1),
                    ",) and the compute type's dtype");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_scale_shift(Tensor y, Tensor sum, Tensor squares, Maybe weight,
                                                                  Maybe bias, double eps, int64_t backend) {
  check_backend(backend);
  check(y, {sum, squares, weight, bias});
  const double count = values_per_channel(y);
  const auto like = [&] { return torch::stable::empty_like(sum); };
  Tensor scale = like(), shift = like(), mean = like(), var = like();
  const Tensor sums = torch::stable::contiguous(sum), of_squares = torch::stable::contiguous(squares);
  const Maybe weights = contiguous(weight), biases = contiguous(bias);
  with_dtype(sum, [&](auto zero) {
    using S = decltype(zero);
    const auto out = [](const Tensor& t) { return static_cast<S*>(t.mutable_data_ptr()); };
    const S *const s = scalars_of<S>(sums), *const q = scalars_of<S>(of_squares);
    const S *const w = scalars_of<S>(weights), *const b = scalars_of<S>(biases);
    S *const of_scale = out(scale), *const of_shift = out(shift), *const of_mean = out(mean), *const of_var = out(var);
    for (int64_t c = 0; c < y.size(1); ++c) {
      const Statistics channel(s[c], q[c], count, eps);
      const double factor = (w ? w[c] : 1) * channel.rstd;
      of_scale[c] = static_cast<S>(factor);
      of_shift[c] = static_cast<S>((b ? b[c] : 0) - channel.mean * factor);
      of_mean[c] = static_cast<S>(channel.mean);
      of_var[c] = static_cast<S>(channel.var * (count / (count - 1)));
    }
  });
  return {scale, shift, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_scale_shift_backward(Tensor grad_scale, Tensor grad_shift,
                                                                           Tensor y, Tensor sum, Tensor squares,
                                                                           Maybe weight, double eps, int64_t backend) {
  check_backend(backend);
  check(y, {grad_scale, grad_shift, sum, squares, weight});
  const double count = values_per_channel(y);
  const auto like = [&] { return torch::stable::empty_like(sum); };
  Tensor dsum = like(), dsquares = like(), dweight = like(), dbias = like();
  const Tensor sums = torch::stable::contiguous(sum), of_squares = torch::stable::contiguous(squares);
  const Tensor of_scale = torch::stable::contiguous(grad_scale), of_shift = torch::stable::contiguous(grad_shift);
  const Maybe weights = contiguous(weight);
  with_dtype(sum, [&](auto zero) {
    using S = decltype(zero);
    const auto out = [](const Tensor& t) { return static_cast<S*>(t.mutable_data_ptr()); };
    const S *const s = scalars_of<S>(sums), *const q = scalars_of<S>(of_squares), *const w = scalars_of<S>(weights);
    const S *const dscale = scalars_of<S>(of_scale), *const dshift = scalars_of<S>(of_shift);
    S *const ds = out(dsum), *const dq = out(dsquares), *const dw = out(dweight), *const db = out(dbias);
    for (int64_t c = 0; c < y.size(1); ++c) {
      const Statistics channel(s[c], q[c], count, eps);
      const double gamma = w ? w[c] : 1, of_factor = dscale[c] - dshift[c] * channel.mean;
      // Where all values are alike the variance is at its minimum.
      const double of_var = channel.var > 0 ? -0.5 * of_factor * gamma * std::pow(channel.rstd, 3) : 0;
      ds[c] = static_cast<S>((-dshift[c] * gamma * channel.rstd - 2 * channel.mean * of_var) / count);
      dq[c] = static_cast<S>(of_var / count);
      dw[c] = static_cast<S>(of_factor * channel.rstd);
      db[c] = dshift[c];
    }
  });
  return {dsum, dsquares, dweight, dbias};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("batch_norm_scale_shift", TORCH_BOX(&cnnfast::cpu::batch_norm_scale_shift));
  m.impl("batch_norm_scale_shift_backward", TORCH_BOX(&cnnfast::cpu::batch_norm_scale_shift_backward));
}
