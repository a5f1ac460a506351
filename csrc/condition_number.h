// log(sigma_1 / sigma_r) of small matrices, sigma_r the smallest singular value above rank_tol (pDMI, Eq. 7).
#pragma once

#include <cstdint>

namespace d2net {

namespace cpu {

// u (n, rows, cols) -> value (n): 0 for rank <= 1, NaN where u holds NaN or Inf.
// left (n, 2, rows), right (n, 2, cols): the gradient of value[i] is left[i]^T right[i], of rank two; 0 for rank <= 1,
// NaN where value is. In general left is u1 / sigma_1 and -ur / sigma_r, right v1 and vr.
template <typename T>
void log_condition_number(const T* u, int64_t n, int64_t rows, int64_t cols, double rank_tol, T* value, T* left,
                          T* right, int threads);

// The same of the products p[i] y[i] of p (n, classes, items) and y (n, items, classes), which are not formed.
// The gradient is p_left[i]^T p_right[i] for p and y_left[i]^T y_right[i] for y:
// p_left, y_right (n, 2, classes), p_right, y_left (n, 2, items).
template <typename T>
void joint_log_condition_number(const T* p, const T* y, int64_t n, int64_t classes, int64_t items, double rank_tol,
                                T* value, T* p_left, T* p_right, T* y_left, T* y_right, int threads);

// gradient (n, rows, cols) = grad[i] left[i]^T right[i]
template <typename T>
void log_condition_number_backward(const T* grad, const T* left, const T* right, int64_t n, int64_t rows, int64_t cols,
                                   T* gradient, int threads);

}  // namespace cpu

// The same on a device, enqueued on `stream` (a cudaStream_t); every pointer is device memory. Both sides of a matrix,
// or the shorter one of p, are at most 128. scratch: as many doubles as `*_scratch` says, null for 0: blocks then have
// enough shared memory. left and right of 2x2 matrices are aligned to 16 bytes.
namespace cuda {

int64_t log_condition_number_scratch(int64_t n, int64_t rows, int64_t cols, int device, void* stream);

template <typename T>
void log_condition_number(const T* u, int64_t n, int64_t rows, int64_t cols, double rank_tol, T* value, T* left,
                          T* right, double* scratch, int device, void* stream);

int64_t joint_log_condition_number_scratch(int64_t n, int64_t classes, int64_t items, int device, void* stream);

template <typename T>
void joint_log_condition_number(const T* p, const T* y, int64_t n, int64_t classes, int64_t items, double rank_tol,
                                T* value, T* p_left, T* p_right, T* y_left, T* y_right, double* scratch, int device,
                                void* stream);

template <typename T>
void log_condition_number_backward(const T* grad, const T* left, const T* right, int64_t n, int64_t rows, int64_t cols,
                                   T* gradient, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
