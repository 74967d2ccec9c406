// csrc/cuda/squeeze_excite.cu on CPU tensors.
#include "library.h"

#include "cuda/squeeze_excite.cu"

HOST_LIBRARY(CNNFAST_HOST, m) {
  m.def(
      "squeeze_excite(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias,"
      " Tensor? residual, int activation, int gate_activation, int post_activation) -> Tensor");
}

HOST_LIBRARY_IMPL(CNNFAST_HOST, m) { m.impl("squeeze_excite", TORCH_BOX(&cnnfast::cuda::squeeze_excite_op)); }

const char* host_promises() {
  using namespace cnnfast::cuda;
  static std::string text;
  for (const int n : {1, 4, 8})
    for (const std::string layout : {"", "_nchw"}) {
      text += "squeeze_excite_pool" + layout + "_kernel " + std::to_string(n) +
              " sectors_per_request=" + std::to_string(PoolTraits::kSectorsPerRequest) +
              " registers=" + std::to_string(PoolTraits::kMaxRegisters) + "\n";
      text += "squeeze_excite_scale" + layout + "_kernel " + std::to_string(n) +
              " sectors_per_request=" + std::to_string(ScaleTraits::kSectorsPerRequest) +
              " registers=" + std::to_string(ScaleTraits::kMaxRegisters) + "\n";
    }
  for (const std::string kernel : {"gate", "reduce", "expand"})
    text += "squeeze_excite_" + kernel + "_kernel registers=" + std::to_string(GateTraits::kMaxRegisters) + "\n";
  return text.c_str();
}
