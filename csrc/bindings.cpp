// The only C++ file that knows Python. The module is private to d2net/ops/_native.py: pointers come as integers and are
// believed. Operators have checked shapes, types, devices and numbers before, _native.py once more that memory is
// contiguous and where it should be. Nothing here touches a Python object while the kernels run, so the GIL is
// released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "attention_pool.h"
#include "bottom_up_attention.h"
#include "condition_number.h"
#include "iou.h"
#include "loss.h"
#include "nms.h"
#include "proposals.h"
#include "snippet_pdmi.h"
#include "topk_pool.h"
#include "two_stream_tcam.h"
#ifdef D2NET_SIMT
#include "simt/simt.h"
#endif

namespace py = pybind11;

namespace {

// What Python passes for a C++ parameter: an address for a pointer, bytes for a struct, anything else as it is.
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
template <typename X>
struct Passed<const d2net::Loss<X>&> {
  using type = std::string_view;
  static d2net::Loss<X> get(std::string_view bytes) {
    d2net::Loss<X> value;
    if (bytes.size() != sizeof value) throw std::length_error("d2net/ops/loss.py packs another struct");
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
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
  def(m, "attention_pool_" + dtype, &ops::attention_pool<T>);
  def(m, "attention_pool_backward_" + dtype, &ops::attention_pool_backward<T>);
  def(m, "bottom_up_attention_" + dtype, &ops::bottom_up_attention<T>);
  def(m, "nms_1d_" + dtype, &ops::nms_1d<T>);
  def(m, "batched_nms_1d_" + dtype, &ops::batched_nms_1d<T>);
  def(m, "soft_nms_1d_" + dtype, &ops::soft_nms_1d<T>);
  def(m, "iou_1d_" + dtype, &ops::iou_1d<T>);
  py::class_<ops::FoundProposals<T>>(m, ("FoundProposals_" + dtype).c_str())
      .def_readonly("count", &ops::FoundProposals<T>::count);
  def(m, "find_proposals_" + dtype, &ops::find_proposals<T>);
  def(m, "copy_proposals_" + dtype, &ops::copy_proposals<T>);
  def(m, "topk_pool_" + dtype, &ops::topk_pool<T>);
  def(m, "topk_pool_backward_" + dtype, &ops::topk_pool_backward<T>);
  def(m, "tcam_pool_" + dtype, &ops::tcam_pool<T>);
  def(m, "tcam_pool_backward_" + dtype, &ops::tcam_pool_backward<T>);
  def(m, "two_stream_tcam_" + dtype, &ops::two_stream_tcam<T>);
  def(m, "two_stream_tcam_backward_" + dtype, &ops::two_stream_tcam_backward<T>);
  def(m, "log_condition_number_" + dtype, &ops::log_condition_number<T>);
  def(m, "joint_log_condition_number_" + dtype, &ops::joint_log_condition_number<T>);
  def(m, "log_condition_number_backward_" + dtype, &ops::log_condition_number_backward<T>);
  def(m, "snippet_pdmi_" + dtype, &ops::snippet_pdmi<T>);
  def(m, "snippet_pdmi_backward_" + dtype, &ops::snippet_pdmi_backward<T>);
  def(m, "loss_" + dtype, &ops::loss<T>);
  def(m, "loss_backward_" + dtype, &ops::loss_backward<T>);
}

#if defined(D2NET_WITH_CUDA) || defined(D2NET_SIMT)
template <typename T>
void bind_cuda(py::module_& m, const std::string& dtype) {
  namespace ops = d2net::cuda;
  def(m, "cuda_nms_1d_block_" + dtype, &ops::nms_1d_block<T>);
  def(m, "cuda_nms_1d_scratch_bytes_" + dtype, &ops::nms_1d_scratch_bytes<T>);
  def(m, "cuda_nms_1d_" + dtype, &ops::nms_1d<T>);
  def(m, "cuda_soft_nms_1d_" + dtype, &ops::soft_nms_1d<T>);
  def(m, "cuda_copy_proposals_" + dtype, &ops::copy_proposals<T>);
  def(m, "cuda_log_condition_number_" + dtype, &ops::log_condition_number<T>);
  def(m, "cuda_log_condition_number_scratch_" + dtype, &ops::log_condition_number_scratch);
  def(m, "cuda_joint_log_condition_number_" + dtype, &ops::joint_log_condition_number<T>);
  def(m, "cuda_joint_log_condition_number_scratch_" + dtype, &ops::joint_log_condition_number_scratch);
  def(m, "cuda_log_condition_number_backward_" + dtype, &ops::log_condition_number_backward<T>);
  def(m, "cuda_snippet_pdmi_" + dtype, &ops::snippet_pdmi<T>);
  def(m, "cuda_snippet_pdmi_backward_" + dtype, &ops::snippet_pdmi_backward<T>);
  def(m, "cuda_iou_1d_" + dtype, &ops::iou_1d<T>);
}

// Operators on activations, which come in half precision too.
template <typename T>
void bind_cuda_activations(py::module_& m, const std::string& dtype) {
  namespace ops = d2net::cuda;
  def(m, "cuda_find_proposals_scratch_bytes_" + dtype, &ops::find_proposals_scratch_bytes<T>);
  def(m, "cuda_find_proposals_" + dtype, &ops::find_proposals<T>);
  def(m, "cuda_attention_pool_" + dtype, &ops::attention_pool<T>);
  def(m, "cuda_attention_pool_backward_" + dtype, &ops::attention_pool_backward<T>);
  def(m, "cuda_bottom_up_attention_" + dtype, &ops::bottom_up_attention<T>);
  def(m, "cuda_loss_scratch_bytes_" + dtype, &ops::loss_scratch_bytes<T>);
  def(m, "cuda_loss_" + dtype, &ops::loss<T>);
  def(m, "cuda_loss_backward_" + dtype, &ops::loss_backward<T>);
  def(m, "cuda_topk_pool_" + dtype, &ops::topk_pool<T>);
  def(m, "cuda_topk_pool_backward_" + dtype, &ops::topk_pool_backward<T>);
  def(m, "cuda_tcam_pool_" + dtype, &ops::tcam_pool<T>);
  def(m, "cuda_tcam_pool_backward_" + dtype, &ops::tcam_pool_backward<T>);
  def(m, "cuda_two_stream_tcam_" + dtype, &ops::two_stream_tcam<T>);
  def(m, "cuda_two_stream_tcam_backward_" + dtype, &ops::two_stream_tcam_backward<T>);
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
  bind_cuda<double>(m, "float64");
  bind_cuda_activations<float>(m, "float32");
  bind_cuda_activations<double>(m, "float64");
  bind_cuda_activations<d2net::float16>(m, "float16");
  bind_cuda_activations<d2net::bfloat16>(m, "bfloat16");
#endif
}
