// The curved activations of every table against the C library's double functions, over float32 numbers: how far off they
// are at most, and what they make of special values.
//
//   activations errors STEP [LEAST MOST]   over every STEP-th float, or those with LEAST <= |x| < MOST; prints, per table and
//                                          activation: the largest |y - f(x)| / (2^-24 |f(x)|), where; the largest
//                                          |y' - f'(x)| / 2^-24, where
//   activations special                    prints, per table and activation, y and y' of the special values in hex
//
// ACTIVATIONS_FAULT=tanh shifts one of its results by 16 units, to show that it is looked at.
#include "cpu_host.h"

namespace host {
namespace {

constexpr double kUnit = 0x1p-24;

// Below it, y is 0.
float zero_below(int64_t code) { return code == 3 || code == 4 ? -87.3f : code == 5 ? -12.7f : -INFINITY; }

// y of many x, as channels of one pixel that nothing is done to.
void values(const KernelTable& table, int64_t code, const std::vector<float>& x, std::vector<float>& y) {
  const int64_t count = static_cast<int64_t>(x.size());
  table.scale_channels[0](
      {x.data(), count, nullptr, nullptr, nullptr, y.data(), count, Storage::f32, 1, count, activation(code)});
}
void slopes(const KernelTable& table, int64_t code, const std::vector<float>& x, std::vector<float>& y) {
  std::fill(y.begin(), y.end(), 1.0f);
  table.activation_grad[0]({y.data(), x.data(), static_cast<int64_t>(x.size()), activation(code)});
}

struct Largest {
  double error = 0;
  float at = 0;
  void add(double e, float x) {
    if (!(e <= error)) error = e, at = x;  // a NaN counts
  }
};

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

int errors(uint64_t step, float least, float most) {
  const std::vector<const KernelTable*> all = tables();
  const char* fault = std::getenv("ACTIVATIONS_FAULT");
  std::vector<Largest> value_errors(all.size() * kActivations), slope_errors(all.size() * kActivations);
  std::vector<float> x(1 << 12), y(x.size());
  std::vector<double> value(x.size()), slope_of(x.size());
  for (uint64_t bits = 0; bits < uint64_t{1} << 32;) {
    size_t count = 0;
    for (; count < x.size() && bits < uint64_t{1} << 32; bits += step) {
      const float candidate = from_bits(static_cast<uint32_t>(bits));
      if (std::abs(candidate) >= least && std::abs(candidate) < most) x[count++] = candidate;  // no NaN, no Inf
    }
    if (count == 0) break;
    std::fill(x.begin() + static_cast<int64_t>(count), x.end(), 1.0f);
    for (int64_t code = kFirstCurve; code < kActivations; ++code) {
      for (size_t i = 0; i < count; ++i) value[i] = activated(code, x[i]), slope_of[i] = slope(code, x[i]);
      for (size_t t = 0; t < all.size(); ++t) {
        const size_t at = t * kActivations + static_cast<size_t>(code);
        values(*all[t], code, x, y);
        if (fault && std::string(fault) == activation_name(code))
          y[0] += 16 * static_cast<float>(kUnit) * std::abs(y[0]);
        for (size_t i = 0; i < count; ++i) {
          if (x[i] < zero_below(code)) {
            value_errors[at].add(y[i] == 0 ? 0 : kInf, x[i]);
          } else {
            value_errors[at].add(std::abs(y[i] - value[i]) / (kUnit * std::max(std::abs(value[i]), 0x1p-126)), x[i]);
          }
        }
        slopes(*all[t], code, x, y);
        for (size_t i = 0; i < count; ++i) slope_errors[at].add(std::abs(y[i] - slope_of[i]) / kUnit, x[i]);
      }
    }
  }
  for (size_t t = 0; t < all.size(); ++t)
    for (int64_t code = kFirstCurve; code < kActivations; ++code) {
      const Largest v = value_errors[t * kActivations + static_cast<size_t>(code)];
      const Largest s = slope_errors[t * kActivations + static_cast<size_t>(code)];
      std::printf("%s %s %.3f %.9g %.3f %.9g\n", all[t]->isa, activation_name(code), v.error, v.at, s.error, s.at);
    }
  return 0;
}

int special() {
  const float inf = INFINITY;
  std::vector<float> x{NAN,        -NAN,      inf,        -inf,      0.0f,       -0.0f,           0x1p-149f,
                       -0x1p-149f, 0x1p-127f, -0x1p-127f, 0x1p-126f, -0x1p-126f, 0x1.fffffep127f, -0x1.fffffep127f,
                       1e30f,      -1e30f};
  std::vector<float> y(x.size()), dy(x.size());
  for (const KernelTable* table : tables())
    for (int64_t code = kFirstCurve; code < kActivations; ++code) {
      values(*table, code, x, y);
      slopes(*table, code, x, dy);
      for (size_t i = 0; i < x.size(); ++i)
        std::printf("%s %s %a %a %a\n", table->isa, activation_name(code), x[i], y[i], dy[i]);
    }
  return 0;
}

}  // namespace
}  // namespace host

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "special") return host::special();
  if (what == "errors" && (argc == 3 || argc == 5))
    return host::errors(std::strtoull(argv[2], nullptr, 10), argc == 5 ? std::strtof(argv[3], nullptr) : 0.0f,
                        argc == 5 ? std::strtof(argv[4], nullptr) : INFINITY);
  return std::fprintf(stderr, "usage: activations errors STEP [LEAST MOST] | special\n"), 2;
}
