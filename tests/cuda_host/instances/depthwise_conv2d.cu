// Every kernel for images of TYPE, for the tests of what nvcc makes of them.
#include "cuda/depthwise_conv2d.cuh"

template void cnnfast::cuda::depthwise_conv2d_forward<TYPE>(const ForwardArguments<TYPE>&, cudaStream_t);
template void cnnfast::cuda::depthwise_conv2d_backward<TYPE>(const BackwardArguments<TYPE>&, cudaStream_t);
