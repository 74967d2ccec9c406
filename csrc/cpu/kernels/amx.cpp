// What an AMX machine has besides AVX-512's table; compiled as isa.cpp is.
#include "amx_bf16.h"
#include "amx_operand.h"
#include "amx_planes.h"
#include "depthwise_conv2d.h"
#include "depthwise_conv2d_taps.h"
#include "pointwise_conv2d_backward.h"

namespace cnnfast::CNNFAST_ISA {

void add_to(KernelTable& avx512) {
  avx512.isa = "amx";
  avx512.gemm_bf16 = gemm_bf16;
  avx512.depthwise[static_cast<int>(Storage::bf16)] = depthwise<bf16>;
  avx512.depthwise_input_gradient[static_cast<int>(Storage::bf16)] = depthwise_input_gradient<bf16>;
  avx512.depthwise_taps[static_cast<int>(Storage::bf16)] = depthwise_taps<bf16>;
  avx512.grad_input[static_cast<int>(Storage::bf16)] = grad_input<bf16>;
  avx512.operand_bf16 = operand_bf16;
  avx512.split_rows = split_rows;
  avx512.split_panels = split_panels;
  avx512.gemm_planes = gemm_planes;
}

}  // namespace cnnfast::CNNFAST_ISA
