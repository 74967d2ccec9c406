// csrc/cuda/depthwise_conv2d.cu on CPU tensors, as torch.ops.cnnfast_cuda_host::depthwise_conv2d, ..., and C functions that
// tell how to run it and what was counted.
#include "cuda_host.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace cnnfast::cuda {

// Twins of tensors.h's.
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline bool on_device(const torch::stable::Tensor& x) { return x.is_cpu(); }
inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

}  // namespace cnnfast::cuda

#include "../../csrc/cuda/depthwise_conv2d.cu"

STABLE_TORCH_LIBRARY(cnnfast_cuda_host, m) {
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
      " int pre_activation, int activation) -> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
      " int[] dilation, int pre_activation, int activation, int output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "depthwise_conv2d_packed(Tensor x, Tensor packed, int out_channels, int[] kernel_size, int[] stride,"
      " int[] padding, int[] dilation, int pre_activation, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cnnfast_cuda_host, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_op));
  m.impl("depthwise_conv2d_packed", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_packed_op));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&cnnfast::cuda::depthwise_conv2d_backward_op));
}

// What the kernels' headers promise: "<kernel> <K> <S> <strip> <loads per strip> <sectors per request> <registers>".
template <template <int, int> class Traits, int K, int S>
std::string promise(const char* kernel) {
  using P = Traits<K, S>;
  std::string line = kernel;
  for (const int value : {K, S, P::kStrip, P::kLoadsPerStrip, P::kSectorsPerRequest, P::kMaxRegisters})
    line += " " + std::to_string(value);
  return line + "\n";
}
template <template <int, int> class Traits>
std::string promises(const char* kernel) {
  return promise<Traits, 3, 1>(kernel) + promise<Traits, 3, 2>(kernel) + promise<Traits, 5, 1>(kernel) +
         promise<Traits, 5, 2>(kernel);
}

extern "C" {
const char* host_promises() {
  using namespace cnnfast::cuda;
  static const std::string text = promises<ForwardTraits>("depthwise_conv2d_forward_kernel") +
                                  promises<InputGradientTraits>("depthwise_conv2d_input_gradient_kernel") +
                                  promises<WeightGradientTraits>("depthwise_conv2d_weight_gradient_kernel");
  return text.c_str();
}
void host_set_order(int order) { host::settings.order = static_cast<host::Order>(order); }
void host_only_block_from_end(int64_t block) { host::settings.only_block_from_end = block; }
void host_start_counting() {
  host::kernels_run.clear();
  host::buffers.clear();
  host::counting = true;
}
void host_name_buffer(const char* name, const void* p, int64_t bytes) { host::name_buffer(name, p, bytes); }
const char* host_stop_counting() {
  static std::string json;
  host::counting = false;
  return (json = host::counters_json()).c_str();
}
bool host_trapped() { return host::trapped.exchange(false); }
const char* host_kernels_run() {  // names of the kernels run since the last call, a line each
  static std::string names;
  names.clear();
  for (const auto& kernel : host::kernels_run) names += kernel.name + "\n";
  host::kernels_run.clear();
  return names.c_str();
}
}
