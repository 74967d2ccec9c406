// Packed weights: writing them (pack_*) and reading them back (PackedReader). Layout: csrc/packing.h.
#pragma once
#include "common.h"

namespace cnnfast::cpu {

// One section each, as pointers into a packing. Scalars of the compute type.
struct DepthwiseWeights {
  const char* bias;
  const char* taps;
  int64_t channels, padded;
};
struct PointwiseWeights {
  const char* bias;
  const char* scale;  // of panels in bfloat16, else null
  const char* panels;
  int64_t in, out;
  Storage storage;  // of the panels

  int64_t panel() const { return (storage == Storage::bf16 ? round_up(in, kPairDepth) : in) * kPanel; }
};

Tensor pack_depthwise_conv2d(const Tensor& weight, const Maybe& bias);
// A scale multiplies a stage's output channels before the bias is added.
Tensor pack_conv2d(const Tensor& weight, const Maybe& bias, const Maybe& scale = std::nullopt, bool winograd = false);
Tensor pack_pointwise_conv2d(const Tensor& weight, const Maybe& bias, const Maybe& scale = std::nullopt);
Tensor pack_separable_conv2d(const Tensor& dw_weight, const Maybe& dw_bias, const Tensor& pw_weight,
                             const Maybe& pw_bias, bool pointwise_first, const Maybe& dw_scale = std::nullopt,
                             const Maybe& pw_scale = std::nullopt);
// Without expand_weight x goes straight into the depthwise stage; without se_ weights there is no squeeze-excite.
Tensor pack_inverted_residual(const Maybe& expand_weight, const Maybe& expand_bias, const Tensor& dw_weight,
                              const Maybe& dw_bias, const Maybe& se_reduce_weight, const Maybe& se_reduce_bias,
                              const Maybe& se_expand_weight, const Maybe& se_expand_bias, const Tensor& project_weight,
                              const Maybe& project_bias, const Maybe& expand_scale = std::nullopt,
                              const Maybe& dw_scale = std::nullopt, const Maybe& project_scale = std::nullopt);
Tensor pack_squeeze_excite(const Tensor& reduce_weight, const Maybe& reduce_bias, const Tensor& expand_weight,
                           const Maybe& expand_bias);

// Checks the header against what the caller says, then hands out the sections in order.
class PackedReader {
 public:
  PackedReader(const Tensor& packed, PackedOp op, const Tensor& x, int64_t mid, int64_t out, int64_t kernel_h,
               int64_t kernel_w);
  DepthwiseWeights depthwise(int64_t channels);
  PointwiseWeights pointwise(int64_t in, int64_t out);
  PointwiseWeights excite(int64_t in, int64_t out);  // a product of squeeze-excite's
  const PackedHeader& header() const { return *header_; }

 private:
  const PackedHeader* header_;
  PointwiseWeights section(int64_t in, int64_t out, int64_t itemsize);

  const char* next_;
};

}  // namespace cnnfast::cpu
