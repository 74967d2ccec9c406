// The kernels of csrc/cuda/pointwise_conv2d.cuh: that on tensor cores, with every tile, against the generic one, on small
// problems with every kind of edge. With the reference they are compared in test_pointwise_conv2d.py.
#include "sanitized.h"

#include "cuda/pointwise_conv2d.cuh"

struct Problem {
  int batch, channels, out_channels, height, width, stride;
  bool gate;
};

template <class T>
bool check(const Problem& p, int multiprocessors, bool tf32 = false) {
  host::settings.multiprocessors = multiprocessors;
  const PointwiseShape s{p.batch,
                         p.channels,
                         p.out_channels,
                         p.height,
                         p.width,
                         ceil_div(p.height, p.stride),
                         ceil_div(p.width, p.stride),
                         p.stride,
                         p.stride};
  const int64_t x_count = s.batch * s.height * s.width * s.channels, y_count = s.batch * s.image() * s.out_channels;
  const Buffer<T> x = integers<T>(x_count), weight = integers<T>(static_cast<int64_t>(s.channels) * s.out_channels),
                  gate = integers<T>(s.batch * s.channels), residual = integers<T>(y_count);
  const Buffer<float> bias = integers<float>(s.out_channels);
  const Buffer<T> fast(y_count), slow(y_count), shifted(x_count + 1);
  std::copy(x.get(), x.get() + x_count, shifted.get() + 1);  // not on 16 bytes, what only the generic kernel takes
  PointwiseArguments<T> a{x.get(),        weight.get(), bias.get(), true,  p.gate ? gate.get() : nullptr,
                          residual.get(), fast.get(),   s,          kRelu, tf32};
  pointwise_conv2d_forward(a, nullptr);
  a.x = shifted.get() + 1;
  a.y = slow.get();
  pointwise_conv2d_forward(a, nullptr);
  return equal("y", fast, slow);
}

template <class T>
bool check_all() {
  constexpr int v = kVec<T>;
  const Problem narrow{1, 5 * v, v, 3, 5, 1, false}, wide{2, 9 * v, 64 + 2 * v, 3, 11, 1, true},
      sampled{3, 2 * v, 17 * v, 5, 6, 2, false};
  return check<T>(narrow, 132) && check<T>(wide, 0) && check<T>(wide, 132) && check<T>(sampled, 0) &&
         check<T>({1, 4 * v, 40, 1, 1, 1, true}, 0) && check<T>(sampled, 0, true);
}

SANITIZED_MAIN(check_all)
