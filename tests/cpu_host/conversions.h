// Conversions of bfloat16 and float16 (csrc/cpu/kernels/vec.h): all of their numbers widened, floats rounded to the nearest.
#pragma once
#include "channels.h"

namespace host {

class ConversionsTester : public ChannelsTester {
 public:
  using ChannelsTester::ChannelsTester;

 protected:
  void widen(Storage storage) {
    compute_ = storage == Storage::f64 ? Storage::f64 : Storage::f32;
    const int64_t count = 1 + random_.below(70);
    context("storage", static_cast<int>(storage), "count", count);
    Buffer x(storage, count), y(compute_, count);
    x.draw(random_);
    table_.widen[static_cast<int>(storage)](x.data(), y.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      if (y[i] != x[i] || fault_ == "widen") fail("widen", i, y[i], x[i], 0);
    }
  }

  // All 2^16 of them: subnormal, infinite and NaN too.
  void every_16_bits(Storage storage) {
    compute_ = Storage::f32;
    context("storage", static_cast<int>(storage));
    Buffer x(storage, 1 << 16), y(Storage::f32, 1 << 16);
    for (int64_t i = 0; i < x.count(); ++i) x.put(i, static_cast<uint16_t>(i));
    table_.widen[static_cast<int>(storage)](x.data(), y.data(), x.count());
    for (int64_t i = 0; i < x.count(); ++i) {
      if (std::isnan(x[i]) ? !std::isnan(y[i]) : y[i] != x[i] || std::signbit(y[i]) != std::signbit(x[i]))
        fail("widen", i, y[i], x[i], 0);
    }
  }

  // float32 numbers of all magnitudes, and ties, through a product of no depth, which only stores its bias.
  void rounding(Storage storage) {
    compute_ = Storage::f32;
    context("storage", static_cast<int>(storage));
    const int64_t count = 1 << 15;
    Buffer bias(Storage::f32, count), y(storage, count), nothing(Storage::f32, kPanel);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits = static_cast<uint32_t>(random_.bits());
      if (i % 4 == 1) bits = 0x33000000u + bits % 0x15000000u;           // float16's range
      if (i % 4 == 2) bits &= ~((1u << (23 - digits_of(storage))) - 1);  // ties
      if (i % 8 == 3)
        bits = (bits & 0x80000000u) | ((bits % 2 ? 0x7f7fffffu : 0x477ff001u) - bits / 2 % 3);  // the largest
      bias.put(i, bits);
    }
    table_.gemm[0]({nothing.data(), 1, 1, nothing.data(), 0, bias.data(), nullptr, 0, y.data(), count, Storage::f32,
                    Storage::f32, storage, 1, 0, count, activation(0)});
    for (int64_t i = 0; i < count; ++i) {
      const double ref = rounded_to(storage, bias[i]), got = y[i];
      if (fault_ == "rounding" || (std::isnan(ref) ? !std::isnan(got) : got != ref)) fail("rounding", i, got, ref, 0);
    }
  }
};

}  // namespace host
