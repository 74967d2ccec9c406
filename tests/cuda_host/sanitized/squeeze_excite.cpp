// The kernels of csrc/cuda/squeeze_excite.cuh on one host thread per CUDA thread, to be built with a sanitizer: NHWC and
// NCHW, vectorised and not, the gates in one launch and in two. Sums of small integers are exact, so both layouts, and
// vectors or not, have to give the same bits; they are compared with the reference in test_squeeze_excite.py.
#include "sanitized.h"

#include "cuda/squeeze_excite.cuh"

template <class T>
struct Problem {
  ExciteShape shape;
  Buffer<T> reduce_weight, expand_weight;
  Buffer<float> reduce_bias, expand_bias;
};

// As squeeze_excite, with every buffer as large as it has to be.
template <class T>
Buffer<T> run(const Problem<T>& p, const T* x, const T* residual, bool channels_last) {
  Buffer<T> y(p.shape.elements());
  SqueezeExciteArguments<T> a;
  a.x = x;
  a.residual = residual;
  a.y = y.get();
  a.shape = p.shape;
  a.shape.channels_last = channels_last;
  a.reduce_weight = p.reduce_weight.get();
  a.reduce_bias = {p.reduce_bias.get(), true};
  a.expand_weight = p.expand_weight.get();
  a.expand_bias = {p.expand_bias.get(), true};
  a.activation = a.post_activation = kRelu;
  a.gate_activation = kRelu6;
  const Buffer<float> workspace(squeeze_excite_workspace(a));
  a.workspace = workspace.get();
  squeeze_excite(a, nullptr);
  return y;
}

// The same values one element further, so that no vector is aligned.
template <class T>
Buffer<T> shifted(const Buffer<T>& from) {
  Buffer<T> to(from.count + 1);
  std::copy(from.get(), from.get() + from.count, to.get() + 1);
  return to;
}

template <class T>
Buffer<T> nchw(const Buffer<T>& nhwc, const ExciteShape& s) {
  Buffer<T> to(nhwc.count);
  for (int64_t i = 0; i < nhwc.count; ++i) {
    const int64_t image = i / s.channels / s.pixels, pixel = i / s.channels % s.pixels, channel = i % s.channels;
    to.get()[(image * s.channels + channel) * s.pixels + pixel] = nhwc.get()[i];
  }
  return to;
}

// pixels: a power of 2, or the means' rounding would show the order of the sums.
template <class T>
bool check(int64_t batch, int channels, int squeezed, int pixels) {
  const ExciteShape s{batch, channels, squeezed, pixels, true};
  const Problem<T> p{s, integers<T>(int64_t{squeezed} * channels), integers<T>(int64_t{channels} * squeezed),
                     integers<float>(squeezed), integers<float>(channels)};
  const Buffer<T> x = integers<T>(s.elements()), residual = integers<T>(s.elements());
  const Buffer<T> fast = run(p, x.get(), residual.get(), true);
  const Buffer<T> slow = run(p, shifted(x).get() + 1, shifted(residual).get() + 1, true);
  if (GateArguments<T>{.channels = channels, .squeezed = squeezed}.one_launch()) {
    const Buffer<T> x_nchw = nchw(x, s), residual_nchw = nchw(residual, s);
    const Buffer<T> fast_nchw = run(p, x_nchw.get(), residual_nchw.get(), false);
    const Buffer<T> slow_nchw = run(p, shifted(x_nchw).get() + 1, residual_nchw.get(), false);
    if (!equal("NCHW", fast_nchw, nchw(fast, s)) || !equal("NCHW by elements", slow_nchw, fast_nchw)) return false;
  }
  return equal("by elements", slow, fast);
}

template <class T>
bool check_all() {
  return check<T>(2, 2 * kVec<T>, 3, 64) && check<T>(1, 34 * kVec<T>, kVec<T>, 4) && check<T>(1, 3, 1, 1024) &&
         (sizeof(T) == 4 || check<T>(1, 264, 125, 2));  // slow: shuffles of host threads
}

SANITIZED_MAIN(check_all)
