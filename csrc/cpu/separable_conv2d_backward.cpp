// The gradients of separable_conv2d, in either order, and of separable_conv2d_stats. The intermediate is computed again as
// the first stage's result, before mid_activation, and its gradient is made: two images of x's dtype; everything else is
// in the passes of the two stages' gradients.
#include <algorithm>

#include "depthwise_backward.h"
#include "ops.h"
#include "pointwise_backward.h"

namespace cnnfast::cpu {

namespace {

struct Geometry {
  Ints stride, padding, dilation;
  int64_t backend;
};
struct Weights {
  Tensor dw;
  Maybe dw_bias;
  Tensor pw;
  Maybe pw_bias;
};

// Gradients of x, dw_weight, dw_bias, pw_weight, pw_bias, scale and shift, where output_mask's bits ask for them. `of`: the
// pointwise stage's, but for what it reads and its weight.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The parameters' gradients, sums over images, of the compute type.
struct Sums {
  Maybe dw, dw_bias, pw, pw_bias, scale, shift;
};

void add(Maybe& sum, const Maybe& more) {
  if (!more) return;
  if (!sum) {
    sum = more;
    return;
  }
  const auto each = [&](auto* to, const auto* from) {
    for (int64_t i = 0; i < sum->numel(); ++i) to[i] += from[i];
  };
  if (sum->scalar_type() == ScalarType::Double)
    each(static_cast<double*>(sum->mutable_data_ptr()), static_cast<const double*>(more->const_data_ptr()));
  else
    each(static_cast<float*>(sum->mutable_data_ptr()), static_cast<const float*>(more->const_data_ptr()));
}

// The intermediate and its gradient, in memory that is kept for the next call: an allocator would map it anew, and the
// system zero it.
class Intermediates {
 public:
  explicit Intermediates(int64_t bytes) : bytes_(round_up(bytes, 64)), arena_(ImageArena::open(2 * bytes_)) {}
  ~Intermediates() { arena_.close(); }
  // What the next op makes is the intermediate, its gradient, or neither.
  void intermediate() { arena_.take(Place{0, bytes_}); }
  void gradient() { arena_.take(Place{bytes_, bytes_}); }
  void neither() { arena_.take(std::nullopt); }

