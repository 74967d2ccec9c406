// What packed_sequence runs: the codes of its steps, and the words that a program is made of.
//
// program: how many steps; for each its code, where its image is to lie (a list: empty for anywhere; the number of a value
// that it may be written over, where no later step reads that; or the number of the concatenation that it is part of, its
// first channel there, that one's channels), its arguments (as many as the op takes: a tensor is the number of a value, x
// being 0 and step i's output i + 1, or -1 for none; a list its length, then its elements; a double its bits), and then a
// list of the values that no later step reads. Written by cnnfast/nn/recording.py.
#pragma once
#include <bit>

#include "common.h"

namespace cnnfast::cpu {

// The codes of packing.h's PackedOp are the ops' steps; these are the others.
constexpr int64_t kChannelsLast = 0, kMean = 100, kConcatenate = 101, kMaxPool = 102, kAvgPool = 103,
                  kLocalResponseNorm = 104;

class Words {
 public:
  explicit Words(const Tensor& program) {
    STD_TORCH_CHECK(program.scalar_type() == ScalarType::Long && program.dim() == 1 && program.is_contiguous(),
                    "program must be a contiguous tensor of int64");
    at_ = static_cast<const int64_t*>(program.const_data_ptr());
    end_ = at_ + program.numel();
  }

  // A number, or a list of integers.
  template <class T>
  T read() {
    if constexpr (std::is_same_v<T, Ints>) {
      const int64_t count = read<int64_t>();
      STD_TORCH_CHECK(count >= 0 && count <= end_ - at_, "program ends within a list");
      at_ += count;
      return Ints(at_ - count, at_);
    } else if constexpr (std::is_same_v<T, double>) {
      return std::bit_cast<double>(read<int64_t>());
    } else {
      STD_TORCH_CHECK(at_ != end_, "program ends within a step");
      return static_cast<T>(*at_++);
    }
  }

  bool ended() const { return at_ == end_; }

 private:
  const int64_t *at_, *end_;
};

}  // namespace cnnfast::cpu
