// cnnfast._C: what was built, what this CPU can do, and the check of packed weights. No torch in it: it also loads where torch does not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu_features.h"
#include "packing.h"
#include "watch.h"

namespace py = pybind11;

namespace {

int64_t packed_bytes(int op, int64_t in, int64_t mid, int64_t out, int64_t kernel_h, int64_t kernel_w, int64_t itemsize,
                     int64_t squeezed, bool no_expansion) {
  if (op < static_cast<int>(cnnfast::PackedOp::depthwise_conv2d) || op > static_cast<int>(cnnfast::kLastPackedOp)) {
    throw py::value_error("op is " + std::to_string(op) + "; expected a code of csrc/packing.h's PackedOp");
  }
  return cnnfast::packed_bytes(static_cast<cnnfast::PackedOp>(op), in, mid, out, kernel_h, kernel_w, itemsize, squeezed,
                               no_expansion);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built and what this CPU can do.";
  m.attr("compiler") = __VERSION__;
  m.attr("isas_built") = cnnfast::names_of_isas([](cnnfast::Isa isa) { return cnnfast::isa_built(isa); });
  m.attr("cpu_features") = cnnfast::names_of_isas(cnnfast::cpu_has);
  m.attr("isa") = cnnfast::isa_name(cnnfast::choose_isa());
  m.def("packed_bytes", &packed_bytes, py::arg("op"), py::arg("in_channels"), py::arg("mid_channels"),
        py::arg("out_channels"), py::arg("kernel_h"), py::arg("kernel_w"), py::arg("itemsize"),
        py::arg("squeezed_channels") = 0, py::arg("no_expansion") = false,
        "Size of a packing in bytes; itemsize 8 for float64 weights, 2 for bfloat16, else 4.");
  cnnfast::bind_watch(m);
}
