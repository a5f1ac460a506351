// The only C++ file that knows Python. The module is private to d2net/ops/_native.py. Operators have checked shapes,
// types, devices and numbers before; here it is looked at once more that memory is contiguous and where it should be,
// for else it would be read, or written, past its end. Tensors are asked by their methods, not through PyTorch's
// headers: one build serves all versions of PyTorch. While the kernels run, the GIL is released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "adam.h"
#include "nms.h"
#include "operators.h"
#include "proposals.h"
#ifdef D2NET_SIMT
#include "simt/simt.h"
#endif

namespace py = pybind11;

namespace {

// Who is called, and where the memory of its tensors must be: -1 for a CPU, else the index of a GPU.
struct Place {
  const char* function;
  int device;
};

[[noreturn]] void refuse(py::handle x, const Place& at) {
  const auto text = [&](const char* attribute) { return std::string(py::str(x.attr(attribute))); };
  const std::string strides = py::str(x.attr("stride")());
  throw std::runtime_error(std::string(at.function) + " expects contiguous tensors in memory of " +
                           (at.device < 0 ? "the CPU" : "cuda:" + std::to_string(at.device)) + ", not " +
                           text("shape") + " with strides " + strides + " on " + text("device"));
}

// What a method without arguments returns, as a number.
long long ask(py::handle x, PyObject* method) {
  const py::object answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(x.ptr(), method));
  if (!answer) throw py::error_already_set();
  const long long value = PyLong_AsLongLong(answer.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Of a tensor, or null for None; a whole number is an address already, or a size in a struct.
std::uintptr_t address(py::handle x, const Place& at) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const is_contiguous = PyUnicode_InternFromString("is_contiguous");
  static PyObject* const get_device = PyUnicode_InternFromString("get_device");
  static PyObject* const numel = PyUnicode_InternFromString("numel");
  if (x.is_none()) return 0;
  if (PyLong_Check(x.ptr())) {
    const long long value = PyLong_AsLongLong(x.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return std::uintptr_t(value);
  }
  const std::uintptr_t place = std::uintptr_t(ask(x, data_ptr));
  if (ask(x, get_device) != at.device || ask(x, is_contiguous) == 0) refuse(x, at);
  if (place == 0 && ask(x, numel) > 0) refuse(x, at);  // on the meta device, or its memory was freed
  return place;
}

// What Python passes for a C++ parameter: a tensor for a pointer, a tuple for a struct, else what it is.
template <typename T, typename = void>
struct Passed {
  using type = T;
  static T get(T value, const Place&) { return value; }
};
template <typename T>
struct Passed<T*, void> {
  using type = py::handle;
  static T* get(py::handle x, const Place& at) { return reinterpret_cast<T*>(address(x, at)); }
};
template <typename Struct>
struct Passed<const Struct&, std::void_t<decltype(Struct::kSettings)>> {  // of operator.h
  using type = py::handle;

  static Struct get(py::handle x, const Place& at) {
    static_assert(sizeof(void*) == 8 && sizeof(Struct) % 8 == 0 && std::is_trivially_copyable_v<Struct>);
    Struct value;
    if (!PyTuple_Check(x.ptr()) || 8 * PyTuple_GET_SIZE(x.ptr()) != Py_ssize_t(sizeof value)) {
      throw std::length_error(std::string(at.function) + " expects a tuple of " + std::to_string(sizeof value / 8));
    }
    char* to = reinterpret_cast<char*>(&value);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x.ptr()); ++i) {
      const py::handle member = PyTuple_GET_ITEM(x.ptr(), i);
      if (i < Struct::kSettings) {
        const double setting = PyFloat_AsDouble(member.ptr());
        if (setting == -1 && PyErr_Occurred()) throw py::error_already_set();
        std::memcpy(to + 8 * i, &setting, 8);
      } else {
        const std::uintptr_t place = address(member, at);
        std::memcpy(to + 8 * i, &place, 8);
      }
    }
    return value;
  }
};

// on_cuda: its last parameters are a device and a stream.
template <bool on_cuda, typename R, typename... Args>
void def(py::module_& m, const std::string& name, R (*function)(Args...)) {
  m.def(name.c_str(), [function, name](typename Passed<Args>::type... args) -> R {
    Place at{name.c_str(), -1};
    if constexpr (on_cuda) at.device = std::get<sizeof...(Args) - 2>(std::forward_as_tuple(args...));
    // In braces they are evaluated in order.
    std::tuple<decltype(Passed<Args>::get(args, at))...> values{Passed<Args>::get(args, at)...};
    const py::gil_scoped_release released;
    return std::apply(function, values);
  });
}

