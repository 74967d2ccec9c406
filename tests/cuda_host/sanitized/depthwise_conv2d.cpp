// The kernels of csrc/cuda/depthwise_conv2d.cuh on one host thread per CUDA thread, to be built with a sanitizer: forward,
// both gradients and the packed form, vectorised and generic, on small problems with every kind of edge. Their results
// are compared with each other's here; with the reference in test_depthwise_conv2d.py.
#include "sanitized.h"

#include "cuda/depthwise_conv2d.cuh"

template <class T>
struct Results {
  Buffer<T> y, dx, dweight;
  Buffer<float> dbias;
};

template <class T>
Results<T> run(const DepthwiseShape& s, const T* x, const Buffer<T>& gradient, const Parameter& weight,
               const Parameter& bias) {
  Results<T> r{Buffer<T>(gradient.count), Buffer<T>(s.batch * s.channels * s.height * s.width),
               Buffer<T>(s.out_channels() * s.taps()), Buffer<float>(s.out_channels())};
  depthwise_conv2d_forward<T>({x, weight, bias, {}, nullptr, r.y.get(), s, kRelu, kRelu6}, nullptr);
  const Buffer<T> masked(gradient.count);
  const Buffer<Accumulate<T>> partial(depthwise_conv2d_workspace<T>(s, kRelu6).sums);
  depthwise_conv2d_backward<T>({gradient.get(), x, weight, bias, s, kRelu, kRelu6, masked.get(), partial.get(),
                                r.dx.get(), r.dweight.get(), r.dbias.get()},
                               nullptr);
  return r;
}

// y by the packed form, for the same weights.
template <class T>
Buffer<T> run_packed(const DepthwiseShape& s, const Buffer<T>& x, const Buffer<T>& weight, const Buffer<float>& bias,
                     int64_t y_count) {
  const int64_t bytes =
      packed_bytes(PackedOp::depthwise_conv2d, s.channels, s.channels, s.channels, s.kernel_h, s.kernel_w, 4);
  const Buffer<float> packing(bytes / 4);
  const PackedWeights p = packed_weights(packing.get(), s, 4);
  std::memcpy(packing.get(), &p.check.expected, sizeof(PackedHeader));
  float* const section = packing.get() + sizeof(PackedHeader) / 4;
  for (int c = 0; c < s.channels; ++c) {
    section[c] = bias.get()[c];
    for (int tap = 0; tap < s.taps(); ++tap)
      section[(1 + tap) * p.weight.tap_stride + c] = widen(weight.get()[c * s.taps() + tap]);
  }
  Buffer<T> y(y_count);
  depthwise_conv2d_forward<T>({x.get(), p.weight, p.bias, p.check, nullptr, y.get(), s, kRelu, kRelu6}, nullptr);
  return y;
}

// The vectorised kernels' results against the generic ones'.
template <class T>
bool check(int channels, int height, int width, int k, int stride, int pad_before, int pad_after) {
  const int64_t padding[] = {pad_before, pad_after};
  const Axis vertical = output_axis(height, k, stride, 1, padding),
             horizontal = output_axis(width, k, stride, 1, padding);
  const DepthwiseShape s{2,      channels,   1,          height, width, vertical.out, horizontal.out, k, k, stride,
                         stride, pad_before, pad_before, 1,      1,     true};
  const Buffer<T> x = integers<T>(s.batch * channels * height * width);
  const Buffer<T> gradient = integers<T>(s.batch * channels * s.out_height * s.out_width);
  const Buffer<T> weight = integers<T>(channels * k * k);
  const Buffer<float> bias = integers<float>(channels);
  for (int c = 0; c < channels; ++c) bias.get()[c] += 0.5f;
  const Parameter w{weight.get(), sizeof(T) == 4, s.taps(), 1}, b{bias.get(), true, 1, 0};

  const Results<T> fast = run(s, x.get(), gradient, w, b);
  const Buffer<T> packed_y = run_packed(s, x, weight, bias, gradient.count);
  const Buffer<T> shifted(x.count + 1);  // not on 16 bytes, what only the generic kernels take
  std::copy(x.get(), x.get() + x.count, shifted.get() + 1);
  const Results<T> slow = run(s, shifted.get() + 1, gradient, w, b);
  return equal("y", fast.y, slow.y) && equal("packed y", packed_y, slow.y) && equal("dx", fast.dx, slow.dx) &&
         equal("dweight", fast.dweight, slow.dweight) && equal("dbias", fast.dbias, slow.dbias) && !host::trapped;
}

template <class T>
bool check_all() {
  return check<T>(2 * kVec<T>, 5, 7, 3, 1, 1, 1) && check<T>(kVec<T>, 4, 6, 3, 2, 0, 1) &&
         check<T>(kVec<T>, 6, 5, 5, 1, 2, 2) && check<T>(3 * kVec<T>, 7, 7, 5, 2, 1, 2) &&
         check<T>(34 * kVec<T>, 2, 3, 3, 2, 1, 0);
}

SANITIZED_MAIN(check_all)
