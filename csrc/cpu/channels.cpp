#include "channels.h"

#include <cstring>

#include "ops.h"

namespace cnnfast::cpu {

Rows rows_of(const Tensor& x) { return {x.size(2), x.size(3), x.size(1), static_cast<int64_t>(x.element_size())}; }

void sum_rows(const KernelTable& table, Storage storage, const Rows& rows, const char* x, const char* by, int64_t begin,
              int64_t end, char* sums) {
  ChannelSumsTile t{};
  t.x_pixel = t.channels = rows.channels;
  t.pixels = rows.width;
  t.run = ChannelSumsTile::kRun;
  t.factor = 1;
  for (int64_t row = begin; row < end; ++row) {
    t.x = x + row * rows.bytes();
    t.by = by ? by + row * rows.bytes() : nullptr;
    t.sums = sums + row * rows.channels * compute_size(storage);
    table.channel_sums[static_cast<int>(storage)](t);
  }
}

void add_rows(const KernelTable& table, Storage storage, const char* row_sums, int64_t rows, int64_t channels,
              double factor, char* sums) {
  ChannelSumsTile t{};
  t.x = row_sums;
  t.x_pixel = t.channels = channels;
  t.pixels = rows;
  t.run = 1;
  t.factor = factor;
  t.sums = sums;
  table.channel_sums[static_cast<int>(compute_storage(storage))](t);
}

Tensor channel_sums(const Tensor& x, const Maybe& by, double factor) {
  const Storage storage = storage_of(x, "x");
  const KernelTable& table = kernels(storage);
  const Rows rows = rows_of(x);
  const Ints size{x.size(0), rows.channels, 1, 1};
  Tensor sums = torch::stable::empty(size, x.scalar_type(), std::nullopt, x.device());
  for_each(sums.numel() ? x.size(0) : 0, [&](const Worker& worker, int64_t n) {
    const int64_t image = n * rows.height * rows.bytes();
    char* const row_sums = scratch(Slot::sums, (rows.height + 1) * rows.channels * compute_size(storage));
    char* const image_sums = row_sums + rows.height * rows.channels * compute_size(storage);
    worker.each_part(rows.parts(), [&](int64_t k) {
      const auto [begin, end] = rows[k];
      sum_rows(table, storage, rows, bytes_of(x) + image, by ? bytes_of(*by) + image : nullptr, begin, end, row_sums);
    });
    add_rows(table, storage, row_sums, rows.height, rows.channels, factor, image_sums);
    ScaleTile stored{};
    stored.x = image_sums;
    stored.y = mutable_bytes_of(sums) + n * rows.channels * rows.itemsize;
    stored.x_pixel = stored.y_pixel = stored.channels = rows.channels;
    stored.y_storage = storage;
    stored.pixels = 1;
    stored.activation = activation(0);
    table.scale_channels[static_cast<int>(compute_storage(storage))](stored);
  });
  return sums;
}

namespace {

// Image n's numbers of a scale or shift, (N, C, 1, 1) or (1, C, 1, 1) of the compute type.
const char* of_image(const Maybe& t, int64_t n) {
  return t ? bytes_of(*t) + (t->size(0) > 1 ? n * t->size(1) * static_cast<int64_t>(t->element_size()) : 0) : nullptr;
}

// (C) as (1, C, 1, 1).
Tensor per_channel(const Tensor& t) { return torch::stable::view(torch::stable::contiguous(t), {1, t.numel(), 1, 1}); }

}  // namespace

Maybe per_channel(const Maybe& t) { return t ? Maybe(per_channel(*t)) : std::nullopt; }

void scale_channels(const Tensor& x, const Maybe& scale, const Maybe& shift, const Maybe& residual,
                    int64_t activation_code, const Tensor& y) {
  const Storage storage = storage_of(x, "x");
  const KernelTable& table = kernels(storage);
  const Rows rows = rows_of(x);
  for_each(y.numel() ? x.size(0) * rows.parts() : 0, [&](int64_t i) {
    const int64_t n = i / rows.parts();
    const auto [begin, end] = rows[i % rows.parts()];
    const int64_t first = (n * rows.height + begin) * rows.bytes();
    ScaleTile t{};
    t.x = bytes_of(x) + first;
    t.scale = of_image(scale, n);
    t.shift = of_image(shift, n);
    t.residual = residual ? bytes_of(*residual) + first : nullptr;
    t.y = mutable_bytes_of(y) + first;
    t.x_pixel = t.y_pixel = t.channels = rows.channels;
    t.y_storage = storage;
    t.pixels = (end - begin) * rows.width;
    t.activation = activation(activation_code);
    table.scale_channels[static_cast<int>(storage)](t);
  });
}

Tensor scaled_channels(const Tensor& x, const Maybe& scale, const Maybe& shift, const Maybe& residual,
                       int64_t activation_code) {
  const Tensor y = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type());
  scale_channels(x, scale, shift, residual, activation_code, y);
  return y;
}

