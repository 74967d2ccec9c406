#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <limits>
#include <new>

#include "cpu_features.h"

namespace cnnfast::cpu {

const KernelTable& kernels(Storage storage) {
  static const KernelTable chosen = []() -> KernelTable {
    switch (choose_isa()) {
#ifdef CNNFAST_HAVE_AVX2
      case Isa::avx2: return avx2::table;
#endif
#ifdef CNNFAST_HAVE_AVX512
      case Isa::avx512: return avx512::table;
#ifdef CNNFAST_HAVE_AMX
      case Isa::amx: {
        KernelTable table = avx512::table;
        amx::add_to(table);
        return table;
      }
#endif
#endif
      default: return generic::table;
    }
  }();
  return storage == Storage::f64 ? generic::table : chosen;
}

Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
  return Storage::f32;
}

Activation activation(int64_t code) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  switch (code) {
    case 0: return {0, -inf, inf};
    case 1: return {1, 0, inf};
    case 2: return {2, 0, 6};
    case 3:
    case 4:
    case 5:
    case 6: return {code, -inf, inf};
    default: STD_TORCH_CHECK(false, "activation code ", code, " is unknown");
  }
  return {};
}

void check_backend(int64_t backend) {
  STD_TORCH_CHECK(backend == 0 || backend == 1, "backend code ", backend, " can't run on CPU tensors");
}

namespace {

// Padding before (top or left) for an output of ceil(size / stride), and that output.
std::pair<int64_t, int64_t> same_padding(int64_t size, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t out = ceil_div(size, stride);
  const int64_t total = std::max<int64_t>(0, (out - 1) * stride + (kernel - 1) * dilation + 1 - size);
  return {total / 2, out};
}

bool is_same(const Ints& padding) { return padding.size() == 1 && padding[0] == -1; }

}  // namespace

ImageSize size_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (N, C, H, W), got ", x.dim());
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

Conv conv_of(const Tensor& x, int64_t kernel_h, int64_t kernel_w, const Ints& stride, const Ints& padding,
             const Ints& dilation) {
  return conv_of(size_of(x), kernel_h, kernel_w, stride, padding, dilation);
}

Conv conv_of(const ImageSize& x, int64_t kernel_h, int64_t kernel_w, const Ints& stride, const Ints& padding,
             const Ints& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2, "stride and dilation must have 2 elements");
  STD_TORCH_CHECK(is_same(padding) || padding.size() == 4, "padding must have 4 elements, or be [-1] for 'same'");
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0,
                  "stride and dilation must be positive");
  Conv c{x.n, x.c, x.h, x.w, 0, 0, {}};
  c.window = {kernel_h, kernel_w, stride[0], stride[1], dilation[0], dilation[1], 0, 0};
  if (is_same(padding)) {
    std::tie(c.window.pad_top, c.out_h) = same_padding(c.h, kernel_h, stride[0], dilation[0]);
    std::tie(c.window.pad_left, c.out_w) = same_padding(c.w, kernel_w, stride[1], dilation[1]);
    return c;
  }
  STD_TORCH_CHECK(*std::min_element(padding.begin(), padding.end()) >= 0, "padding must not be negative");
  c.window.pad_top = padding[0];
  c.window.pad_left = padding[2];
  const int64_t extent_h = c.h + padding[0] + padding[1] - (kernel_h - 1) * dilation[0] - 1;
  const int64_t extent_w = c.w + padding[2] + padding[3] - (kernel_w - 1) * dilation[1] - 1;
  STD_TORCH_CHECK(extent_h >= 0 && extent_w >= 0, "the kernel is larger than the padded input");
  c.out_h = extent_h / stride[0] + 1;
  c.out_w = extent_w / stride[1] + 1;
  return c;
}