#define D2NET_BIND_CPU(function) def<false>(m, #function "_" + dtype, &ops::function<T>);
#define D2NET_BIND_CUDA(function) def<true>(m, "cuda_" #function "_" + dtype, &ops::function<T>);
#define D2NET_LEAVE_OUT(function)

template <typename T>
void bind_cpu(py::module_& m, const std::string& dtype) {
  namespace ops = d2net::cpu;
  D2NET_OPERATORS(D2NET_BIND_CPU, D2NET_BIND_CPU)
  def<false>(m, "nms_1d_" + dtype, &ops::nms_1d<T>);
  def<false>(m, "batched_nms_1d_" + dtype, &ops::batched_nms_1d<T>);
  def<false>(m, "soft_nms_1d_" + dtype, &ops::soft_nms_1d<T>);
  py::class_<ops::FoundProposals<T>>(m, ("FoundProposals_" + dtype).c_str())
      .def_readonly("count", &ops::FoundProposals<T>::count);
  def<false>(m, "find_proposals_" + dtype, &ops::find_proposals<T>);
  def<false>(m, "copy_proposals_" + dtype, &ops::copy_proposals<T>);
}

#if defined(D2NET_WITH_CUDA) || defined(D2NET_SIMT)
template <typename T>
void bind_cuda(py::module_& m, const std::string& dtype) {
  namespace ops = d2net::cuda;
  D2NET_OPERATORS(D2NET_LEAVE_OUT, D2NET_BIND_CUDA)
  def<true>(m, "cuda_nms_1d_block_" + dtype, &ops::nms_1d_block<T>);
  def<true>(m, "cuda_nms_1d_scratch_bytes_" + dtype, &ops::nms_1d_scratch_bytes<T>);
  def<true>(m, "cuda_nms_1d_" + dtype, &ops::nms_1d<T>);
  def<true>(m, "cuda_soft_nms_1d_" + dtype, &ops::soft_nms_1d<T>);
  def<true>(m, "cuda_copy_proposals_" + dtype, &ops::copy_proposals<T>);
  def<true>(m, "cuda_log_condition_number_scratch_" + dtype, &ops::log_condition_number_scratch);
  def<true>(m, "cuda_joint_log_condition_number_scratch_" + dtype, &ops::joint_log_condition_number_scratch);
}

// Operators on activations, which come in half precision too.
template <typename T>
void bind_cuda_activations(py::module_& m, const std::string& dtype) {
  namespace ops = d2net::cuda;
  D2NET_OPERATORS(D2NET_BIND_CUDA, D2NET_LEAVE_OUT)
  def<true>(m, "cuda_find_proposals_scratch_bytes_" + dtype, &ops::find_proposals_scratch_bytes<T>);
  def<true>(m, "cuda_find_proposals_" + dtype, &ops::find_proposals<T>);
  def<true>(m, "cuda_loss_scratch_bytes_" + dtype, &ops::loss_scratch_bytes<T>);
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = D2NET_COMPILER;
#ifdef D2NET_WITH_CUDA
  info["cuda"] = true;
  info["cuda_compiler"] = D2NET_CUDA_COMPILER;
  info["cuda_archs"] = D2NET_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_compiler"] = "";
  info["cuda_archs"] = "";
#endif
  return info;
}

}  // namespace

#ifdef D2NET_SIMT
// The CUDA kernels on the CPU, under the names that they have in _C; for tests.
PYBIND11_MODULE(_simt, m) {
  m.def("set_shared_memory_limit", &d2net::simt::set_shared_memory_limit);
  m.def("set_schedule", &d2net::simt::set_schedule, py::arg("resident_blocks") = d2net::simt::kResidentBlocks,
        py::arg("seed") = 0);
  m.def("enqueued", &d2net::simt::enqueued);
#else
PYBIND11_MODULE(_C, m) {
  bind_cpu<float>(m, "float32");
  bind_cpu<double>(m, "float64");
#endif
  m.def("build_info", &build_info);
#if defined(D2NET_WITH_CUDA) || defined(D2NET_SIMT)
  bind_cuda<float>(m, "float32");
  def<true>(m, "cuda_adam_step_float32", &d2net::cuda::adam_step<float>);
  bind_cuda<double>(m, "float64");
  bind_cuda_activations<float>(m, "float32");
  bind_cuda_activations<double>(m, "float64");
  bind_cuda_activations<d2net::float16>(m, "float16");
  bind_cuda_activations<d2net::bfloat16>(m, "bfloat16");
#endif
}
