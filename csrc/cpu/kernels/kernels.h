// What the ISA-neutral code (checks, tiling, threads) asks of the kernels: tiles as plain structs (tiles/), one table of
// functions per ISA. No torch, no std containers: kernels/isa.cpp compiles this once per ISA, and nothing in it may become a
// weak symbol.
#pragma once
#include "tiles/channels.h"
#include "tiles/depthwise_conv2d.h"
#include "tiles/images.h"
#include "tiles/products.h"

namespace cnnfast {

struct KernelTable {
  const char* isa;
  int64_t gemm_rows;  // of a register tile of gemm: work is shared out in multiples of it
  // [storage of x]; a null entry means that this ISA has none and the generic table serves
  void (*depthwise[kStorages])(const DepthwiseTile&);
  void (*depthwise_output_gradient[kStorages])(const DepthwiseOutputGradientTile&);
  void (*depthwise_input[kStorages])(const DepthwiseInputTile&);
  void (*depthwise_input_gradient[kStorages])(const DepthwiseInputTile&);
  void (*widen[kStorages])(const void* x, void* y, int64_t count);  // storage -> S
  void (*channel_sums[kStorages])(const ChannelSumsTile&);
  void (*scale_channels[kStorages])(const ScaleTile&);
  void (*scale_shift_grad[kStorages])(const ScaleShiftGradTile&);
  void (*scale_shift_sums[kStorages])(const ScaleShiftSumsTile&);
  void (*scale_shift_max_pool[kStorages])(const ScaleShiftMaxPoolTile&);
  void (*scale_shift_max_pool_grad[kStorages])(const ScaleShiftMaxPoolTile&);
  void (*max_pool2d[kStorages])(const Pool2dTile&);
  void (*avg_pool2d[kStorages])(const Pool2dTile&);
  void (*local_response_norm[kStorages])(const LocalResponseNormTile&);
  void (*local_response_norm_backward[kStorages])(const LocalResponseNormTile&);
  // [0] float, [1] double
  void (*gemm[2])(const GemmTile&);
  // a bfloat16 panel times scale [kPanel] to float, both b of a GemmTile
  void (*unpair)(const void* pairs, const void* scale, void* panel, int64_t count);
  void (*transpose)(const TransposeTile&);
  // On AMX; null elsewhere.
  void (*gemm_bf16)(const GemmTile&);  // a and b bfloat16
  void (*split_rows)(const RowsTile&);
  void (*operand_bf16)(const OperandTile&);  // from bfloat16 to bfloat16: rows; panels of pairs of pixels; columns
  bool (*split_panels)(const PanelsTile&);   // false: something in them is odd
  // The product of one or two panels and, beside it, what split_panels does for those that come next (or a count of 0).
  bool (*gemm_planes)(const GemmTile&, const PanelsTile& next);
  void (*depthwise_taps[kStorages])(const DepthwiseTapsTile&);  // of g, a and dx; those but S may be null
  void (*activation_grad[2])(const ActivationGradTile&);
  void (*operand[kStorages])(const OperandTile&);
  void (*grad_input[kStorages])(const GradInputTile&);
  void (*winograd_input[kStorages])(const WinogradInputTile&);  // none for f64
  void (*winograd_output)(const WinogradOutputTile&);           // S is float
};

namespace generic {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}

namespace amx {
void add_to(KernelTable& avx512);  // the rest of an AMX machine's table is AVX-512's
}  // namespace amx

}  // namespace cnnfast
