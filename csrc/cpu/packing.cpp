// What each op packs: its checks and its sections, in their order; and a packing read back.
#include "packing.h"

#include "packed_writer.h"

namespace cnnfast::cpu {

namespace {

void check_row(const Maybe& row, int64_t channels, const char* name) {
  STD_TORCH_CHECK(!row || (row->dim() == 1 && row->size(0) == channels), name, " must have shape (", channels, ",)");
}

void check_depthwise(const Tensor& weight, const Maybe& bias, const Maybe& scale = std::nullopt) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1, "a depthwise weight must have shape (C, 1, kh, kw)");
  check_row(bias, weight.size(0), "the depthwise bias");
  check_row(scale, weight.size(0), "the depthwise scale");
}

void check_pointwise(const Tensor& weight, const Maybe& bias, const Maybe& scale = std::nullopt) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1,
                  "a pointwise weight must have shape (K, C, 1, 1)");
  check_row(bias, weight.size(0), "the pointwise bias");
  check_row(scale, weight.size(0), "the pointwise scale");
}

// f(S{}) with the compute type of the weight.
template <class F>
Tensor with_compute_type(const Tensor& weight, const F& f) {
  return storage_of(weight, "weight") == Storage::f64 ? f(double{}) : f(float{});
}

}  // namespace

Tensor pack_depthwise_conv2d(const Tensor& weight, const Maybe& bias) {
  check_depthwise(weight, bias);
  return with_compute_type(weight, [&](auto s) {
    // The input's channels aren't known from the weight alone; the op checks them against the output's.
    PackedWriter<decltype(s)> writer(PackedOp::depthwise_conv2d, weight.size(0), weight.size(0), weight.size(0),
                                     weight.size(2), weight.size(3), weight);
    writer.depthwise(weight, bias);
    return writer.done();
  });
}

Tensor pack_conv2d(const Tensor& weight, const Maybe& bias, const Maybe& scale, bool winograd) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have shape (K, C, kh, kw)");
  check_row(bias, weight.size(0), "bias");
  check_row(scale, weight.size(0), "scale");
  const int64_t out = weight.size(0), in = weight.size(1), kernel_h = weight.size(2), kernel_w = weight.size(3);
  if (winograd) {
    STD_TORCH_CHECK(kernel_h == 3 && kernel_w == 3 && weight.scalar_type() == ScalarType::Float,
                    "winograd wants float32 weights of 3 x 3 windows");
    PackedWriter<float> writer(PackedOp::conv2d, in, in, out, 3, 3, weight, 0, false, true);
    writer.winograd(weight, bias, scale);
    return writer.done();
  }
  // (K, kh, kw, C) in memory, seen as a pointwise weight; rows of pairs end in zeros.
  const Tensor by_taps = torch::stable::contiguous(
      torch::stable::transpose(torch::stable::transpose(weight, 1, 3), 1, 2), MemoryFormat::Contiguous);
  const int64_t scalars = kernel_w * in;
  const int64_t row = window_row(scalars, weight.scalar_type() == ScalarType::BFloat16 ? 2 : 4);
  Tensor rows = torch::stable::view(by_taps, {out * kernel_h, scalars});
  if (row > scalars) rows = torch::stable::pad(rows, {0, row - scalars});
  const Tensor flat = torch::stable::view(rows, {out, kernel_h * row, 1, 1});
  return with_compute_type(weight, [&](auto s) {
    PackedWriter<decltype(s)> writer(PackedOp::conv2d, in, in, out, kernel_h, kernel_w, weight);
    writer.pointwise(flat, bias, scale);
    return writer.done();
  });
}

Tensor pack_pointwise_conv2d(const Tensor& weight, const Maybe& bias, const Maybe& scale) {
  check_pointwise(weight, bias, scale);
  return with_compute_type(weight, [&](auto s) {
    PackedWriter<decltype(s)> writer(PackedOp::pointwise_conv2d, weight.size(1), weight.size(1), weight.size(0), 1, 1,
                                     weight);
    writer.pointwise(weight, bias, scale);
    return writer.done();
  });
}