 private:
  const int64_t bytes_;
  ImageArena& arena_;
};

// Of some images; dx is written, where there is one.
void depthwise_first(PointwiseGradientsOf of, const Tensor& x, const Weights& w, const Around& around,
                     const Geometry& at, int64_t output_mask, const Maybe& dx, Sums& sums,
                     Intermediates& intermediates) {
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  intermediates.intermediate();
  const Tensor mid =
      depthwise_conv2d_scaled(x, w.dw, w.dw_bias, prologue_of(around.scale, around.shift, around.pre_activation),
                              at.stride, at.padding, at.dilation);
  of.x = channels_last(mid);
  PointwiseGradients pointwise{};
  pointwise.x_wanted = output_mask & 0b1100111;
  pointwise.weight_wanted = bit(3);
  pointwise.bias_wanted = bit(4) && w.pw_bias;
  intermediates.gradient();
  pointwise_backward(of, pointwise);
  intermediates.neither();
  add(sums.pw, pointwise.weight);
  add(sums.pw_bias, pointwise.bias);
  if (!pointwise.x_wanted) return;
  const int64_t given = 3 | (w.dw_bias ? 4 : 0) | (around.scale ? 8 : 0) | (around.shift ? 16 : 0);
  const DepthwiseBackward depthwise(*pointwise.x, x, w.dw, w.dw_bias,
                                    conv_of(x, w.dw.size(2), w.dw.size(3), at.stride, at.padding, at.dilation), around,
                                    given & ((output_mask & 7) | bit(5) << 3 | bit(6) << 4), dx);
  const auto take = [&](Maybe& sum, int i, Sum which) {
    if (depthwise.wants(i)) add(sum, depthwise.sum(which));
  };
  take(sums.dw, 1, kWeight);
  take(sums.dw_bias, 2, kBias);
  take(sums.scale, 3, kScale);
  take(sums.shift, 4, kShift);
}

// By groups of images, so that what is kept stays small.
Gradients depthwise_first(const PointwiseGradientsOf& of, const Tensor& x, const Weights& w, const Maybe& scale,
                          const Maybe& shift, const Geometry& at, int64_t pre_activation, int64_t output_mask) {
  constexpr int64_t kGroupBytes = 64 * 1024 * 1024;
  const int64_t n = std::max<int64_t>(1, x.size(0)), pixels = of.grad.size(2) * of.grad.size(3);
  const int64_t image = pixels * w.dw.size(0) * storage_size(storage_of(x, "x"));
  const int64_t most = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, image));
  const int64_t group = ceil_div(n, ceil_div(n, most));
  Around around{};
  around.scale = contiguous(scale);
  around.shift = contiguous(shift);
  around.pre_activation = pre_activation;
  Maybe dx;
  if (output_mask & 1) dx = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type());
  Sums sums;
  Intermediates intermediates(group * image);
  for (int64_t first = 0; first < n; first += group) {
    const auto images = [&](Tensor t) {
      return group >= n ? t : torch::stable::narrow(t, 0, first, std::min(group, n - first));
    };
    const auto maybe_images = [&](const Maybe& t) { return t ? Maybe(images(*t)) : std::nullopt; };
    PointwiseGradientsOf some = of;
    some.grad = images(of.grad);
    some.y = maybe_images(of.y);
    some.weight = w.pw;
    depthwise_first(some, images(x), w, around, at, output_mask, maybe_images(dx), sums, intermediates);
  }
  const auto gradient = [&](const Maybe& parameter, const Maybe& sum) {
    return PointwiseGradients::of(parameter ? *parameter : x, sum);
  };
  return {dx ? *dx : no_gradient(x),  gradient(w.dw, sums.dw),           gradient(w.dw_bias, sums.dw_bias),
          gradient(w.pw, sums.pw),    gradient(w.pw_bias, sums.pw_bias), gradient(scale, sums.scale),
          gradient(shift, sums.shift)};
}

