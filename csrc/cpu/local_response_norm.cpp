// local_response_norm on the CPU: y = x (k + alpha / size * sum of x^2 over `size` neighbouring channels)^-beta.
// Tiling: runs of pixels, in both memory formats: rows of channels, or a strip of columns of all channels of one image.
// A task works in blocks that stay in L1, in NCHW in L2: there, rows are channels, and short pieces of them cost pages.
#include "ops.h"

namespace cnnfast::cpu {

namespace {

constexpr int64_t kBlockBytes = 16 << 10, kStripBytes = 256 << 10;  // of x in the compute type
constexpr int64_t kTaskBytes = 32 << 10;                            // of x

using Kernel = void (*)(const LocalResponseNormTile&);

// y, or with a grad the gradient of x.
Tensor normalised(const Tensor& x, const Maybe& grad, int64_t size, double alpha, double beta, double k) {
  const Storage storage = storage_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (N, C, H, W), got ", x.dim());
  STD_TORCH_CHECK(size >= 1, "size must be at least 1, got ", size);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), pixels = h * w;
  const bool nhwc = is_channels_last(x);
  const auto in_format = [&](const Tensor& t) { return nhwc ? channels_last(t) : torch::stable::contiguous(t); };
  const Tensor xs = in_format(x), gs = grad ? in_format(*grad) : xs;
  Tensor y = nhwc ? empty_channels_last(x, n, c, h, w, x.scalar_type())
                  : torch::stable::empty(Ints{n, c, h, w}, x.scalar_type(), std::nullopt, x.device());
  if (y.numel() == 0) return y;

  LocalResponseNormTile whole{};
  // What lies beyond the first and last channel is zero, however much of it there is.
  whole.before = std::min(size / 2, c - 1);
  whole.after = std::min((size - 1) / 2, c - 1);
  whole.scale = alpha / static_cast<double>(size);
  whole.beta = beta;
  whole.k = k;
  const KernelTable& table = kernels(storage);
  const int index = static_cast<int>(storage);
  const Kernel kernel = grad ? table.local_response_norm_backward[index] : table.local_response_norm[index];
  const int64_t itemsize = compute_size(storage), stored = storage_size(storage), halo = whole.before + whole.after;

  // The tile of task i: `first` is its first element.
  const auto run = [&](LocalResponseNormTile t, int64_t first) {
    t.padded = scratch(Slot::normalised, (2 * t.padded_size + t.rows_at_once * t.padded_row) * itemsize);
    t.x = bytes_of(xs) + first * stored;
    t.grad = bytes_of(gs) + first * stored;
    t.y = mutable_bytes_of(y) + first * stored;
    kernel(t);
  };
  if (nhwc || pixels == 1) {  // rows are pixels
    whole.row = whole.cols = c;
    whole.padded_row = halo + round_up(c, kPanel);
    whole.padded_channel = 1;
    whole.rows_at_once = std::max<int64_t>(1, kBlockBytes / (whole.padded_row * itemsize));
    whole.padded_size = whole.rows_at_once * whole.padded_row;
    const int64_t rows = std::max<int64_t>(1, kTaskBytes / (c * stored));
    for_each(ceil_div(n * pixels, rows), [&](int64_t i) {
      LocalResponseNormTile t = whole;
      t.rows = std::min(rows, n * pixels - i * rows);
      run(t, i * rows * c);
    });
    return y;
  }
  // rows are channels
  whole.row = pixels;
  whole.rows = whole.rows_at_once = c;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fitting = kStripBytes / ((c + halo) * kPanel * itemsize);
  const int64_t shared = ceil_div(n * pixels, 4 * threads * kPanel);  // four strips a thread, or more
  const int64_t cols = std::min(std::max<int64_t>(2, std::min(fitting, shared)) * kPanel, pixels);
  const int64_t strips = ceil_div(pixels, cols);
  whole.padded_row = whole.padded_channel = round_up(cols, kPanel);
  whole.padded_size = (c + halo) * whole.padded_row;
  for_each(n * strips, [&](int64_t i) {
    LocalResponseNormTile t = whole;
    const int64_t first = i % strips * cols;
    t.cols = std::min(cols, pixels - first);
    run(t, i / strips * c * pixels + first);
  });
  return y;
}

}  // namespace

Tensor local_response_norm(Tensor x, int64_t size, double alpha, double beta, double k, int64_t backend) {
  check_backend(backend);
  return normalised(x, std::nullopt, size, alpha, beta, k);
}

Tensor local_response_norm_backward(Tensor grad, Tensor x, int64_t size, double alpha, double beta, double k,
                                    int64_t backend) {
  check_backend(backend);
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                      grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                  "grad must have x's shape");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have x's dtype");
  return normalised(x, grad, size, alpha, beta, k);
}

}  // namespace cnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(cnnfast, CPU, m) {
  m.impl("local_response_norm", TORCH_BOX(&cnnfast::cpu::local_response_norm));
  m.impl("local_response_norm_backward", TORCH_BOX(&cnnfast::cpu::local_response_norm_backward));
}
