// The only C++ file that knows Python. Pointers come as integers from d2net/ops/_native.py, which has checked
// shapes, types and devices; nothing here touches a Python object while the kernels run, so the GIL is released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "condition_number.h"
#include "iou.h"
#include "nms.h"
#include "snippet_pdmi.h"

namespace py = pybind11;

namespace {

// What Python passes for a C++ parameter: an address for a pointer, anything else as it is.
template <typename T>
struct Passed {
  using type = T;
  static T get(T value) { return value; }
};
template <typename T>
struct Passed<T*> {
  using type = std::uintptr_t;
  static T* get(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};

template <typename R, typename... Args>
void def(py::module_& m, const std::string& name, R (*function)(Args...)) {
  m.def(
      name.c_str(),
      [function](typename Passed<Args>::type... args) -> R { return function(Passed<Args>::get(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

template <typename T>
void bind_cpu(py::module_& m, const std::string& dtype) {
  namespace ops = d2net::cpu;
  def(m, "nms_1d_" + dtype, &ops::nms_1d<T>);
  def(m, "batched_nms_1d_" + dtype, &ops::batched_nms_1d<T>);
  def(m, "soft_nms_1d_" + dtype, &ops::soft_nms_1d<T>);
  def(m, "iou_1d_" + dtype, &ops::iou_1d<T>);
  def(m, "log_condition_number_" + dtype, &ops::log_condition_number<T>);
  def(m, "joint_log_condition_number_" + dtype, &ops::joint_log_condition_number<T>);
  def(m, "log_condition_number_backward_" + dtype, &ops::log_condition_number_backward<T>);
  def(m, "snippet_pdmi_" + dtype, &ops::snippet_pdmi<T>);
  def(m, "snippet_pdmi_backward_" + dtype, &ops::snippet_pdmi_backward<T>);
}

#ifdef D2NET_WITH_CUDA
template <typename T>
void bind_cuda(py::module_& m, const std::string& dtype) {
  namespace ops = d2net::cuda;
  def(m, "cuda_batched_nms_1d_" + dtype, &ops::batched_nms_1d<T>);
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

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  bind_cpu<float>(m, "float32");
  bind_cpu<double>(m, "float64");
#ifdef D2NET_WITH_CUDA
  bind_cuda<float>(m, "float32");
  bind_cuda<double>(m, "float64");
#endif
}
