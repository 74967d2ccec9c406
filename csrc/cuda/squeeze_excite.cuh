// squeeze_excite on raw device pointers. No torch: nvcc alone compiles it, or a host compiler with
// tests/cuda_host/cuda_host.h. Each kernel's file opens with its costs.
//
//   y = post_activation(x * gates + residual), gates from the means of x's channels (squeeze_excite/gate.cuh)
//
// Three launches, four where C R > 32,768: the pixels' sums, the gates, the pixels again. x, residual and y are dense, all
// NHWC or all NCHW; nothing is rounded to their dtype in between.
#pragma once
#include "squeeze_excite/common.cuh"
#include "squeeze_excite/gate.cuh"
#include "squeeze_excite/pool.cuh"
#include "squeeze_excite/scale.cuh"

namespace cnnfast::cuda {

template <class T>
struct SqueezeExciteArguments {
  const T* x = nullptr;
  const T* residual = nullptr;  // none: null
  T* y = nullptr;
  ExciteShape shape;
  const T* reduce_weight = nullptr;  // (R, C), dense
  GateBias reduce_bias;
  const T* expand_weight = nullptr;  // (C, R), dense
  GateBias expand_bias;
  int activation = kIdentity, gate_activation = kIdentity, post_activation = kIdentity;
  float* workspace = nullptr;
};

// The gate's arguments less the workspace's parts.
template <class T>
GateArguments<T> gate_arguments(const SqueezeExciteArguments<T>& a) {
  const ExciteShape& s = a.shape;
  GateArguments<T> g;
  g.batch = s.batch;
  g.chunks = pool_tiling<T>(s, in_vectors<T>(s) && aligned<kVec<T>>(a.x)).chunks;
  g.pixels = s.pixels;
  g.channels = s.channels;
  g.squeezed = s.squeezed;
  g.reduce_weight = a.reduce_weight;
  g.reduce_bias = a.reduce_bias;
  g.expand_weight = a.expand_weight;
  g.expand_bias = a.expand_bias;
  g.activation = a.activation;
  g.gate_activation = a.gate_activation;
  return g;
}

// How many floats the workspace has to have; x has to be known by then.
template <class T>
int64_t squeeze_excite_workspace(const SqueezeExciteArguments<T>& a) {
  const GateArguments<T> g = gate_arguments(a);
  return g.batch * (g.chunks + 1) * g.channels + gate_workspace(g);
}

template <class T>
void squeeze_excite(const SqueezeExciteArguments<T>& a, cudaStream_t stream) {
  const ExciteShape& s = a.shape;
  if (s.elements() == 0) return;
  GateArguments<T> gate = gate_arguments(a);
  gate.gates = a.workspace;
  float* const partial = a.workspace + s.batch * s.channels;
  gate.partial = partial;
  gate.hidden = partial + s.batch * gate.chunks * s.channels;

  const bool in_whole = in_vectors<T>(s) && aligned<kVec<T>>(a.x);
  const PoolArguments<T> pool{a.x, partial, s};
  in_whole ? launch_pool<T, kVec<T>>(pool, stream) : launch_pool<T, 1>(pool, stream);
  launch_gates(gate, stream);
  const ScaleArguments<T> scale{a.x, a.residual, gate.gates, a.y, s, a.post_activation};
  in_whole&& aligned<kVec<T>>(a.residual) && aligned<kVec<T>>(a.y) ? launch_scale<T, kVec<T>>(scale, stream)
                                                                   : launch_scale<T, 1>(scale, stream);
}

}  // namespace cnnfast::cuda
