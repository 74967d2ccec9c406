// The gradients of activation(x * scale + shift + residual): for scale_shift, and for ops that begin so; how all of them
// are cut into tasks.
#pragma once
#include <cstring>

#include "channels.h"

namespace cnnfast::cpu {

// Tasks of an image, and sums that each leaves.
struct ImageParts {
  Rows rows;
  int64_t images;
  explicit ImageParts(const Tensor& x) : rows(rows_of(x)), images(x.numel() ? x.size(0) : 0) {}
  int64_t count() const { return images * rows.parts(); }
  int64_t image(int64_t i) const { return i / rows.parts(); }
  int64_t pixels(int64_t i) const {
    const auto [begin, end] = rows[i % rows.parts()];
    return (end - begin) * rows.width;
  }
  // Of the first row, in bytes.
  int64_t offset(int64_t i) const { return (image(i) * rows.height + rows[i % rows.parts()].first) * rows.bytes(); }
};

class PartSums {
 public:
  PartSums(const Tensor& x, const ImageParts& parts) : parts_(parts), storage_(storage_of(x, "x")) {
    const Ints size{parts.count(), parts.rows.channels};
    sums_ = torch::stable::empty(size, compute_dtype(storage_), std::nullopt, x.device());
  }
  void* of(int64_t i) const { return mutable_bytes_of(*sums_) + i * row_bytes(); }
  void* clear(int64_t i) const { return std::memset(of(i), 0, row_bytes()); }
  // Of all images, (C).
  Tensor total() const { return added(Ints{parts_.rows.channels}, parts_.count(), 1, 1); }
  // Of each image, times factor: (N, C, 1, 1).
  Tensor by_image(double factor) const {
    return added(Ints{parts_.images, parts_.rows.channels, 1, 1}, parts_.rows.parts(), parts_.images, factor);
  }

 private:
  int64_t row_bytes() const { return parts_.rows.channels * compute_size(storage_); }
  Tensor added(const Ints& size, int64_t rows, int64_t images, double factor) const {
    Tensor sums = torch::stable::empty(size, compute_dtype(storage_), std::nullopt, sums_->device());
    for (int64_t n = 0; n < images; ++n)
      add_rows(kernels(storage_), storage_, bytes_of(*sums_) + n * rows * row_bytes(), rows, parts_.rows.channels,
               factor, mutable_bytes_of(sums) + n * row_bytes());
    return sums;
  }

  ImageParts parts_;
  Storage storage_;
  Maybe sums_;
};

// x channels_last; scale and shift (C), or none.
struct Scaled {
  Tensor x;
  Maybe scale, shift;
  int64_t activation;

  Scaled(const Tensor& x, const Maybe& scale, const Maybe& shift, int64_t activation);
};

struct ScaledGradients {
  Tensor x, residual, scale, shift;  // the first two channels_last, of x's dtype, or without elements
};

// grad and residual channels_last, of x's dtype. With gates and mean_grads, (N, C, 1, 1) of the compute type: of y =
// activation(...) * gates, where each pixel of activation(...) has mean_grads besides.
ScaledGradients scale_shift_gradients(const Tensor& grad, const Scaled& of, const Maybe& residual, const Maybe& gates,
                                      const Maybe& mean_grads, bool wants_x, bool wants_residual);

}  // namespace cnnfast::cpu