Tensor pack_separable_conv2d(const Tensor& dw_weight, const Maybe& dw_bias, const Tensor& pw_weight,
                             const Maybe& pw_bias, bool pointwise_first, const Maybe& dw_scale, const Maybe& pw_scale) {
  check_depthwise(dw_weight, dw_bias, dw_scale);
  check_pointwise(pw_weight, pw_bias, pw_scale);
  const int64_t channels = dw_weight.size(0), pw_in = pw_weight.size(1), pw_out = pw_weight.size(0);
  if (pointwise_first) {
    STD_TORCH_CHECK(pw_out > 0 && channels % pw_out == 0, "dw_weight must have a multiple of ", pw_out, " channels");
  } else {
    STD_TORCH_CHECK(pw_in == channels, "pw_weight must have ", channels, " input channels");
  }
  return with_compute_type(dw_weight, [&](auto s) {
    using W = PackedWriter<decltype(s)>;
    const int64_t kh = dw_weight.size(2), kw = dw_weight.size(3);
    W writer = pointwise_first
                   ? W(PackedOp::separable_conv2d_pointwise_first, pw_in, pw_out, channels, kh, kw, dw_weight)
                   : W(PackedOp::separable_conv2d, channels, channels, pw_out, kh, kw, dw_weight);
    writer.depthwise(dw_weight, dw_bias, dw_scale);
    writer.pointwise(pw_weight, pw_bias, pw_scale);
    return writer.done();
  });
}

namespace {

// Checks squeeze-excite's weights for `channels`; how many it squeezes them to.
int64_t check_excite(const Tensor& reduce_weight, const Maybe& reduce_bias, const Tensor& expand_weight,
                     const Maybe& expand_bias, int64_t channels) {
  check_pointwise(reduce_weight, reduce_bias);
  check_pointwise(expand_weight, expand_bias);
  const int64_t squeezed = reduce_weight.size(0);
  STD_TORCH_CHECK(reduce_weight.size(1) == channels && expand_weight.size(1) == squeezed &&
                      expand_weight.size(0) == channels && squeezed > 0,
                  "squeeze-excite's weights must have shapes (R, ", channels, ", 1, 1) and (", channels, ", R, 1, 1)");
  return squeezed;
}

}  // namespace

Tensor pack_squeeze_excite(const Tensor& reduce_weight, const Maybe& reduce_bias, const Tensor& expand_weight,
                           const Maybe& expand_bias) {
  const int64_t channels = expand_weight.size(0);
  const int64_t squeezed = check_excite(reduce_weight, reduce_bias, expand_weight, expand_bias, channels);
  return with_compute_type(reduce_weight, [&](auto s) {
    PackedWriter<decltype(s)> writer(PackedOp::squeeze_excite, channels, channels, channels, 1, 1, reduce_weight,
                                     squeezed);
    writer.excite(reduce_weight, reduce_bias);
    writer.excite(expand_weight, expand_bias);
    return writer.done();
  });
}

Tensor pack_inverted_residual(const Maybe& expand_weight, const Maybe& expand_bias, const Tensor& dw_weight,
                              const Maybe& dw_bias, const Maybe& se_reduce_weight, const Maybe& se_reduce_bias,
                              const Maybe& se_expand_weight, const Maybe& se_expand_bias, const Tensor& project_weight,
                              const Maybe& project_bias, const Maybe& expand_scale, const Maybe& dw_scale,
                              const Maybe& project_scale) {
  check_depthwise(dw_weight, dw_bias, dw_scale);
  check_pointwise(project_weight, project_bias, project_scale);
  const int64_t expanded = dw_weight.size(0);
  if (expand_weight) check_pointwise(*expand_weight, expand_bias, expand_scale);
  STD_TORCH_CHECK((!expand_weight || expand_weight->size(0) == expanded) && project_weight.size(1) == expanded,
                  "expand_weight must have ", expanded, " output channels, project_weight as many input channels");
  STD_TORCH_CHECK(se_reduce_weight.has_value() == se_expand_weight.has_value(),
                  "se_reduce_weight and se_expand_weight must come together");
  const int64_t squeezed =
      se_reduce_weight ? check_excite(*se_reduce_weight, se_reduce_bias, *se_expand_weight, se_expand_bias, expanded)
                       : 0;
  return with_compute_type(dw_weight, [&](auto s) {
    PackedWriter<decltype(s)> writer(PackedOp::inverted_residual, expand_weight ? expand_weight->size(1) : expanded,
                                     expanded, project_weight.size(0), dw_weight.size(2), dw_weight.size(3), dw_weight,
                                     squeezed, !expand_weight);
    if (expand_weight) writer.pointwise(*expand_weight, expand_bias, expand_scale);
    writer.depthwise(dw_weight, dw_bias, dw_scale);
    if (squeezed) {
      writer.excite(*se_reduce_weight, se_reduce_bias);
      writer.excite(*se_expand_weight, se_expand_bias);
    }
    writer.pointwise(project_weight, project_bias, project_scale);
    return writer.done();
  });
}

