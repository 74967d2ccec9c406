// The op's own kernels for images of TYPE, for the tests of what nvcc makes of them.
#include "cuda/inverted_residual.cuh"

using namespace cnnfast::cuda;

template void cnnfast::cuda::inverted_residual_forward<TYPE, false>(InvertedResidualArguments<TYPE>, cudaStream_t);
template void cnnfast::cuda::inverted_residual_squeeze<TYPE, false>(InvertedResidualArguments<TYPE>, cudaStream_t);
// As TF32, too, what float32 is.
constexpr bool kTf32 = sizeof(TYPE) == 4;
template void cnnfast::cuda::inverted_residual_forward<TYPE, kTf32>(InvertedResidualArguments<TYPE>, cudaStream_t);
