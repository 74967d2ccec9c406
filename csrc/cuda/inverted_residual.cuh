// inverted_residual on raw device pointers: forward. No torch: nvcc alone compiles it, or a host compiler with
// tests/cuda_host/cuda_host.h. Each kernel's file opens with its costs.
//
// Without squeeze-excite one launch (inverted_residual/fused.cuh). With it three, four where E R > 32,768: d and its sums
// (inverted_residual/squeeze.cuh), the gates (squeeze_excite/gate.cuh), the projection (pointwise_conv2d/forward.cuh), which
// multiplies d by them; or, with the same bits, one (inverted_residual/one_pass.cuh). Rounded to x's dtype are e and d, with squeeze-excite the gates and d times these, too.
#pragma once
#include "inverted_residual/fused.cuh"
#include "inverted_residual/one_pass.cuh"
#include "inverted_residual/squeeze.cuh"
#include "pointwise_conv2d.cuh"
#include "squeeze_excite/gate.cuh"

namespace cnnfast::cuda {

// Why the kernels can't take this problem; empty: they can. cnnfast/ops/cuda_kernels.py says the same before the call.
template <class T>
std::string inverted_residual_reason(const InvertedResidualShape& s) {
  if (make_plan<T>(s).bytes <= kSharedBytes) return {};
  return "4 outputs, with the inputs, weights and " + std::to_string(s.channels) +
         " input channels that they need, don't fit the " + std::to_string(kSharedBytes) + " bytes of shared memory";
}

// Calls f.template operator()<K, S>() for the shape's kernel size and stride; 0, 0: those that are no constants.
template <class F>
void with_window(const InvertedResidualShape& s, F f) {
  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w && s.dilation_h == 1 && s.dilation_w == 1;
  const auto is = [&](int k, int stride) { return square && s.kernel_h == k && s.stride_h == stride; };
  if (is(3, 1)) return f.template operator()<3, 1>();
  if (is(3, 2)) return f.template operator()<3, 2>();
  if (is(5, 1)) return f.template operator()<5, 1>();
  if (is(5, 2)) return f.template operator()<5, 2>();
  f.template operator()<0, 0>();
}

inline bool empty(const InvertedResidualShape& s) { return s.batch * s.out_height * s.out_width == 0; }

// Which rows are whole vectors, and the plan.
template <class T>
InvertedResidualPlan prepare(InvertedResidualArguments<T>& a, const InvertedResidualShape& s) {
  const auto vectors = [](int length, std::initializer_list<const void*> rows) {
    bool aligned = length % kVec<T> == 0;
    for (const void* row : rows) aligned &= reinterpret_cast<uintptr_t>(row) % 16 == 0;
    return aligned;
  };
  a.shape = s;
  a.vectors_c = vectors(s.channels, {a.x, a.expand_weight});
  a.vectors_e = vectors(s.expanded, {a.dw_weight, a.project_weight, a.d});
  a.vectors_k = vectors(s.out_channels, {a.y, a.residual});
  const InvertedResidualPlan p = make_plan<T>(s);
  if (p.bytes > kSharedBytes) throw std::runtime_error("inverted_residual: " + inverted_residual_reason<T>(s));
  return p;
}

// Without squeeze-excite. tf32: float32 operands of both products may be rounded to TF32.
template <class T, bool tf32>
void inverted_residual_forward(InvertedResidualArguments<T> a, cudaStream_t stream) {
  if (empty(a.shape)) return;
  const InvertedResidualPlan p = prepare(a, a.shape);
  with_window(a.shape, [&]<int K, int S>() {
    if (a.shape.out_channels <= kFewColumns)
      launch_inverted_residual<T, tf32, K, S, kFewColumns>(a, p, stream);
    else
      launch_inverted_residual<T, tf32, K, S, kManyColumns>(a, p, stream);
  });
}

// The shape of the pass that leaves d and its sums.
inline InvertedResidualShape squeeze_shape(InvertedResidualShape s) {
  s.out_channels = 0;
  return s;
}

template <class T>
struct ExciteArguments {
  int squeezed = 0;
  const T* reduce_weight = nullptr;  // (R, E)
  Parameter reduce_bias;
  const T* expand_weight = nullptr;  // (E, R)
  Parameter expand_bias;
  int activation = kIdentity, gate_activation = kIdentity;
  T* gates = nullptr;          // (N, E)
  float* workspace = nullptr;  // inverted_residual_workspace floats
};

template <class T>
GateArguments<T> gate_arguments(const InvertedResidualShape& s, const ExciteArguments<T>& excite) {
  const InvertedResidualPlan p = make_plan<T>(squeeze_shape(s));
  GateArguments<T> g;
  g.batch = s.batch;
  g.chunks = p.tiles_h * p.tiles_w;
  g.pixels = s.out_height * s.out_width;
  g.channels = s.expanded;
  g.squeezed = excite.squeezed;
  g.reduce_weight = excite.reduce_weight;
  g.reduce_bias = {excite.reduce_bias.data, excite.reduce_bias.float32};
  g.expand_weight = excite.expand_weight;
  g.expand_bias = {excite.expand_bias.data, excite.expand_bias.float32};
  g.activation = excite.activation;
  g.gate_activation = excite.gate_activation;
  g.rounded = excite.gates;
  return g;
}

template <class T>
int64_t inverted_residual_workspace(const InvertedResidualShape& s, const ExciteArguments<T>& excite) {
  const GateArguments<T> g = gate_arguments(s, excite);
  return g.batch * g.chunks * g.channels + gate_workspace(g);
}

// a.d and a.partial.
template <class T, bool tf32>
void inverted_residual_squeeze(InvertedResidualArguments<T> a, cudaStream_t stream) {
  const InvertedResidualPlan p = prepare(a, squeeze_shape(a.shape));
  with_window(a.shape, [&]<int K, int S>() { launch_inverted_residual_squeeze<T, tf32, K, S>(a, p, stream); });
}

template <class T, bool tf32>
PointwiseArguments<T> projection(const InvertedResidualArguments<T>& a, const ExciteArguments<T>& excite) {
  const InvertedResidualShape& s = a.shape;
  PointwiseArguments<T> p;
  p.x = a.d;
  p.weight = a.project_weight;
  p.bias = a.project_bias.data;
  p.bias_float32 = a.project_bias.float32;
  p.gate = excite.gates;
  p.residual = a.residual;
  p.y = a.y;
  p.shape = {s.batch, s.expanded, s.out_channels, s.out_height, s.out_width, s.out_height, s.out_width, 1, 1};
  p.tf32 = tf32;
  return p;
}

// With squeeze-excite in several launches: a.d is needed, too.
template <class T, bool tf32>
void inverted_residual_excited(InvertedResidualArguments<T> a, const ExciteArguments<T>& excite, cudaStream_t stream) {
  if (empty(a.shape)) return;
  GateArguments<T> gate = gate_arguments(a.shape, excite);
  gate.partial = a.partial = excite.workspace;
  gate.hidden = excite.workspace + gate.batch * gate.chunks * gate.channels;
  inverted_residual_squeeze<T, tf32>(a, stream);
  launch_gates(gate, stream);
  const PointwiseArguments<T> project = projection<T, tf32>(a, excite);
  vectorized(project) ? launch_forward<T, tf32, true>(project, stream) : launch_forward_generic(project, stream);
}

template <class T>
OnePassPlan make_one_pass_plan(const InvertedResidualShape& s, const ExciteArguments<T>& excite) {
  return make_one_pass_plan(s, gate_arguments(s, excite), make_plan<T>(squeeze_shape(s)));
}

// Whether one launch takes this problem, and gives the bits that several give: if they project on tensor cores, too. With
// these bits, the batch may decide which it is.
template <class T, bool tf32>
bool takes_one_pass(const InvertedResidualArguments<T>& a, const ExciteArguments<T>& excite) {
  if (!has_clusters() || empty(a.shape) || !vectorized(projection<T, tf32>(a, excite))) return false;
  bool known_window = false;
  with_window(a.shape, [&]<int K, int S>() { known_window = K > 0; });
  if (!known_window) return false;
  const OnePassPlan p = make_one_pass_plan(a.shape, excite);
  return p.bytes <= kClusterSharedBytes && a.shape.batch * p.ranks <= p.blocks() * multiprocessors();
}

// With squeeze-excite in one launch, where it fits: a.d, the gates and the workspace aren't needed.
template <class T, bool tf32>
void inverted_residual_one_pass(InvertedResidualArguments<T> a, const ExciteArguments<T>& excite, cudaStream_t stream) {
  const InvertedResidualShape s = a.shape;
  prepare(a, squeeze_shape(s));
  a.shape = s;
  const OnePassPlan p = make_one_pass_plan(s, excite);
  with_window(s, [&]<int K, int S>() {
    if constexpr (K > 0) launch_inverted_residual_one_pass<T, tf32, K, S>(a, gate_arguments(s, excite), p, stream);
  });
}

}  // namespace cnnfast::cuda