Gradients pointwise_first(const Tensor& grad, const Tensor& mid, const Tensor& x, const Weights& w, const Geometry& at,
                          int64_t pre_activation, int64_t mid_activation, int64_t output_mask) {
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  PointwiseGradients pointwise{};
  pointwise.x_wanted = bit(0);
  pointwise.weight_wanted = bit(3);
  pointwise.bias_wanted = bit(4) && w.pw_bias;
  const bool mid_wanted = pointwise.x_wanted || pointwise.weight_wanted || pointwise.bias_wanted;
  const auto [dmid, ddw, ddb] =
      depthwise_conv2d_backward(grad, mid, w.dw, w.dw_bias, at.stride, at.padding, at.dilation, mid_activation, 0,
                                (mid_wanted ? 1 : 0) | bit(1) << 1 | bit(2) << 2, at.backend);
  // Of x, what an activation curves would be a third rounding.
  constexpr int64_t kLastExact = 2;
  if (mid_wanted)
    pointwise_backward(
        {channels_last(dmid), {}, {}, {}, channels_last(x), w.pw, {}, {}, pre_activation, pre_activation <= kLastExact},
        pointwise);
  using G = PointwiseGradients;
  return {pointwise.x ? *pointwise.x : no_gradient(x),
          ddw,
          ddb,
          G::of(w.pw, pointwise.weight),
          G::of(w.pw_bias ? *w.pw_bias : w.pw, pointwise.bias),
          no_gradient(x),
          no_gradient(x)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_conv2d_backward(
    Tensor grad, Tensor x, Tensor dw_weight, Maybe dw_bias, Tensor pw_weight, Maybe pw_bias, Maybe residual,
    Ints stride, Ints padding, Ints dilation, bool first_is_pointwise, int64_t pre_activation, int64_t mid_activation,
    int64_t activation_code, int64_t output_mask, int64_t backend) {
  // Beneath an activation all is in the compute type: its slope is that of a result that isn't rounded. So it is where the
  // first stage's bias is wider than x: its gradient is the sum of the intermediate's.
  const Maybe& first_bias = first_is_pointwise ? pw_bias : dw_bias;
  const bool wide_bias = first_bias && first_bias->scalar_type() != x.scalar_type();
  const ScalarType dtype = activation_code || wide_bias ? compute_dtype(storage_of(x, "x")) : x.scalar_type();
  const Ints unit{1, 1};
  const Geometry at{stride, padding, dilation, backend};
  const Weights w{to_dtype(dw_weight, dtype), to_dtype(dw_bias, dtype), to_dtype(pw_weight, dtype),
                  to_dtype(pw_bias, dtype)};
  const Tensor xs = channels_last(to_dtype(x, dtype));
  Tensor g = channels_last(to_dtype(grad, dtype)), mid;
  const auto depthwise = [&](const Tensor& input, int64_t before, int64_t after) {
    return depthwise_conv2d(input, w.dw, w.dw_bias, stride, padding, dilation, before, after, backend);
  };
  if (first_is_pointwise)
    mid = pre_activation ? std::get<0>(pointwise_conv2d_stats(xs, w.pw, w.pw_bias, std::nullopt, std::nullopt, unit,
                                                              pre_activation, backend))
                         : pointwise_conv2d(xs, w.pw, w.pw_bias, std::nullopt, std::nullopt, unit, 0, backend);
  if (activation_code) {
    const Maybe rs = residual ? Maybe(channels_last(to_dtype(*residual, dtype))) : std::nullopt;
    Tensor z = first_is_pointwise ? channels_last(depthwise(mid, mid_activation, 0))
                                  : pointwise_conv2d(depthwise(xs, pre_activation, mid_activation), w.pw, w.pw_bias,
                                                     std::nullopt, rs, unit, 0, backend);
    if (first_is_pointwise && rs) z = scaled_channels(z, std::nullopt, std::nullopt, rs, 0);
    g = activation_backward(g, z, activation_code);
  }
  const int64_t mask = output_mask & 31;
  const auto [dx, ddw, ddb, dpw, dpb, dscale, dshift] =
      first_is_pointwise ? pointwise_first(g, mid, xs, w, at, pre_activation, mid_activation, mask)
                         : depthwise_first({g, {}, {}, {}, xs, w.pw, {}, {}, mid_activation, true}, xs, w, std::nullopt,
                                           std::nullopt, at, pre_activation, mask);
  return {mask & 1 ? image_gradient(x, channels_last(dx)) : no_gradient(x),
          weight_gradient(dw_weight, ddw),
          weight_gradient(dw_bias ? *dw_bias : dw_weight, ddb),
          weight_gradient(pw_weight, dpw),
          weight_gradient(pw_bias ? *pw_bias : pw_weight, dpb),
          output_mask & 32 && residual ? image_gradient(*residual, g) : no_gradient(x)};
}

Gradients separable_conv2d_stats_backward(Tensor grad, Tensor grad_sum, Tensor grad_squares, Tensor x, Tensor dw_weight,
                                          Maybe dw_bias, Tensor pw_weight, Maybe pw_bias, Maybe scale, Maybe shift,
                                          Tensor y, Ints stride, Ints padding, Ints dilation, int64_t pre_activation,
                                          int64_t mid_activation, int64_t output_mask, int64_t backend) {
  check_backend(backend);
  check_scale_shift(scale, shift, x);
  const Tensor xs = channels_last(x);
  PointwiseGradientsOf of{channels_last(grad), {}, {}, {}, xs, pw_weight, {}, {}, mid_activation, true};
  of.with_sums(grad_sum, grad_squares, y);
  auto gradients = depthwise_first(of, xs, {dw_weight, dw_bias, pw_weight, pw_bias}, scale, shift,
                                   {stride, padding, dilation, backend}, pre_activation, output_mask);
  Tensor& dx = std::get<0>(gradients);
  if (output_mask & 1) dx = image_gradient(x, channels_last(dx));
  return gradients;
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("separable_conv2d_backward", TORCH_BOX(&cnnfast::cpu::separable_conv2d_backward));
  m.impl("separable_conv2d_stats_backward", TORCH_BOX(&cnnfast::cpu::separable_conv2d_stats_backward));
}
