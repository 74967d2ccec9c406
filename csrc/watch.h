// cnnfast._C.Watch: see watch.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace cnnfast {

void bind_watch(pybind11::module_& m);

}  // namespace cnnfast