Tensor twice(const Tensor& t) {
  const Maybe once = per_channel(Maybe(t));
  return scaled_channels(*once, std::nullopt, std::nullopt, once, 0);
}

void Prologue::apply(const KernelTable& table, Storage storage, int64_t n, const char* x, int64_t x_pixel,
                     int64_t pixels, int64_t channels, char* y, Storage y_storage, int64_t y_pixel) const {
  OperandTile t{};
  t.x = x;
  t.x_pixel = x_pixel;
  t.scale = of_image(scale, n);
  t.shift = of_image(shift, n);
  t.pixels = pixels;
  t.channels = channels;
  t.activation = cpu::activation(activation);
  t.rows = y;
  t.row = y_pixel;
  y_storage == Storage::bf16 ? table.operand_bf16(t) : table.operand[static_cast<int>(storage)](t);
}

namespace {

// Of pixels side by side.
void sum_pixels(const KernelTable& table, Storage storage, const char* x, int64_t pixels, int64_t channels, char* sums,
                char* squares) {
  ChannelSumsTile t{};
  t.x = x;
  t.x_pixel = t.channels = channels;
  t.pixels = pixels;
  t.run = ChannelSumsTile::kRun;
  t.factor = 1;
  t.sums = sums;
  t.squares = squares;
  table.channel_sums[static_cast<int>(storage)](t);
}

Tensor total_of(const Tensor& partial, Storage storage) {
  const Ints size{partial.size(1)};
  Tensor sums = torch::stable::empty(size, partial.scalar_type(), std::nullopt, partial.device());
  add_rows(kernels(storage), storage, bytes_of(partial), partial.size(0), partial.size(1), 1, mutable_bytes_of(sums));
  return sums;
}

}  // namespace

PixelSums::PixelSums(const Tensor& y, int64_t pixels)
    : y_(y), pixels_(pixels), all_(y.numel() ? y.size(0) * y.size(2) * y.size(3) : 0) {
  const Ints size{ceil_div(all_, pixels), y.size(1)};
  sums_ = torch::stable::empty(size, compute_dtype(storage_of(y, "y")), std::nullopt, y.device());
  squares_ = torch::stable::empty_like(sums_);
}

void PixelSums::add(int64_t i) {
  const Storage storage = storage_of(y_, "y");
  const auto [begin, end] = (*this)[i];
  const int64_t channels = y_.size(1), at = i * channels * compute_size(storage);
  sum_pixels(kernels(storage), storage, bytes_of(y_) + begin * channels * storage_size(storage), end - begin, channels,
             mutable_bytes_of(sums_) + at, mutable_bytes_of(squares_) + at);
}

Tensor PixelSums::sum() const { return total_of(sums_, storage_of(y_, "y")); }
Tensor PixelSums::squares() const { return total_of(squares_, storage_of(y_, "y")); }

