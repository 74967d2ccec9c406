// What the CUDA ops' host side shares: checks, memory formats, the current stream. Stable ABI only.
// tests/cuda_host compiles it for CPU tensors, with its own twins of what is under #ifndef.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace cnnfast::cuda {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

#ifndef CNNFAST_CUDA_HOST
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline bool on_device(const Tensor& x) { return x.is_cuda(); }

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// channels_last where x's channels are side by side and it isn't plain NCHW too; NCHW otherwise.
inline MemoryFormat image_format(const Tensor& x) {
  const bool channels_last = !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1;
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor empty_like(const Tensor& x, const Ints& size, MemoryFormat format) {
  return torch::stable::empty(size, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
}

inline Tensor empty_1d(const Tensor& x, int64_t count, ScalarType dtype) {
  return torch::stable::empty(Ints{count}, dtype, std::nullopt, x.device());
}

inline void check_image(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(on_device(x), name, " has to be a CUDA tensor");
  STD_TORCH_CHECK(x.dim() == 4, name, " has ", x.dim(), " dimensions; (N, C, H, W) is wanted");
}

// On x's device, and of x's dtype or (where low precision may come with float32) float32.
inline void check_parameter(const Tensor& p, const Tensor& x, const char* name, bool float32_too) {
  STD_TORCH_CHECK(on_device(p) && p.get_device_index() == x.get_device_index(), name, " has to be on x's device");
  STD_TORCH_CHECK(p.scalar_type() == x.scalar_type() || (float32_too && p.scalar_type() == ScalarType::Float), name,
                  "'s dtype has to be x's", float32_too ? " or float32" : "");
}

}  // namespace cnnfast::cuda
