// Which instruction sets this CPU and its operating system have, which of them were built, and the one in use.
// No torch: libcnnfast_ops (which dispatches by it) and the bindings (which report it) share this file.
// Built ones are named by macros that the build defines: CNNFAST_HAVE_AVX512 and so on.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace cnnfast {

enum class Isa { generic, avx2, avx512, amx };  // from the least to the most preferred
constexpr Isa kIsas[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::amx};

constexpr const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::amx: return "amx";
  }
  return "unknown";
}

constexpr bool isa_built(Isa isa) {
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2:
#ifdef CNNFAST_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#ifdef CNNFAST_HAVE_AVX512
      return true;
#else
      return false;
#endif
    case Isa::amx:
#if defined(CNNFAST_HAVE_AVX512) && defined(CNNFAST_HAVE_AMX)
      return true;
#else
      return false;
#endif
  }
  return false;
}

// Linux saves AMX's tiles only for a process that has asked (arch_prctl, Linux 5.16): asks, and says whether it does.
inline bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
inline bool cpu_has(Isa isa) {
  if (isa == Isa::generic) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // cpuid's bit itself: __builtin_cpu_supports knows no "f16c" before g++ 11 and clang++ 15.
  const auto has_f16c = [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // AMX's tiles and its bfloat16 product, and AVX-512's bfloat16: not every compiler that builds the kernels knows the names.
  const auto has_amx_bf16 = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1) &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  };
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::amx: return avx512 && has_amx_bf16() && may_use_tiles();
  }
#endif
  return false;
}

inline std::vector<std::string> names_of_isas(bool (*which)(Isa)) {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (which(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

// The best one that was built and that the CPU has, or the one that $CNNFAST_ISA names.
// Throws std::runtime_error, one sentence, where that one can't run here. Ask once, at load, and keep the answer.
inline Isa choose_isa() {
  const char* wish = std::getenv("CNNFAST_ISA");
  const bool wished = wish != nullptr && *wish != '\0';
  Isa best = Isa::generic;
  for (Isa isa : kIsas) {
    const bool runs = isa_built(isa) && cpu_has(isa);
    if (wished && std::string(wish) == isa_name(isa)) {
      if (runs) return isa;
      throw std::runtime_error(std::string("CNNFAST_ISA=") + wish +
                               (isa_built(isa) ? " can't run: this CPU lacks it" : " can't run: it was not built"));
    }
    if (runs) best = isa;
  }
  if (wished) {
    std::string names;
    for (Isa isa : kIsas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    throw std::runtime_error(std::string("CNNFAST_ISA is '") + wish + "'; it can be one of: " + names);
  }
  return best;
}

}  // namespace cnnfast
