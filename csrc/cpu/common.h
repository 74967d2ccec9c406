// What every op on the CPU shares: argument checks, geometry, memory formats, the kernel table in use, threads, scratch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "threads.h"

namespace cnnfast::cpu {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;

// The table of the best ISA that was built and that this CPU has ($CNNFAST_ISA forces one); the generic one for float64.
const KernelTable& kernels(Storage storage);

Storage storage_of(const Tensor& t, const char* name);
// The index into KernelTable's pairs [float, double], and the dtype of the arithmetic.
inline int compute_index(Storage s) { return s == Storage::f64 ? 1 : 0; }
inline Storage compute_storage(Storage s) { return s == Storage::f64 ? Storage::f64 : Storage::f32; }
inline int64_t storage_size(Storage s) { return s == Storage::f64 ? 8 : s == Storage::f32 ? 4 : 2; }
inline int64_t compute_size(Storage s) { return s == Storage::f64 ? 8 : 4; }
inline ScalarType compute_dtype(Storage s) { return s == Storage::f64 ? ScalarType::Double : ScalarType::Float; }

Activation activation(int64_t code);
void check_backend(int64_t backend);  // auto and cpu run here; anything else is a sentence

struct ImageSize {
  int64_t n, c, h, w;

  int64_t count() const { return n * c * h * w; }
  bool operator==(const ImageSize&) const = default;
};
ImageSize size_of(const Tensor& x);

// A convolution's sizes. padding empty: 'same'.
struct Conv {
  int64_t n, c, h, w, out_h, out_w;
  Window window;
};
Conv conv_of(const ImageSize& x, int64_t kernel_h, int64_t kernel_w, const Ints& stride, const Ints& padding,
             const Ints& dilation);
Conv conv_of(const Tensor& x, int64_t kernel_h, int64_t kernel_w, const Ints& stride, const Ints& padding,
             const Ints& dilation);
Window pointwise_window(const Ints& stride);
// Of `out` windows side by side, from the first scalar to the last.
inline int64_t reach(int64_t out, int64_t kernel, int64_t stride, int64_t dilation) {
  return (out - 1) * stride + (kernel - 1) * dilation + 1;
}

// Memory formats. The kernels want channels_last; results come back in x's own format.
bool is_channels_last(const Tensor& x);
inline Tensor channels_last(const Tensor& x) { return torch::stable::contiguous(x, MemoryFormat::ChannelsLast); }
Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype);
// Scalars from a pixel of y, which empty_channels_last made and which isn't empty, to the next.
inline int64_t pixel_of(const Tensor& y) { return y.stride(0) / (y.size(2) * y.size(3)); }
// y (made by empty_channels_last) in the format that x had.
Tensor in_format_of(const Tensor& x, const Tensor& y);
Tensor to_dtype(const Tensor& t, ScalarType dtype);
Maybe to_dtype(const Maybe& t, ScalarType dtype);
Maybe contiguous(const Maybe& t);
// A gradient that nobody asked for.
Tensor no_gradient(const Tensor& like);
void check_residual(const Maybe& residual, const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w);

inline const char* bytes_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
inline char* mutable_bytes_of(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

// A buffer of this thread's, kept between calls; the content is whatever the last user left. One slot a purpose.
enum class Slot { depthwise, expanded, gathered, sums, excite, panels, planes, odd, normalised, gradients, count };
char* scratch(Slot slot, int64_t bytes);

// Where an op's image is to lie: channels [first, first + its own) of an image of `channels` that several ops write.
struct Part {
  Maybe* image;  // the first of them makes it
  int64_t first, channels;
};

// Memory in whole pages of the system's own: of those that are never written to none is there, and what has been freed
// leaves no holes that a heap would keep.
class Pages {
 public:
  Pages() = default;
  explicit Pages(int64_t bytes);
  ~Pages();
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages other) noexcept {
    swap(other);
    return *this;
  }

  char* data() const { return data_; }
  int64_t size() const { return size_; }
  // Those that lie behind the first `bytes`, to the system; other contents, if any, when they are next read.
  void give_back(int64_t bytes);

 private:
  void swap(Pages& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Bytes of an arena that an image is to have.
struct Place {
  int64_t begin, bytes;
};

// Where empty_channels_last takes its memory from while one is open on this thread: images that only this thread's open
// call sees, which knows beforehand where each of them lies (image_plan.h). Its pages are kept for the next call, which an
// allocator gives back to the system and gets anew, zeroed.
class ImageArena {
 public:
  // This thread's, of so many bytes; one at a time is open.
  static ImageArena& open(int64_t bytes);
  // Where the next op's image lies; nothing for one that is none of the arena's.
  void take(const std::optional<Place>& place) { place_ = place; }
  // Between ops whose images are part of another and those whose aren't.
  void write_to(const std::optional<Part>& part) { part_ = part; }
  const std::optional<Part>& part() const { return part_; }
  bool holds(const void* p) const { return p >= memory_.data() && p < memory_.data() + memory_.size(); }
  // The pages that this call has not taken, and those that are too many to be kept, go back.
  void close();

  static ImageArena* current();
  char* bytes(int64_t count) const;

 private:
  static constexpr int64_t kKept = 256'000'000;
  Pages memory_;
  int64_t used_ = 0, held_ = 0;  // by this call; that may have pages
  bool open_ = false;
  std::optional<Place> place_;
  std::optional<Part> part_;
};

// libgomp starts and ends a parallel region by futexes, in code that no sanitizer has instrumented: TSan sees neither that
// the threads come after what the caller has done nor that the caller goes on after them. These two say so. Two, so that
// a thread that starts late doesn't seem to come after one that is done.
#ifdef __SANITIZE_THREAD__
inline std::atomic<int> region_begins{0}, region_ends{0};
#define CNNFAST_HAPPENS_BEFORE(where) where.fetch_add(1, std::memory_order_release)
#define CNNFAST_HAPPENS_AFTER(where) where.load(std::memory_order_acquire)
#else
#define CNNFAST_HAPPENS_BEFORE(where)
#define CNNFAST_HAPPENS_AFTER(where)
#endif

// task(i), or task(worker, i) to have help with its parts, for each i in [0, count), on all threads.
template <class F>
void for_each(int64_t count, const F& task) {
  if (count <= 0) return;
  constexpr bool helped = std::is_invocable_v<F, const Worker&, int64_t>;
  const int64_t threads = torch::stable::get_num_threads();
  Team team(count, helped ? threads : std::min(count, threads));
  const auto work = [&](int64_t begin, int64_t end) {
    CNNFAST_HAPPENS_AFTER(region_begins);
    for (int64_t seat = begin; seat < end; ++seat) {
      if constexpr (helped) {
        team.work(seat, task);
        team.help(seat);
      } else {
        team.work(seat, [&](const Worker&, int64_t i) { task(i); });
      }
    }
    CNNFAST_HAPPENS_BEFORE(region_ends);
  };
  CNNFAST_HAPPENS_BEFORE(region_begins);
  torch::stable::parallel_for(0, team.size(), 1, work);
  CNNFAST_HAPPENS_AFTER(region_ends);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cnnfast::cpu
