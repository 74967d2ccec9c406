// Watch: whether modules are still as they were when their weights were packed; made by cnnfast/nn/watch.py.
//
// It runs before every call of a packing, when kernels have swept the caches: what it costs is cache lines, several for
// each dict and each tensor. So nothing is looked up that can be kept, and lines are asked for well before they are read.
// No torch in it: tensors are asked through the C functions behind two of their Python attributes.
#include "watch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace cnnfast {
namespace {

constexpr uintptr_t kLine = 64;  // bytes

using Dicts = std::vector<py::dict>;
using Objects = std::vector<py::object>;

py::object owned_or_throw(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

uint64_t number_or_throw(PyObject* object) {
  const py::object number = owned_or_throw(object);
  const uint64_t value = PyLong_AsUnsignedLongLongMask(number.ptr());
  if (value == static_cast<uint64_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Tensor._version: called directly where it is a getset descriptor, and by the protocol of descriptors elsewhere.
struct Version {
  PyObject* descriptor;
  getter get = nullptr;
  void* closure = nullptr;

  explicit Version(PyObject* descriptor) : descriptor(descriptor) {
    if (!Py_IS_TYPE(descriptor, &PyGetSetDescr_Type)) return;
    const PyGetSetDef* definition = reinterpret_cast<PyGetSetDescrObject*>(descriptor)->d_getset;
    get = definition->get;
    closure = definition->closure;
  }

  // The first time: it is an error if the descriptor is another type's.
  uint64_t checked(PyObject* tensor) const {
    return number_or_throw(PyObject_CallMethod(descriptor, "__get__", "O", tensor));
  }

  uint64_t operator()(PyObject* tensor) const { return get ? number_or_throw(get(tensor, closure)) : checked(tensor); }
};

// Tensor.data_ptr: called directly where it is the descriptor of a C function without arguments.
struct Pointer {
  PyObject* method;
  PyCFunction call = nullptr;

  explicit Pointer(PyObject* method) : method(method) {
    if (!Py_IS_TYPE(method, &PyMethodDescr_Type)) return;
    const PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
    if (definition->ml_flags == METH_NOARGS) call = definition->ml_meth;
  }

  uint64_t checked(PyObject* tensor) const {  // as Version's
    return number_or_throw(PyObject_CallFunctionObjArgs(method, tensor, nullptr));
  }

  uint64_t operator()(PyObject* tensor) const {
    return call ? number_or_throw(call(tensor, nullptr)) : checked(tensor);
  }
};

class Watch {
 public:
  Watch(const Dicts& members, const Objects& versioned, const Objects& unversioned, const Objects& aliases,
        const Dicts& hooks, const Dicts& instances, bool calls, const py::object& version, const py::object& data_ptr)
      : version_(own(version)),
        pointer_(own(data_ptr)),
        training_(own(owned_or_throw(PyUnicode_InternFromString("training")))),
        forward_(own(owned_or_throw(PyUnicode_InternFromString("forward")))),
        compiled_(own(owned_or_throw(PyUnicode_InternFromString("_compiled_call_impl")))),
        calls_(calls) {
    for (const py::dict& dict : members) {
      members_.push_back({own(dict), PyDict_GET_SIZE(dict.ptr())});
      for (const auto& [key, value] : dict) values_.push_back(own(value));
      note_table(dict.ptr());
    }
    for (const py::object& tensor : versioned) add(tensor, true);
    for (const py::object& tensor : unversioned) add(tensor, false);
    for (const py::object& alias : aliases) own(alias);
    for (const py::dict& dict : hooks) {
      hooks_.push_back(own(dict));
      note(&reinterpret_cast<PyDictObject*>(dict.ptr())->ma_used, sizeof(Py_ssize_t));
    }
    for (const py::dict& dict : instances) {
      instances_.push_back(own(dict));
      note_table(dict.ptr());
    }
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }

  bool unchanged() const {
    for (const uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line * kLine));
    return same_members() && same_tensors() && no_hooks() && same_instances();
  }

  int traverse(visitproc visit, void* arg) const {
    for (const py::object& object : owned_) Py_VISIT(object.ptr());
    return 0;
  }

 private:
  struct Member {
    PyObject* dict;
    Py_ssize_t size;
  };
  struct Tensor {
    PyObject* tensor;
    bool versioned;  // inference tensors count no versions
    uint64_t version, pointer;
  };

  PyObject* own(py::handle object) {
    owned_.push_back(py::reinterpret_borrow<py::object>(object));
    return object.ptr();
  }

  void add(const py::object& tensor, bool versioned) {
    PyObject* object = own(tensor);
    tensors_.push_back({object, versioned, versioned ? version_.checked(object) : 0, pointer_.checked(object)});
    note_tensor(object);
  }

  // Which lines will be read. Some may move (a dict that grows has another table): what is asked for then is of no use,
  // and does no harm.
  void note(const void* start, uintptr_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(start);
    for (uintptr_t line = address / kLine; line <= (address + bytes - 1) / kLine; ++line) lines_.push_back(line);
  }

  void note_table(const PyObject* object) {
    const auto dict = reinterpret_cast<const PyDictObject*>(object);
    note(dict, sizeof(PyDictObject));
    note(dict->ma_keys, 3 * kLine);  // the index of a module's dict and its first entries, all of a smaller one
    if (dict->ma_values != nullptr) note(dict->ma_values, kLine);
  }

  // Of what torch has behind a tensor, the TensorImpl and what its third and sixth words point to, in torch 2.13 the
  // storage and the version counter. Elsewhere they may be anything: nothing is read there.
  void note_tensor(PyObject* tensor) {
    note(tensor, sizeof(PyObject) + sizeof(void*));
    const py::object address = owned_or_throw(PyObject_GetAttrString(tensor, "_cdata"));
    const auto words = static_cast<const void* const*>(PyLong_AsVoidPtr(address.ptr()));
    if (words == nullptr) throw py::error_already_set();
    note(words, 208);
    note(words[2], 96);
    note(words[5], 16);
  }

  bool same_members() const {
    PyObject* const* expected = values_.data();
    for (const Member& member : members_) {
      if (PyDict_GET_SIZE(member.dict) != member.size) return false;
      PyObject* value;
      for (Py_ssize_t position = 0; PyDict_Next(member.dict, &position, nullptr, &value); ++expected) {
        if (value != *expected) return false;
      }
    }
    return true;
  }

  bool same_tensors() const {
    for (const Tensor& tensor : tensors_) {
      if (tensor.versioned && version_(tensor.tensor) != tensor.version) return false;
      if (pointer_(tensor.tensor) != tensor.pointer) return false;
    }
    return true;
  }

  bool no_hooks() const {
    for (PyObject* dict : hooks_) {
      if (PyDict_GET_SIZE(dict) != 0) return false;
    }
    return true;
  }

  bool same_instances() const {
    for (PyObject* dict : instances_) {
      PyObject* training = item(dict, training_);
      if (training == nullptr) throw py::key_error("training");
      const int truth = PyObject_IsTrue(training);
      if (truth < 0) throw py::error_already_set();
      if (truth) return false;
      if (!calls_) continue;
      const PyObject* compiled = item(dict, compiled_);
      if (item(dict, forward_) != nullptr || (compiled != nullptr && compiled != Py_None)) return false;
    }
    return true;
  }

  static PyObject* item(PyObject* dict, PyObject* key) {  // null: there is none
    PyObject* value = PyDict_GetItemWithError(dict, key);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  Objects owned_;  // every object that the other members point to; first: the others are made through it
  Version version_;
  Pointer pointer_;
  PyObject *training_, *forward_, *compiled_;
  bool calls_;
  std::vector<Member> members_;
  std::vector<PyObject*> values_;  // of the members, one dict after the other
  std::vector<Tensor> tensors_;
  std::vector<PyObject*> hooks_, instances_;
  std::vector<uintptr_t> lines_;  // of the cache, by number
};

// Null before the constructor has run, and the garbage collector may come earlier.
const Watch* constructed(PyObject* self) {
  const auto instance = reinterpret_cast<const py::detail::instance*>(self);
  return instance->simple_layout ? static_cast<const Watch*>(instance->simple_value_holder[0]) : nullptr;
}

// A module that holds its own watch is a cycle, which only the garbage collector frees. It goes through a dict, which
// then clears itself: as a tuple, the watch needs no tp_clear, and never is without what it looks at.
void collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Watch* watch = constructed(self);
    return watch ? watch->traverse(visit, arg) : 0;
  };
}

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch", py::is_final(), py::custom_type_setup(collectable))
      .def(py::init<const Dicts&, const Objects&, const Objects&, const Objects&, const Dicts&, const Dicts&, bool,
                    const py::object&, const py::object&>(),
           py::kw_only(), py::arg("members"), py::arg("versioned"), py::arg("unversioned"), py::arg("aliases"),
           py::arg("hooks"), py::arg("instances"), py::arg("calls"), py::arg("version"), py::arg("data_ptr"))
      .def("unchanged", &Watch::unchanged);
}

}  // namespace cnnfast