namespace {

bool dense_in(const Tensor& x, std::initializer_list<int> dims_from_innermost) {
  int64_t expected = 1;
  for (int d : dims_from_innermost) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

}  // namespace

bool is_channels_last(const Tensor& x) {
  if (x.numel() == 0 || x.is_contiguous()) return false;
  return dense_in(x, {1, 3, 2, 0}) || (x.size(1) > 1 && x.stride(1) == 1);
}

namespace {

Tensor in_arena(ImageArena& arena, const Tensor& like, const Ints& size, const Ints& strides, ScalarType dtype) {
  const int64_t itemsize = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  char* const bytes = arena.bytes(size[0] * size[1] * size[2] * size[3] * itemsize);
  return torch::stable::from_blob(bytes, size, strides, like.device(), dtype);
}

Tensor in_arena(ImageArena& arena, const Part& part, const Tensor& like, const Ints& size, ScalarType dtype) {
  const int64_t n = size[0], h = size[2], w = size[3], c = part.channels;
  const Ints strides{h * w * c, 1, w * c, c};
  if (!*part.image) *part.image = in_arena(arena, like, {n, c, h, w}, strides, dtype);
  const Tensor& whole = **part.image;
  STD_TORCH_CHECK(whole.size(0) == n && whole.size(2) == h && whole.size(3) == w && whole.scalar_type() == dtype &&
                      part.first >= 0 && part.first + size[1] <= whole.size(1),
                  "program joins images that don't fit");
  char* const bytes = mutable_bytes_of(whole) + part.first * static_cast<int64_t>(whole.element_size());
  return torch::stable::from_blob(bytes, size, strides, like.device(), dtype);
}

// An image that malloc takes from the system at each call (from 32 MiB on) is written to pages that are zeroed then: by
// twos of MiB that takes a fraction of the time.
void ask_for_huge_pages([[maybe_unused]] const Tensor& image) {
#if defined(__linux__)
  constexpr int64_t kMapped = 32 << 20, kPage = 4096;
  const int64_t bytes = image.numel() * static_cast<int64_t>(image.element_size());
  if (bytes < kMapped) return;
  char* const first = mutable_bytes_of(image);
  const int64_t before = -reinterpret_cast<intptr_t>(first) & (kPage - 1);
  madvise(first + before, static_cast<size_t>((bytes - before) / kPage * kPage), MADV_HUGEPAGE);  // advice: it may fail
#endif
}

}  // namespace

Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) {
  const Ints size{n, c, h, w};
  // Where both formats are the same in memory, the strides of dimensions of size 1 are those of the format that x has.
  const bool either = n == 0 || c == 1 || h * w == 1;
  const MemoryFormat format = either && !is_channels_last(like) ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast;
  if (ImageArena* const arena = ImageArena::current(); arena && n * c * h * w > 0) {
    if (arena->part()) return in_arena(*arena, *arena->part(), like, size, dtype);
    const Ints strides =
        format == MemoryFormat::Contiguous ? Ints{c * h * w, h * w, w, 1} : Ints{h * w * c, 1, w * c, c};
    return in_arena(*arena, like, size, strides, dtype);
  }
  const Tensor image = torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, format);
  ask_for_huge_pages(image);
  return image;
}

Tensor in_format_of(const Tensor& x, const Tensor& y) { return is_channels_last(x) ? y : torch::stable::contiguous(y); }

Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

Maybe to_dtype(const Maybe& t, ScalarType dtype) { return t ? Maybe(to_dtype(*t, dtype)) : std::nullopt; }

Maybe contiguous(const Maybe& t) { return t ? Maybe(torch::stable::contiguous(*t)) : std::nullopt; }

Tensor no_gradient(const Tensor& like) {
  return torch::stable::empty(Ints{0}, like.scalar_type(), std::nullopt, like.device());
}

void check_residual(const Maybe& residual, const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  if (!residual) return;
  STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == n && residual->size(1) == c && residual->size(2) == h &&
                      residual->size(3) == w,
                  "residual must have the output's shape (", n, ", ", c, ", ", h, ", ", w, ")");
  STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "residual must have x's dtype");
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // which knows where the heap's blocks end
Pages::Pages(int64_t bytes) : size_(round_up(bytes, 4096)) {
  void* const p = mmap(nullptr, static_cast<size_t>(size_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(p);
}

Pages::~Pages() {
  if (data_) munmap(data_, static_cast<size_t>(size_));
}

void Pages::give_back(int64_t bytes) {
  const int64_t kept = round_up(bytes, sysconf(_SC_PAGESIZE));
  if (kept < size_) madvise(data_ + kept, static_cast<size_t>(size_ - kept), MADV_DONTNEED);
}
#else
Pages::Pages(int64_t bytes) : size_(round_up(bytes, 4096)) {
  data_ = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(size_)));
  if (!data_) throw std::bad_alloc();
}

Pages::~Pages() { std::free(data_); }

void Pages::give_back(int64_t bytes) {
  if (bytes < size_) *this = Pages();
}
#endif

namespace {

thread_local ImageArena image_arena;

}  // namespace

ImageArena& ImageArena::open(int64_t bytes) {
  ImageArena& arena = image_arena;
  STD_TORCH_CHECK(!arena.open_, "an arena is open on this thread");
  if (arena.memory_.size() < bytes) {
    arena.memory_ = Pages();  // first: not both at once
    arena.memory_ = Pages(bytes);
  }
  arena.used_ = bytes;
  arena.held_ = std::max(arena.held_, bytes);
  arena.open_ = true;
  return arena;
}

ImageArena* ImageArena::current() { return image_arena.place_ ? &image_arena : nullptr; }

char* ImageArena::bytes(int64_t count) const {
  STD_TORCH_CHECK(count <= place_->bytes && place_->begin + count <= used_, "an image is larger than was planned");
  return memory_.data() + place_->begin;
}

void ImageArena::close() {
  open_ = false;
  place_.reset();
  part_.reset();
  const int64_t kept = std::min(used_, kKept);
  if (kept < held_) memory_.give_back(kept);
  held_ = kept;
}

char* scratch(Slot slot, int64_t bytes) {
  static thread_local Pages buffers[static_cast<int>(Slot::count)];
  Pages& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size() < bytes) {
    buffer = Pages();
    buffer = Pages(bytes);
  }
  return buffer.data();
}

}  // namespace cnnfast::cpu
