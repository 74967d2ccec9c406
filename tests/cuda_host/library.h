// What the shared library of an op's host side has: library/<op>.cpp compiles csrc/cuda/<op>.cu for CPU tensors and
// registers its functions in the torch library CNNFAST_HOST. The C functions tell how to run it and what was counted.
#pragma once
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

// With the library's name expanded; a library whose source has a planted fault has a name of its own.
#define HOST_LIBRARY(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define HOST_LIBRARY_IMPL(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CPU, m)

#pragma GCC visibility push(default)  // all else is hidden, so that each library has a harness of its own
extern "C" {
// What the kernels' headers promise, a line each: "<kernel> <template's ints> <name>=<value> ...". The op's.
const char* host_promises();

void host_set_order(int order) { host::settings.order = static_cast<host::Order>(order); }
void host_set_clusters(bool there) { host::settings.clusters = there; }
void host_set_multiprocessors(int count) { host::settings.multiprocessors = count; }
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
#pragma GCC visibility pop
