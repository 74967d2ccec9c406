// Pooling's windows.
#pragma once
#include <cstdint>

namespace cnnfast::cpu {

// Windows of one dimension, as PyTorch counts them: with ceil_mode also one that reaches beyond the padding, if it begins
// before that.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode);

}  // namespace cnnfast::cpu
