// What the programs in this folder share: the tables that were linked, guarded buffers of any storage, the activations in
// double, and the comparison. No torch: it also compiles for machines that have none.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/kernels/kernels.h"

namespace host {

using namespace cnnfast;

inline constexpr double kInf = std::numeric_limits<double>::infinity();

// The tables of the linked objects (CNNFAST_HAVE_... as in the build) that this CPU can run.
inline std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> all;
#ifdef CNNFAST_HAVE_GENERIC
  all.push_back(&generic::table);
#endif
#ifdef CNNFAST_HAVE_AVX2
  if (cpu_has(Isa::avx2)) all.push_back(&avx2::table);
#endif
#ifdef CNNFAST_HAVE_AVX512
  if (cpu_has(Isa::avx512)) all.push_back(&avx512::table);
#ifdef CNNFAST_HAVE_AMX
  static const KernelTable with_amx = [] {
    KernelTable table = avx512::table;
    amx::add_to(table);
    return table;
  }();
  if (cpu_has(Isa::amx)) all.push_back(&with_amx);
#endif
#endif
  return all;
}

// SplitMix64 (Steele, Lea, Flood 2014).
struct Random {
  uint64_t state;
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  template <class T, size_t N>
  T one_of(const T (&values)[N]) {
    return values[below(N)];
  }
  // +-[1/4, 4) with eight significant bits, so that every storage holds it; now and then 0.
  double number() {
    if (below(16) == 0) return 0;
    return (below(2) ? -1 : 1) * std::ldexp(static_cast<double>(128 + below(128)), static_cast<int>(below(4)) - 9);
  }
};

inline int64_t size_of(Storage s) { return s == Storage::f64 ? 8 : s == Storage::f32 ? 4 : 2; }
inline int digits_of(Storage s) { return s == Storage::f64 ? 53 : s == Storage::f32 ? 24 : s == Storage::f16 ? 11 : 8; }
inline int least_exponent(Storage s) { return s == Storage::f64 ? -1022 : s == Storage::f16 ? -14 : -126; }
inline double unit_roundoff(Storage s) { return std::ldexp(1.0, -digits_of(s)); }

// x to the nearest number of a 16-bit storage, ties to even; beyond its largest, infinite.
inline double rounded_to(Storage s, double x) {
  if (!std::isfinite(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), least_exponent(s)), last = exponent - digits_of(s) + 1;
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
  return std::abs(y) >= std::ldexp(1.0, s == Storage::f16 ? 16 : 128) ? std::copysign(kInf, x) : y;
}

inline double decoded(Storage s, uint16_t bits) {
  const int mantissa_bits = digits_of(s) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << (15 - mantissa_bits)) - 1),
            mantissa = bits % (1 << mantissa_bits);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << (15 - mantissa_bits)) - 1) return mantissa ? std::nan("") : sign * kInf;
  const int shift = std::max(exponent, 1) - 1 + least_exponent(s) - mantissa_bits;
  return sign * std::ldexp(exponent ? mantissa + (1 << mantissa_bits) : mantissa, shift);
}

// The other way, for numbers that `number` draws, infinite ones and NaN.
inline uint16_t encoded(Storage s, double x) {
  if (x == 0) return 0;
  const int mantissa_bits = digits_of(s) - 1;
  if (!std::isfinite(x))
    return static_cast<uint16_t>((x < 0) << 15 | ((1 << (15 - mantissa_bits)) - 1) << mantissa_bits | std::isnan(x));
  const int e = std::ilogb(x);
  const int mantissa = static_cast<int>(std::ldexp(std::abs(x), mantissa_bits - e)) - (1 << mantissa_bits);
  return static_cast<uint16_t>((x < 0) << 15 | (e - least_exponent(s) + 1) << mantissa_bits | mantissa);
}

// Elements that end where a page ends that nobody may touch: to read or write past them is a fault, for masked vector
// instructions too, which sanitizers don't see. All bits are set at first, a NaN in every storage.
class Buffer {
 public:
  Buffer(Storage storage, int64_t count) : storage_(storage), count_(count) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = count * size_of(storage);
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, static_cast<size_t>(page), PROT_NONE)) std::abort();
    data_ = base_ + mapped_ - page - bytes;
    std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  ~Buffer() { munmap(base_, static_cast<size_t>(mapped_)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  Buffer& draw(Random& random) {
    for (int64_t i = 0; i < count_; ++i) set(i, random.number());
    return *this;
  }
  void set(int64_t i, double x) {
    if (storage_ == Storage::f64) return put(i, x);
    if (storage_ == Storage::f32) return put(i, static_cast<float>(x));
    put(i, encoded(storage_, x));
  }
  double operator[](int64_t i) const {
    if (storage_ == Storage::f64) return get<double>(i);
    if (storage_ == Storage::f32) return get<float>(i);
    return decoded(storage_, get<uint16_t>(i));
  }
  bool untouched(int64_t i) const {
    for (int64_t b = i * size_of(storage_); b < (i + 1) * size_of(storage_); ++b)
      if (static_cast<unsigned char>(data_[b]) != 0xff) return false;
    return true;
  }
  char* data() const { return data_; }
  char* at(int64_t i) const { return data_ + i * size_of(storage_); }
  Storage storage() const { return storage_; }
  int64_t count() const { return count_; }
  template <class T>
  void put(int64_t i, T x) {
    std::memcpy(data_ + i * static_cast<int64_t>(sizeof(T)), &x, sizeof(T));
  }
  template <class T>
  T get(int64_t i) const {
    T x;
    std::memcpy(&x, data_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return x;
  }

 private:
  Storage storage_;
  int64_t count_, mapped_;
  char *base_, *data_;
};

// --- activations, exactly: codes as in cnnfast/ops/activations.py ---

inline Activation activation(int64_t code) { return {code, code == 0 || code > 2 ? -kInf : 0, code == 2 ? 6 : kInf}; }
inline const char* activation_name(int64_t code) {
  constexpr const char* kNames[] = {"identity", "relu", "relu6", "sigmoid", "silu", "gelu", "tanh"};
  return kNames[code];
}
constexpr int64_t kActivations = 7, kFirstCurve = 3;

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double normal_integral(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

inline double activated(int64_t code, double x) {
  switch (code) {
    case 1: return x < 0 ? 0 : x;
    case 2: return x < 0 ? 0 : x > 6 ? 6 : x;
    case 3: return sigmoid(x);
    case 4: return x * sigmoid(x);
    case 5: return x * normal_integral(x);
    case 6: return std::tanh(x);
  }
  return x;
}

inline double slope(int64_t code, double x) {
  switch (code) {
    case 1: return x > 0;
    case 2: return x > 0 && x < 6;
    case 3: return sigmoid(x) * sigmoid(-x);
    case 4: return sigmoid(x) * (1 + x * sigmoid(-x));
    case 5: return normal_integral(x) + x * 0.39894228040143267794 * std::exp(-0.5 * x * x);
    case 6: return std::pow(std::cosh(x), -2);
  }
  return 1;
}

}  // namespace host
