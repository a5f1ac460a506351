// The only C++ file that knows Python. Pointers come as integers from d2net/ops/_native.py, which has checked
// shapes, types and devices; nothing here touches a Python object while the kernels run, so the GIL is released.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "nms.h"

namespace py = pybind11;

namespace {

template <typename T>
T* ptr(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void bind_nms(py::module_& m, const char* nms, const char* batched, const char* soft) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      nms,
      [](std::uintptr_t segments, std::uintptr_t scores, int64_t n, double threshold, std::uintptr_t keep) {
        return d2net::cpu::nms_1d(ptr<const T>(segments), ptr<const T>(scores), n, threshold, ptr<int64_t>(keep));
      },
      release());
  m.def(
      batched,
      [](std::uintptr_t segments, std::uintptr_t scores, std::uintptr_t groups, int64_t n, double threshold,
         std::uintptr_t keep) {
        return d2net::cpu::batched_nms_1d(ptr<const T>(segments), ptr<const T>(scores), ptr<const int64_t>(groups), n,
                                          threshold, ptr<int64_t>(keep));
      },
      release());
  m.def(
      soft,
      [](std::uintptr_t segments, std::uintptr_t scores, int64_t n, double threshold, double sigma, double min_score,
         bool gaussian, std::uintptr_t keep, std::uintptr_t new_scores) {
        const auto method = gaussian ? d2net::cpu::SoftMethod::kGaussian : d2net::cpu::SoftMethod::kLinear;
        return d2net::cpu::soft_nms_1d(ptr<const T>(segments), ptr<const T>(scores), n, threshold, sigma, min_score,
                                       method, ptr<int64_t>(keep), ptr<T>(new_scores));
      },
      release());
}

#ifdef D2NET_WITH_CUDA
template <typename T>
void bind_cuda_nms(py::module_& m, const char* batched) {
  m.def(
      batched,
      [](std::uintptr_t segments, std::uintptr_t offsets, int64_t n, int64_t n_groups, double threshold,
         std::uintptr_t alive, int device, std::uintptr_t stream) {
        d2net::cuda::batched_nms_1d(ptr<const T>(segments), ptr<const int64_t>(offsets), n, n_groups, threshold,
                                    ptr<uint8_t>(alive), device, ptr<void>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
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
  bind_nms<float>(m, "nms_1d_float32", "batched_nms_1d_float32", "soft_nms_1d_float32");
  bind_nms<double>(m, "nms_1d_float64", "batched_nms_1d_float64", "soft_nms_1d_float64");
#ifdef D2NET_WITH_CUDA
  bind_cuda_nms<float>(m, "cuda_batched_nms_1d_float32");
  bind_cuda_nms<double>(m, "cuda_batched_nms_1d_float64");
#endif
}
