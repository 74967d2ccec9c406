// A packing's header and sections, as csrc/packing.h lays them out: written one after the other.
#pragma once
#include <cstring>

#include "common.h"

namespace cnnfast::cpu {

// S: the compute type, of which all scalars are but bfloat16 pairs.
template <class S>
class PackedWriter {
 public:
  PackedWriter(PackedOp op, int64_t in, int64_t mid, int64_t out, int64_t kernel_h, int64_t kernel_w,
               const Tensor& like, int64_t squeezed = 0, bool no_expansion = false, bool winograd = false)
      : pairs_(like.scalar_type() == ScalarType::BFloat16 && has_pairs(op)),
        packed_(torch::stable::empty(
            Ints{packed_bytes(op, in, mid, out, winograd ? kWinogradTile : kernel_h,
                              winograd ? kWinogradTile : kernel_w, itemsize(), squeezed, no_expansion)},
            ScalarType::Byte, std::nullopt, like.device())) {
    PackedHeader header{};
    header.magic = kPackedMagic;
    header.version = kPackedVersion;
    header.op = op;
    header.itemsize = static_cast<int32_t>(itemsize());
    header.in_channels = static_cast<int32_t>(in);
    header.mid_channels = static_cast<int32_t>(mid);
    header.out_channels = static_cast<int32_t>(out);
    header.kernel_h = static_cast<int32_t>(kernel_h);
    header.kernel_w = static_cast<int32_t>(kernel_w);
    header.squeezed_channels = static_cast<int32_t>(squeezed);
    header.no_expansion = no_expansion ? 1 : 0;
    header.winograd = winograd ? 1 : 0;
    std::memcpy(packed_.mutable_data_ptr(), &header, sizeof(header));
    next_ = mutable_bytes_of(packed_) + sizeof(header);
  }

  void depthwise(const Tensor& weight, const Maybe& bias, const Maybe& scale = std::nullopt) {
    const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3);
    const int64_t padded = round_up(channels, kPanel);
    write_row(bias, 0, channels, padded);
    const Tensor dense = scaled(weight, scale);
    const S* w = static_cast<const S*>(dense.const_data_ptr());
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < padded; ++c) write(c < channels ? w[c * taps + t] : S{0});
  }

  void pointwise(const Tensor& weight, const Maybe& bias, const Maybe& scale = std::nullopt) {
    panels(weight, bias, scale, pairs_);
  }
  void excite(const Tensor& weight, const Maybe& bias) { panels(weight, bias, std::nullopt, false); }

  // The products' weights G g G^T, in double before they are rounded.
  void winograd(const Tensor& weight, const Maybe& bias, const Maybe& scale) {
    const int64_t out = weight.size(0), in = weight.size(1);
    write_row(bias, 0, out, round_up(out, kPanel));
    const Tensor dense = scaled(weight, scale);
    const S* w = static_cast<const S*>(dense.const_data_ptr());
    constexpr double kTransform[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    std::vector<S> product(out * in);
    for (const auto& vertical : kTransform)
      for (const auto& horizontal : kTransform) {
        for (int64_t i = 0; i < out * in; ++i) {
          double sum = 0;
          for (int tap = 0; tap < 9; ++tap) sum += vertical[tap / 3] * horizontal[tap % 3] * w[i * 9 + tap];
          product[i] = static_cast<S>(sum);
        }
        panels_of<S, 1>(product.data(), in, in, out, round_up(out, kPanel));
      }
  }

  Tensor done() const { return packed_; }

 private:
  static bool has_pairs(PackedOp op) { return op != PackedOp::depthwise_conv2d && op != PackedOp::squeeze_excite; }
  int64_t itemsize() const { return pairs_ ? 2 : static_cast<int64_t>(sizeof(S)); }

  static Tensor scalars(const Tensor& t) {
    return torch::stable::contiguous(to_dtype(t, sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float));
  }

  // The scalars of a weight, each times its output channel's scale.
  static Tensor scaled(const Tensor& weight, const Maybe& scale) {
    if (!scale) return scalars(weight);
    const Tensor dense = scalars(weight), factors = scalars(*scale), product = torch::stable::empty_like(dense);
    const int64_t out = dense.size(0), each = dense.numel() / std::max<int64_t>(1, out);
    const S *w = static_cast<const S*>(dense.const_data_ptr()), *s = static_cast<const S*>(factors.const_data_ptr());
    S* const p = static_cast<S*>(product.mutable_data_ptr());
    for (int64_t i = 0; i < out * each; ++i) p[i] = w[i] * s[i / each];
    return product;
  }

  template <class T>
  void write(T value) {
    std::memcpy(next_, &value, sizeof(value));
    next_ += sizeof(value);
  }

  // A bias or a scale; `absent` for each channel where there is none.
  void write_row(const Maybe& row, S absent, int64_t channels, int64_t padded) {
    const Tensor dense = row ? scalars(*row) : Tensor();
    const S* values = row ? static_cast<const S*>(dense.const_data_ptr()) : nullptr;
    for (int64_t c = 0; c < padded; ++c) write(c >= channels ? S{0} : values ? values[c] : absent);
  }

  void panels(const Tensor& weight, const Maybe& bias, const Maybe& scale, bool pairs) {
    const int64_t out = weight.size(0), in = weight.size(1), padded = round_up(out, kPanel);
    write_row(bias, 0, out, padded);
    if (pairs) write_row(scale, 1, out, padded);
    const Tensor dense = pairs ? torch::stable::contiguous(weight) : scaled(weight, scale);
    if (pairs)
      panels_of<uint16_t, 2>(static_cast<const uint16_t*>(dense.const_data_ptr()), in, round_up(in, kPairDepth), out,
                             padded);
    else
      panels_of<S, 1>(static_cast<const S*>(dense.const_data_ptr()), in, in, out, padded);
  }

  // T: what a weight is copied as; Together: how many of the depth lie side by side.
  template <class T, int64_t Together>
  void panels_of(const T* w, int64_t in, int64_t depth, int64_t out, int64_t padded) {
    for (int64_t first = 0; first < padded; first += kPanel) {
      int64_t done = 0;
      // Whole panels are their weights turned on their side: floats, or words of two side by side.
      if (sizeof(T) * Together == 4 && first + kPanel <= out && in % Together == 0) {
        kernels(Storage::f32).transpose({w + first * in, in / Together, kPanel, in / Together, next_, kPanel});
        next_ += in * kPanel * static_cast<int64_t>(sizeof(T));
        done = in;
      }
      for (int64_t k = done; k < depth; k += Together)
        for (int64_t lane = 0; lane < kPanel; ++lane)
          for (int64_t i = k; i < k + Together; ++i)
            write(first + lane < out && i < in ? w[(first + lane) * in + i] : T{0});
    }
  }

  bool pairs_;
  Tensor packed_;
  char* next_;
};

}  // namespace cnnfast::cpu
