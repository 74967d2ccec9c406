// The comparison of a KernelTable's results with exact ones, and what to draw for it. The other headers' testers are bases of
// one another, down to that of kernels.cpp: they draw from one sequence.
#pragma once
#include "cpu_host.h"

namespace host {

// Errors of the curved activations and of their slopes: csrc/cpu/kernels/activations.h, in 2^-24 (for double in 2^-53).
constexpr double kCurveError = 10, kSlopeError = 6;

constexpr int64_t kSizes[] = {1, 3, 15, 16, 17, 31, 40, 64, 97};  // channels

class Tester {
 public:
  Tester(const KernelTable& table, uint64_t seed)
      : table_(table), random_{seed}, fault_(std::getenv("KERNELS_FAULT") ? std::getenv("KERNELS_FAULT") : "") {}

  int64_t compared() const { return compared_; }

 protected:
  int pair() const { return compute_ == Storage::f64; }
  Storage output_storage() {
    constexpr Storage kNarrow[] = {Storage::f32, Storage::bf16, Storage::f16};
    return compute_ == Storage::f64 ? Storage::f64 : random_.one_of(kNarrow);
  }

  // size: the sum of what was added up, as absolute values. error: further, in units of the compute type's roundoff.
  void expect(const char* function, const Buffer& y, int64_t i, double ref, double size, int64_t terms,
              double error = 0) {
    const double roundoff = compute_ == Storage::f64 ? 0x2p-53 : 0x1p-24, u = unit_roundoff(y.storage());
    const double smallest = std::ldexp(1.0, least_exponent(y.storage()));
    const double bound = u * std::max(std::abs(ref), smallest) +
                         roundoff * (1.13 * (4 + std::sqrt(static_cast<double>(terms)) / 2) * size + error);
    double got = y[i];
    if (fault_ == function) got += 2 * bound;
    ++compared_;
    if (got == ref || std::abs(got - ref) <= bound || (std::isnan(got) && std::isnan(ref))) return;
    fail(function, i, got, ref, bound);
  }
  void expect_gap(const char* function, const Buffer& y, int64_t i) {
    if (!y.untouched(i) || fault_ == "gap") fail(function, i, y[i], std::nan(""), 0);
  }
  [[noreturn]] void fail(const char* function, int64_t i, double got, double ref, double bound) {
    std::printf("%s %s: element %lld is %.9g, wanted %.9g +- %.3g; %s\n", table_.isa, function,
                static_cast<long long>(i), got, ref, bound, context_.c_str());
    std::exit(1);
  }
  // What the case is, for a failure's line: context("channels", c, "kernel", k, ...).
  template <class... Facts>
  void context(const Facts&... facts) {
    context_.clear();
    (tell(facts), ...);
  }
  void tell(const char* name) { context_ += std::string(context_.empty() ? "" : ", ") + name; }
  void tell(int64_t value) { context_ += " " + std::to_string(value); }

  // One axis of a convolution that has at least one output.
  struct Axis {
    int64_t size, kernel, stride, dilation, pad, out;
  };
  Axis axis(int64_t kernel, int64_t stride, int64_t dilation) {
    Axis a{1 + random_.below(14), kernel, stride, dilation, random_.below((kernel - 1) * dilation + 1), 0};
    const int64_t extent = (kernel - 1) * dilation + 1, after = random_.below(extent);
    a.size = std::max(a.size, extent - a.pad - after);
    a.out = (a.size + a.pad + after - extent) / stride + 1;
    return a;
  }
  // Often what the unrolled kernels take: 3 x 3 and 5 x 5, stride 1 or 2.
  std::pair<Axis, Axis> axes() {
    const bool unrolled = random_.below(3) > 0;
    const int64_t k = random_.one_of({3, 5}), s = 1 + random_.below(2);
    const auto one = [&] {
      return unrolled ? axis(k, s, 1) : axis(1 + random_.below(5), 1 + random_.below(3), 1 + random_.below(2));
    };
    const Axis first = one();
    return {first, one()};
  }
  static Window window(const Axis& v, const Axis& h) {
    return {v.kernel, h.kernel, v.stride, h.stride, v.dilation, h.dilation, v.pad, h.pad};
  }
  // f(output, tap) for the outputs along an axis that read position `in`; f(input, tap) for the inputs of output `out`.
  template <class F>
  static void outputs(const Axis& a, int64_t in, F f) {
    for (int64_t o = 0; o < a.out; ++o)
      for (int64_t tap = 0; tap < a.kernel; ++tap)
        if (o * a.stride - a.pad + tap * a.dilation == in) f(o, tap);
  }
  template <class F>
  static void inputs(const Axis& a, int64_t out, F f) {
    for (int64_t tap = 0; tap < a.kernel; ++tap) {
      const int64_t in = out * a.stride - a.pad + tap * a.dilation;
      if (in >= 0 && in < a.size) f(in, tap);
    }
  }

  const KernelTable& table_;
  Random random_;
  const std::string fault_;
  std::string context_;
  Storage compute_ = Storage::f32;
  int64_t compared_ = 0;
};

}  // namespace host
