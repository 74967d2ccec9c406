// scale_shift_max_pool on the CPU: batch normalisation's affine map and activation with the pooling behind it.
// Tiling: rows of pooled pixels, backward rows of an image that make kPartBytes, a task; each task's sums by themselves, added
// up in order.
#include "ops.h"
#include "scale_shift.h"

namespace cnnfast::cpu {

namespace {

struct MaxPool {
  Scaled of;
  Storage storage;
  ScaleShiftMaxPoolTile tile{};

  MaxPool(const Tensor& x, const Tensor& scale, const Tensor& shift, const Ints& max_pool, int64_t activation_code)
      : of(x, scale, shift, activation_code), storage(storage_of(x, "x")) {
    STD_TORCH_CHECK(max_pool.size() == 3 && max_pool[0] * max_pool[0] <= 255,
                    "max_pool must be (kernel, stride, padding), a kernel of at most 15");
    const auto [kernel, stride, padding] = std::tuple(max_pool[0], max_pool[1], max_pool[2]);
    const ImageSize image = size_of(x), pooled = max_pooled_size(image, max_pool);
    tile.height = image.h;
    tile.width = image.w;
    tile.channels = image.c;
    tile.out_height = pooled.h;
    tile.out_width = pooled.w;
    tile.window = {kernel, kernel, stride, stride, 1, 1, padding, padding};
    tile.activation = activation(activation_code);
    tile.scale = bytes_of(*of.scale);
    tile.shift = bytes_of(*of.shift);
  }
  int64_t images() const { return of.x.numel() ? of.x.size(0) : 0; }
  int64_t pooled() const { return tile.out_height * tile.out_width * tile.channels; }
};

}  // namespace

std::tuple<Tensor, Tensor> scale_shift_max_pool(Tensor x, Tensor scale, Tensor shift, Ints max_pool,
                                                int64_t activation_code, int64_t backend) {
  check_backend(backend);
  const MaxPool op(x, scale, shift, max_pool, activation_code);
  const auto image = [&](ScalarType dtype) {
    return empty_channels_last(x, x.size(0), op.tile.channels, op.tile.out_height, op.tile.out_width, dtype);
  };
  const Tensor y = image(x.scalar_type()), taps = image(ScalarType::Byte);
  const int64_t item = storage_size(op.storage);
  for_each(op.images() * op.tile.out_height, [&](int64_t i) {
    const int64_t n = i / op.tile.out_height;
    ScaleShiftMaxPoolTile t = op.tile;
    t.x = bytes_of(op.of.x) + n * t.height * t.width * t.channels * item;
    t.y = mutable_bytes_of(y) + n * op.pooled() * item;
    t.taps = static_cast<uint8_t*>(taps.mutable_data_ptr()) + n * op.pooled();
    t.row_begin = i % op.tile.out_height;
    t.row_end = t.row_begin + 1;
    kernels(op.storage).scale_shift_max_pool[static_cast<int>(op.storage)](t);
  });
  return {in_format_of(x, y), in_format_of(x, taps)};
}

std::tuple<Tensor, Tensor, Tensor> scale_shift_max_pool_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift,
                                                                 Tensor taps, Ints max_pool, int64_t activation_code,
                                                                 int64_t output_mask, int64_t backend) {
  check_backend(backend);
  const MaxPool op(x, scale, shift, max_pool, activation_code);
  const auto bit = [&](int i) { return output_mask >> i & 1; };
  for (const Tensor& pooled : {grad, taps})
    check_residual(pooled, pooled, x.size(0), op.tile.channels, op.tile.out_height, op.tile.out_width);
  const Tensor g = channels_last(to_dtype(grad, x.scalar_type())), at = channels_last(taps);
  const Tensor dx =
      bit(0) ? empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type()) : no_gradient(x);
  const ImageParts parts(op.of.x);
  const PartSums sums(op.of.x, parts), sums_by_x(op.of.x, parts);
  const int64_t item = storage_size(op.storage);
  for_each(parts.count(), [&](int64_t i) {
    const int64_t n = parts.image(i), image = n * op.tile.height * op.tile.width * op.tile.channels * item;
    ScaleShiftMaxPoolTile t = op.tile;
    t.x = bytes_of(op.of.x) + image;
    t.dx = bit(0) ? mutable_bytes_of(dx) + image : nullptr;
    t.grad = bytes_of(g) + n * op.pooled() * item;
    t.taps = static_cast<uint8_t*>(at.mutable_data_ptr()) + n * op.pooled();
    std::tie(t.row_begin, t.row_end) = parts.rows[i % parts.rows.parts()];
    t.sum = sums.clear(i);
    t.sum_by_x = sums_by_x.clear(i);
    kernels(op.storage).scale_shift_max_pool_grad[static_cast<int>(op.storage)](t);
  });
  return {bit(0) ? image_gradient(x, dx) : dx, bit(1) ? sums_by_x.total() : no_gradient(scale),
          bit(2) ? sums.total() : no_gradient(shift)};
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("scale_shift_max_pool", TORCH_BOX(&cnnfast::cpu::scale_shift_max_pool));
  m.impl("scale_shift_max_pool_backward", TORCH_BOX(&cnnfast::cpu::scale_shift_max_pool_backward));
}
