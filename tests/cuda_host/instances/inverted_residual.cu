// Every kernel for images of TYPE, for the tests of what nvcc makes of them.
#include "cuda/inverted_residual.cuh"

template void cnnfast::cuda::inverted_residual_forward<TYPE, false>(const InvertedResidualArguments<TYPE>&,
                                                                    cudaStream_t);
#ifdef TF32
template void cnnfast::cuda::inverted_residual_forward<TYPE, true>(const InvertedResidualArguments<TYPE>&,
                                                                   cudaStream_t);
#endif