PackedReader::PackedReader(const Tensor& packed, PackedOp op, const Tensor& x, int64_t mid, int64_t out,
                           int64_t kernel_h, int64_t kernel_w) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(),
                  "packed must be a contiguous one-dimensional uint8 tensor made by a pack_ function");
  STD_TORCH_CHECK(packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)), "packed has no header");
  header_ = reinterpret_cast<const PackedHeader*>(packed.const_data_ptr());
  STD_TORCH_CHECK(header_->magic == kPackedMagic, "packed is not a packing of cnnfast's");
  STD_TORCH_CHECK(header_->version == kPackedVersion, "packed has layout version ", header_->version, ", wanted ",
                  kPackedVersion, ": pack the weights again");
  STD_TORCH_CHECK(header_->op == op, "packed was made for another op");
  STD_TORCH_CHECK(mid < 0 || header_->mid_channels == mid, "packed has ", header_->mid_channels,
                  " channels inside, wanted ", mid);
  STD_TORCH_CHECK(header_->out_channels == out, "packed has ", header_->out_channels, " output channels, wanted ", out);
  STD_TORCH_CHECK(header_->kernel_h == kernel_h && header_->kernel_w == kernel_w, "packed has a ", header_->kernel_h,
                  " x ", header_->kernel_w, " kernel, wanted ", kernel_h, " x ", kernel_w);
  const Storage storage = storage_of(x, "x");
  const int64_t wanted = compute_size(storage);
  STD_TORCH_CHECK(header_->itemsize == wanted || (header_->itemsize == 2 && storage == Storage::bf16), "packed holds ",
                  header_->itemsize * 8, "-bit weights, x wants ", wanted * 8, "-bit ones");
  STD_TORCH_CHECK(packed.numel() == packed_bytes(op, header_->in_channels, header_->mid_channels, out,
                                                 header_->winograd ? kWinogradTile : kernel_h,
                                                 header_->winograd ? kWinogradTile : kernel_w, header_->itemsize,
                                                 header_->squeezed_channels, header_->no_expansion != 0),
                  "packed is truncated");
  next_ = bytes_of(packed) + sizeof(PackedHeader);
}

DepthwiseWeights PackedReader::depthwise(int64_t channels) {
  const int64_t padded = round_up(channels, kPanel), itemsize = header_->itemsize;
  const DepthwiseWeights weights{next_, next_ + padded * scalar_size(itemsize), channels, padded};
  next_ += depthwise_section(channels, header_->kernel_h * header_->kernel_w, itemsize);
  return weights;
}

PointwiseWeights PackedReader::section(int64_t in, int64_t out, int64_t itemsize) {
  const Storage storage = itemsize == 8 ? Storage::f64 : itemsize == 2 ? Storage::bf16 : Storage::f32;
  const int64_t row = round_up(out, kPanel) * scalar_size(itemsize);
  const char* const scale = storage == Storage::bf16 ? next_ + row : nullptr;
  const PointwiseWeights weights{next_, scale, next_ + (scale ? 2 : 1) * row, in, out, storage};
  next_ += pointwise_section(in, out, itemsize);
  return weights;
}

PointwiseWeights PackedReader::pointwise(int64_t in, int64_t out) { return section(in, out, header_->itemsize); }
PointwiseWeights PackedReader::excite(int64_t in, int64_t out) {
  return section(in, out, scalar_size(header_->itemsize));
}

}  // namespace cnnfast::cpu
