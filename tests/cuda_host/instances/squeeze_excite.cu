// Every kernel for images of TYPE, for the tests of what nvcc makes of them.
#include "cuda/squeeze_excite.cuh"

template void cnnfast::cuda::squeeze_excite<TYPE>(const SqueezeExciteArguments<TYPE>&, cudaStream_t);
