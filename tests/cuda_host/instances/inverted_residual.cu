// The op's own kernels for images of TYPE, for the tests of what nvcc makes of them; of float32 by TF32, too.
#include "cuda/inverted_residual.cuh"

namespace cnnfast::cuda {

template <bool tf32>
void instantiate(const InvertedResidualArguments<TYPE>& a) {
  inverted_residual_forward<TYPE, tf32>(a, nullptr);
  inverted_residual_squeeze<TYPE, tf32>(a, nullptr);
  inverted_residual_one_pass<TYPE, tf32>(a, {}, nullptr);
}

void instantiate_all(const InvertedResidualArguments<TYPE>& a) {
  instantiate<false>(a);
  if constexpr (sizeof(TYPE) == 4) instantiate<true>(a);
}

}  // namespace cnnfast::cuda
