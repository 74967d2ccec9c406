// Where a sequence's images lie in one piece of memory.
#pragma once
#include <vector>

#include "common.h"

namespace cnnfast::cpu {

struct ImagePlan {
  int64_t bytes;  // of all images
  // Of each step's image, or of the concatenation's that it is part of. No bytes: of a step that makes none.
  std::vector<Place> places;
};
ImagePlan plan_images(const Tensor& x, const Tensor& program);

}  // namespace cnnfast::cpu
