// Sums over pixels and scales by channel, of tiles and of whole images: what squeeze-excite and batch normalisation ask of
// the ops beside them.
#pragma once

#include "common.h"

namespace cnnfast::cpu {

// Where an image's rows lie, and how many make a part that idle threads may take.
struct Rows {
  static constexpr int64_t kPartBytes = 64 * 1024;
  int64_t height, width, channels, itemsize;

  int64_t bytes() const { return width * channels * itemsize; }
  int64_t per_part() const { return std::max<int64_t>(1, kPartBytes / std::max<int64_t>(1, bytes())); }
  int64_t parts() const { return ceil_div(height, per_part()); }
  std::pair<int64_t, int64_t> operator[](int64_t part) const {
    return {part * per_part(), std::min((part + 1) * per_part(), height)};
  }
};
Rows rows_of(const Tensor& x);

// sums[row][c] for rows [begin, end) of an image, of x (* by).
void sum_rows(const KernelTable& table, Storage storage, const Rows& rows, const char* x, const char* by, int64_t begin,
              int64_t end, char* sums);
// sums[c] = factor * sum over rows of what sum_rows gave.
void add_rows(const KernelTable& table, Storage storage, const char* row_sums, int64_t rows, int64_t channels,
              double factor, char* sums);

// Of whole tensors, channels_last.
// Sums over the pixels of each image of x (* by), times factor: (N, C, 1, 1), rounded to x's dtype once.
Tensor channel_sums(const Tensor& x, const Maybe& by, double factor);
// activation(x * scale + shift + residual); scale and shift (N, C, 1, 1), or (1, C, 1, 1) for all images.
Tensor scaled_channels(const Tensor& x, const Maybe& scale, const Maybe& shift, const Maybe& residual,
                       int64_t activation_code);
// The same to y, which may be x.
void scale_channels(const Tensor& x, const Maybe& scale, const Maybe& shift, const Maybe& residual,
                    int64_t activation_code, const Tensor& y);
// (C) as (1, C, 1, 1).
Maybe per_channel(const Maybe& t);
// 2 t as such, of the gradient of a sum of squares: y's is y times it.
Tensor twice(const Tensor& t);

// What an op does to its input on the way in: activation(x * scale + shift). scale and shift as scaled_channels takes
// them, of the compute type.
struct Prologue {
  Maybe scale, shift;
  int64_t activation;

  bool any() const { return scale || shift || activation != 0; }
  // `pixels` of image n, x_pixel scalars apart, to rows y_pixel apart: of the compute type, or of bfloat16 for AMX.
  void apply(const KernelTable& table, Storage storage, int64_t n, const char* x, int64_t x_pixel, int64_t pixels,
             int64_t channels, char* y, Storage y_storage, int64_t y_pixel) const;
};

// Sums and squares by channel of an image that an op is writing, y, as many pixels at a time as are in the cache: by the
// shape alone, as are the bits of the sums.
class PixelSums {
 public:
  PixelSums(const Tensor& y, int64_t pixels);
  int64_t count() const { return sums_.size(0); }
  // Pixels [begin, end) of all images.
  std::pair<int64_t, int64_t> operator[](int64_t i) const { return {i * pixels_, std::min((i + 1) * pixels_, all_)}; }
  // To be called once they are in y.
  void add(int64_t i);
  // Of all images, (C), in the compute type.
  Tensor sum() const;
  Tensor squares() const;

 private:
  Tensor y_, sums_, squares_;  // the last two: (count, C), of the compute type
  int64_t pixels_, all_;
};

// Sums by channel of an image that an op is writing, y, each band of rows while it is in the cache. The bands follow from
// the shape alone, and so do the bits of the sums.
class BandSums {
 public:
  BandSums(const Tensor& y, bool squares);
  int64_t count() const { return n_ * per_image_; }
  int64_t image(int64_t band) const { return band / per_image_; }
  std::pair<int64_t, int64_t> rows(int64_t band) const;
  // Where a band begins in y, and how many scalars it has.
  std::pair<int64_t, int64_t> scalars(int64_t band) const;
  // To be called once the band is in y.
  void add(int64_t band);
  // Of all images, (C), in the compute type.
  Tensor sum() const { return total(sums_); }
  Tensor squares() const { return total(squares_); }
  // Of each image, (N, C, 1, 1), in y's dtype.
  Tensor means() const;

 private:
  Tensor total(const Tensor& partial) const;

  Tensor y_, sums_, squares_;  // the last two: (band, C), of the compute type
  bool wants_squares_;
  Storage storage_;
  const KernelTable& table_;
  Rows shape_;
  int64_t n_, per_image_, band_rows_;
};

// grad * activation'(z), all of the compute type and channels_last; in the same pass its sums by channel, (C), which are a
// bias's gradient, to `sums` if that is given. grad itself for the identity, which needs no z.
Tensor activation_backward(const Tensor& grad, const Tensor& z, int64_t activation_code, Tensor* sums = nullptr);

// scale and shift (C): what an op with statistics takes.
void check_scale_shift(const Maybe& scale, const Maybe& shift, const Tensor& x);
Prologue prologue_of(const Maybe& scale, const Maybe& shift, int64_t activation_code);

}  // namespace cnnfast::cpu
