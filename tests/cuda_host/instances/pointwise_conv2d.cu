// Every kernel for images of TYPE, for the tests of what nvcc makes of them.
#include "cuda/pointwise_conv2d.cuh"

template void cnnfast::cuda::pointwise_conv2d_forward<TYPE>(const PointwiseArguments<TYPE>&, cudaStream_t);
