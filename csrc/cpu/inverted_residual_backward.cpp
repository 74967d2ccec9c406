// The gradients of inverted_residual: those of its stages, whose results are computed again: not kept, and never rounded to
// x's dtype.
#include "channels.h"
#include "ops.h"
#include "squeeze_excite.h"

namespace cnnfast::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
inverted_residual_backward(Tensor grad, Tensor x, Maybe expand_weight, Maybe expand_bias, Tensor dw_weight,
                           Maybe dw_bias, Maybe se_reduce_weight, Maybe se_reduce_bias, Maybe se_expand_weight,
                           Maybe se_expand_bias, Tensor project_weight, Maybe project_bias, Maybe residual, Ints stride,
                           Ints padding, Ints dilation, int64_t activation_code, int64_t se_activation,
                           int64_t gate_activation, int64_t output_mask, int64_t backend) {
  const ScalarType dtype = compute_dtype(storage_of(x, "x"));
  const Ints unit{1, 1};
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  const Tensor xs = channels_last(to_dtype(x, dtype)), dws = to_dtype(dw_weight, dtype);
  const Tensor pws = to_dtype(project_weight, dtype);
  const Maybe ews = to_dtype(expand_weight, dtype), ebs = to_dtype(expand_bias, dtype);
  const Maybe dbs = to_dtype(dw_bias, dtype), pbs = to_dtype(project_bias, dtype), rs = to_dtype(residual, dtype);
  const bool excites = se_reduce_weight.has_value();
  const ExciteTensors excite{excites ? to_dtype(*se_reduce_weight, dtype) : dws,
                             to_dtype(se_reduce_bias, dtype),
                             excites ? to_dtype(*se_expand_weight, dtype) : dws,
                             to_dtype(se_expand_bias, dtype),
                             se_activation,
                             gate_activation};

  const Tensor e =
      ews ? pointwise_conv2d(xs, *ews, ebs, std::nullopt, std::nullopt, unit, activation_code, backend) : xs;
  const Tensor d = channels_last(depthwise_conv2d(e, dws, dbs, stride, padding, dilation, 0, activation_code, backend));
  ExciteTensors::Forward kept{d, d, d};
  if (excites) kept = excite.forward(d);
  const Tensor projected = excites ? scaled_channels(d, kept.gates, std::nullopt, std::nullopt, 0) : d;

  const int64_t expand_mask = ews ? bit(0) | bit(1) << 1 | bit(2) << 2 : 0;
  const int64_t depthwise_mask = (expand_mask || bit(0) ? 1 : 0) | bit(3) << 1 | bit(4) << 2;
  const int64_t excite_mask = output_mask >> 5 & 15;
  const int64_t project_mask =
      (depthwise_mask || (excites && excite_mask) ? 1 : 0) | bit(9) << 1 | bit(10) << 2 | bit(11) << 4;
  const auto none = [&] { return no_gradient(xs); };
  const auto [dprojected, dpw, dpb, no_gate, dres] = pointwise_conv2d_backward(
      to_dtype(grad, dtype), projected, pws, pbs, std::nullopt, rs, unit, 0, project_mask, backend);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> through{none(), none(), none(), none(), dprojected};
  if (excites && project_mask & 1) through = excite.backward(channels_last(dprojected), d, kept, excite_mask);
  const auto& [drw, drb, dxw, dxb, dd] = through;
  const auto [de, ddw, ddb] = depthwise_mask ? depthwise_conv2d_backward(dd, e, dws, dbs, stride, padding, dilation, 0,
                                                                         activation_code, depthwise_mask, backend)
                                             : std::tuple(none(), none(), none());
  const auto [dx, dew, deb, unused, unasked] =
      expand_mask ? pointwise_conv2d_backward(de, xs, *ews, ebs, std::nullopt, std::nullopt, unit, activation_code,
                                              expand_mask, backend)
                  : std::tuple(de, none(), none(), none(), none());
  const auto like = [&](const Tensor& gradient, const Maybe& of) {
    return to_dtype(gradient, of ? of->scalar_type() : x.scalar_type());
  };
  return {bit(0) ? image_gradient(x, channels_last(dx)) : no_gradient(x),
          like(dew, expand_weight),
          like(deb, expand_bias),
          like(ddw, dw_weight),
          like(ddb, dw_bias),
          like(drw, se_reduce_weight),
          like(drb, se_reduce_bias),
          like(dxw, se_expand_weight),
          like(dxb, se_expand_bias),
          like(dpw, project_weight),
          like(dpb, project_bias),
          bit(11) && residual ? image_gradient(*residual, channels_last(dres)) : no_gradient(x)};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("inverted_residual_backward", TORCH_BOX(&cnnfast::cpu::inverted_residual_backward));
}