BandSums::BandSums(const Tensor& y, bool squares)
    : y_(y),
      wants_squares_(squares),
      storage_(storage_of(y, "y")),
      table_(kernels(storage_)),
      shape_(rows_of(y)),
      n_(y.size(0)) {
  // Enough for any team of threads; few beside an image.
  constexpr int64_t kBands = 64;
  const int64_t height = std::max<int64_t>(1, shape_.height);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(kBands, std::max<int64_t>(1, n_)), 1, height);
  band_rows_ = ceil_div(height, wanted);
  per_image_ = y.numel() ? ceil_div(height, band_rows_) : 0;
  const Ints size{count(), shape_.channels};
  sums_ = torch::stable::empty(size, compute_dtype(storage_), std::nullopt, y.device());
  if (squares) squares_ = torch::stable::empty(size, compute_dtype(storage_), std::nullopt, y.device());
}

std::pair<int64_t, int64_t> BandSums::rows(int64_t band) const {
  const int64_t begin = band % per_image_ * band_rows_;
  return {begin, std::min(begin + band_rows_, shape_.height)};
}

std::pair<int64_t, int64_t> BandSums::scalars(int64_t band) const {
  const auto [begin, end] = rows(band);
  const int64_t row = shape_.width * shape_.channels;
  return {(image(band) * shape_.height + begin) * row, (end - begin) * row};
}

void BandSums::add(int64_t band) {
  const auto [first, count] = scalars(band);
  const int64_t row_bytes = shape_.channels * compute_size(storage_);
  sum_pixels(table_, storage_, bytes_of(y_) + first * shape_.itemsize, count / shape_.channels, shape_.channels,
             mutable_bytes_of(sums_) + band * row_bytes,
             wants_squares_ ? mutable_bytes_of(squares_) + band * row_bytes : nullptr);
}

Tensor BandSums::total(const Tensor& partial) const { return total_of(partial, storage_); }

Tensor BandSums::means() const {
  const Ints size{n_, shape_.channels, 1, 1};
  Tensor means = torch::stable::empty(size, compute_dtype(storage_), std::nullopt, y_.device());
  const int64_t row_bytes = shape_.channels * compute_size(storage_);
  const double factor = 1.0 / static_cast<double>(shape_.height * shape_.width);
  for (int64_t n = 0; n < n_; ++n)
    add_rows(table_, storage_, bytes_of(sums_) + n * per_image_ * row_bytes, per_image_, shape_.channels, factor,
             mutable_bytes_of(means) + n * row_bytes);
  return to_dtype(means, y_.scalar_type());
}

void check_scale_shift(const Maybe& scale, const Maybe& shift, const Tensor& x) {
  STD_TORCH_CHECK(!shift || scale, "shift must come with scale");
  for (const Maybe& t : {scale, shift})
    STD_TORCH_CHECK(
        !t || (t->dim() == 1 && t->size(0) == x.size(1) && t->scalar_type() == compute_dtype(storage_of(x, "x"))),
        "scale and shift must have shape (", x.size(1), ",) and the compute type's dtype");
}

Prologue prologue_of(const Maybe& scale, const Maybe& shift, int64_t activation_code) {
  return {per_channel(scale), per_channel(shift), activation_code};
}

Tensor activation_backward(const Tensor& grad, const Tensor& z, int64_t activation_code, Tensor* sums) {
  if (activation_code == 0 && !sums) return grad;
  const Tensor zs = channels_last(z);
  const Storage storage = storage_of(grad, "grad");
  const KernelTable& table = kernels(storage);
  const int64_t itemsize = compute_size(storage);
  const Tensor out = activation_code == 0 ? grad
                                          : empty_channels_last(grad, grad.size(0), grad.size(1), grad.size(2),
                                                                grad.size(3), grad.scalar_type());
  BandSums bands(out, false);
  for_each(bands.count(), [&](int64_t i) {
    if (activation_code != 0) {
      const auto [first, count] = bands.scalars(i);
      ActivationGradTile t{};
      t.grad = mutable_bytes_of(out) + first * itemsize;
      t.z = bytes_of(zs) + first * itemsize;
      t.count = count;
      t.activation = activation(activation_code);
      std::memcpy(t.grad, bytes_of(grad) + first * itemsize, count * itemsize);
      table.activation_grad[compute_index(storage)](t);
    }
    if (sums) bands.add(i);
  });
  if (sums) *sums = bands.sum();
  return out;
}

}  // namespace cnnfast::cpu
