// Compiled once per ISA with -DCNNFAST_ISA=<name> and that ISA's flags; see kernels.h.
#include "channels.h"
#include "conv2d_winograd.h"
#include "depthwise_conv2d.h"
#include "depthwise_conv2d_taps.h"
#include "local_response_norm.h"
#include "pointwise_conv2d.h"
#include "pointwise_conv2d_backward.h"
#include "pool2d.h"
#include "scale_shift.h"
#include "scale_shift_max_pool.h"
#include "transpose.h"

#define CNNFAST_STRING_(x) #x
#define CNNFAST_STRING(x) CNNFAST_STRING_(x)

namespace cnnfast::CNNFAST_ISA {

const KernelTable table = {
    .isa = CNNFAST_STRING(CNNFAST_ISA),
    .gemm_rows = kRows,
#if defined(__AVX2__)
    // float64 has no form but the generic one: it is there to check the algorithms, not to be fast.
    .depthwise = {depthwise<float>, nullptr, depthwise<bf16>, depthwise<f16>},
    .depthwise_output_gradient = {depthwise_output_gradient<float>, nullptr, depthwise_output_gradient<bf16>,
                                  depthwise_output_gradient<f16>},
    .depthwise_input = {depthwise_input<float>, nullptr, depthwise_input<bf16>, depthwise_input<f16>},
    .depthwise_input_gradient = {depthwise_input_gradient<float>, nullptr, depthwise_input_gradient<bf16>,
                                 depthwise_input_gradient<f16>},
    .widen = {widen_all<float>, nullptr, widen_all<bf16>, widen_all<f16>},
    .channel_sums = {channel_sums<float>, nullptr, channel_sums<bf16>, channel_sums<f16>},
    .scale_channels = {scale_channels<float>, nullptr, scale_channels<bf16>, scale_channels<f16>},
    .scale_shift_grad = {scale_shift_grad<float>, nullptr, scale_shift_grad<bf16>, scale_shift_grad<f16>},
    .scale_shift_sums = {scale_shift_sums<float>, nullptr, scale_shift_sums<bf16>, scale_shift_sums<f16>},
    .scale_shift_max_pool = {scale_shift_max_pool<float>, nullptr, scale_shift_max_pool<bf16>,
                             scale_shift_max_pool<f16>},
    .scale_shift_max_pool_grad = {scale_shift_max_pool_grad<float>, nullptr, scale_shift_max_pool_grad<bf16>,
                                  scale_shift_max_pool_grad<f16>},
    .max_pool2d = {max_pool2d<float>, nullptr, max_pool2d<bf16>, max_pool2d<f16>},
    .avg_pool2d = {avg_pool2d<float>, nullptr, avg_pool2d<bf16>, avg_pool2d<f16>},
    .local_response_norm = {local_response_norm<float>, nullptr, local_response_norm<bf16>, local_response_norm<f16>},
    .local_response_norm_backward = {local_response_norm_backward<float>, nullptr, local_response_norm_backward<bf16>,
                                     local_response_norm_backward<f16>},
    .gemm = {gemm<float>, nullptr},
    .unpair = unpair,
    .transpose = transpose,
    .gemm_bf16 = nullptr,
    .split_rows = nullptr,
    .operand_bf16 = nullptr,
    .split_panels = nullptr,
    .gemm_planes = nullptr,
#if defined(__AVX512F__)
    .depthwise_taps = {depthwise_taps<float>, nullptr, depthwise_taps<bf16>, depthwise_taps<f16>},
#else
    .depthwise_taps = {depthwise_taps<float>, nullptr, nullptr, nullptr},
#endif
    .activation_grad = {activation_grad<float>, nullptr},
    .operand = {operand<float>, nullptr, operand<bf16>, operand<f16>},
    .grad_input = {grad_input<float>, nullptr, grad_input<bf16>, grad_input<f16>},
    .winograd_input = {winograd_input<float>, nullptr, winograd_input<bf16>, winograd_input<f16>},
    .winograd_output = winograd_output<float>,
#else
    .depthwise = {depthwise<float>, depthwise<double>, depthwise<bf16>, depthwise<f16>},
    .depthwise_output_gradient = {depthwise_output_gradient<float>, depthwise_output_gradient<double>,
                                  depthwise_output_gradient<bf16>, depthwise_output_gradient<f16>},
    .depthwise_input = {depthwise_input<float>, depthwise_input<double>, depthwise_input<bf16>, depthwise_input<f16>},
    .depthwise_input_gradient = {depthwise_input_gradient<float>, depthwise_input_gradient<double>,
                                 depthwise_input_gradient<bf16>, depthwise_input_gradient<f16>},
    .widen = {widen_all<float>, widen_all<double>, widen_all<bf16>, widen_all<f16>},
    .channel_sums = {channel_sums<float>, channel_sums<double>, channel_sums<bf16>, channel_sums<f16>},
    .scale_channels = {scale_channels<float>, scale_channels<double>, scale_channels<bf16>, scale_channels<f16>},
    .scale_shift_grad = {scale_shift_grad<float>, scale_shift_grad<double>, scale_shift_grad<bf16>,
                         scale_shift_grad<f16>},
    .scale_shift_sums = {scale_shift_sums<float>, scale_shift_sums<double>, scale_shift_sums<bf16>,
                         scale_shift_sums<f16>},
    .scale_shift_max_pool = {scale_shift_max_pool<float>, scale_shift_max_pool<double>, scale_shift_max_pool<bf16>,
                             scale_shift_max_pool<f16>},
    .scale_shift_max_pool_grad = {scale_shift_max_pool_grad<float>, scale_shift_max_pool_grad<double>,
                                  scale_shift_max_pool_grad<bf16>, scale_shift_max_pool_grad<f16>},
    .max_pool2d = {max_pool2d<float>, max_pool2d<double>, max_pool2d<bf16>, max_pool2d<f16>},
    .avg_pool2d = {avg_pool2d<float>, avg_pool2d<double>, avg_pool2d<bf16>, avg_pool2d<f16>},
    .local_response_norm = {local_response_norm<float>, local_response_norm<double>, local_response_norm<bf16>,
                            local_response_norm<f16>},
    .local_response_norm_backward = {local_response_norm_backward<float>, local_response_norm_backward<double>,
                                     local_response_norm_backward<bf16>, local_response_norm_backward<f16>},
    .gemm = {gemm<float>, gemm<double>},
    .unpair = unpair,
    .transpose = transpose,
    .gemm_bf16 = nullptr,
    .split_rows = nullptr,
    .operand_bf16 = nullptr,
    .split_panels = nullptr,
    .gemm_planes = nullptr,
    .depthwise_taps = {depthwise_taps<float>, depthwise_taps<double>, nullptr, nullptr},
    .activation_grad = {activation_grad<float>, activation_grad<double>},
    .operand = {operand<float>, operand<double>, operand<bf16>, operand<f16>},
    .grad_input = {grad_input<float>, grad_input<double>, grad_input<bf16>, grad_input<f16>},
    .winograd_input = {winograd_input<float>, nullptr, winograd_input<bf16>, winograd_input<f16>},
    .winograd_output = winograd_output<float>,
#endif
};

}  // namespace cnnfast::CNNFAST_ISA
