// Squeeze-excite's pieces, which inverted_residual shares: a tile's rows of sums to gates, and whole tensors for backward.
#pragma once
#include "packing.h"

namespace cnnfast::cpu {

// One image's channels to their gates; act and gate are activation codes.
struct Excite {
  PointwiseWeights reduce, expand;
  int64_t activation, gate_activation;

  int64_t channels() const { return expand.out; }
  // gates[channels] from the sums of each of the image's rows (rows x channels); both of the compute type.
  void gates(const Worker& worker, const KernelTable& table, Storage storage, const char* row_sums, int64_t rows,
             int64_t pixels, char* gates) const;
};

// The same on tensors, for backward: everything of the compute type, images channels_last.
struct ExciteTensors {
  Tensor reduce_weight;
  Maybe reduce_bias;
  Tensor expand_weight;
  Maybe expand_bias;
  int64_t activation, gate_activation;

  struct Forward {
    Tensor mean, hidden, gates;  // (N, channels or squeezed, 1, 1)
  };
  Forward forward(const Tensor& x) const;
  Forward of_means(const Tensor& mean) const;
  // From the gradient of x * gates, those of reduce_weight, reduce_bias, expand_weight, expand_bias (as output_mask's
  // bits say) and x.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Forward& kept,
                                                              int64_t output_mask) const;
  // From the gradient of the gates the same, and at the end that of each of the `pixels` that the means are of.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> of_gates(const Tensor& dgates, const Forward& kept, int64_t pixels,
                                                              int64_t output_mask) const;
};

}  // namespace cnnfast::cpu
