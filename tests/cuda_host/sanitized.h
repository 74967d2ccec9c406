// What the programs in sanitized/ share: <op>.cpp runs the op's kernels on one host thread per CUDA thread, built with a
// sanitizer, and prints "all equal" where their results are those of its own plain loops or of each other.
#pragma once
#include "cuda_host.h"

#include <cmath>
#include <cstdio>

#include "cuda/device.cuh"

using namespace cnnfast;
using namespace cnnfast::cuda;

// Exactly as large as asked for, aligned as the GPU's allocator aligns, NaN-filled.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : count(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, count * sizeof(T)) != 0) std::abort();
    data.reset(static_cast<T*>(memory));
    for (int64_t i = 0; i < count; ++i) get()[i] = narrow<T>(std::numeric_limits<Accumulate<T>>::quiet_NaN());
  }
  T* get() const { return data.get(); }
  int64_t count;
  std::unique_ptr<T, host::Free> data;
};

inline unsigned state = 1;
template <class T>
Buffer<T> integers(int64_t count) {  // -3 to 3: sums are exact, in any order
  Buffer<T> b(count);
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525 + 1013904223;
    b.get()[i] = narrow<T>(static_cast<float>(state >> 16) - (state >> 16) / 7 * 7.0f - 3);
  }
  return b;
}

template <class T>
bool equal(const char* name, const Buffer<T>& a, const Buffer<T>& b) {
  for (int64_t i = 0; i < a.count; ++i)
    if (!(widen(a.get()[i]) == widen(b.get()[i]))) {
      std::printf("%s[%ld] is %g in the one, %g in the other\n", name, static_cast<long>(i), double(widen(a.get()[i])),
                  double(widen(b.get()[i])));
      return false;
    }
  return true;
}

// main() of such a program: check_all<T>() for float and for bfloat16.
#ifdef __SANITIZE_THREAD__  // slow, and what races doesn't depend on the type
#define SANITIZED_MAIN(check_all) SANITIZED_MAIN_OF(check_all<__nv_bfloat16>())
#else
#define SANITIZED_MAIN(check_all) SANITIZED_MAIN_OF(check_all<float>() && check_all<__nv_bfloat16>())
#endif
#define SANITIZED_MAIN_OF(checks)                       \
  int main() {                                          \
    host::settings.order = host::Order::threads;        \
    const bool right = checks;                          \
    std::printf(right ? "all equal\n" : "not equal\n"); \
    return !right;                                      \
  }
