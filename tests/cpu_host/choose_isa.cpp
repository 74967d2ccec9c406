// Prints the instruction set that the kernels would be taken of here, or why that can't be.
#include <cstdio>

#include "cpu/cpu_features.h"

int main() {
  try {
    std::printf("%s\n", cnnfast::isa_name(cnnfast::choose_isa()));
  } catch (const std::runtime_error& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
