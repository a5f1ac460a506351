// log(sigma_1 / sigma_r) of small matrices, sigma_r the smallest singular value above rank_tol (pDMI, Eq. 7).
//
// On CUDA rows and columns of a matrix, or the smaller of classes and items, are at most 128, and left and right of 2x2
// matrices are aligned to 16 bytes. scratch: as many doubles as `*_scratch` returns, null for 0.
#pragma once

#include "operator.h"

namespace d2net {

template <typename T>
struct LogConditionNumber {
  static constexpr int kSettings = 1;
  double rank_tol;
  const T* u;  // (n, rows, cols)
  int64_t n, rows, cols;

  T* value;  // (n): 0 for rank <= 1, NaN where u holds NaN or Inf
  // (n, 2, rows) and (n, 2, cols): the gradient of value[i] is left[i]^T right[i], of rank two; 0 for rank <= 1, NaN
  // where value is. In general left is u1 / sigma_1 and -ur / sigma_r, right v1 and vr.
  T *left, *right;
  double* scratch = nullptr;  // CUDA

  // Backward: grad_value[i] left[i]^T right[i]; u, value and rank_tol are not read.
  const T* grad_value = nullptr;  // (n)
  T* grad_u = nullptr;            // (n, rows, cols)
};

D2NET_DECLARE(log_condition_number, LogConditionNumber)
D2NET_DECLARE(log_condition_number_backward, LogConditionNumber)

// The same for the products p[i] y[i], which are not computed.
template <typename T>
struct JointLogConditionNumber {
  static constexpr int kSettings = 1;
  double rank_tol;
  const T *p, *y;  // (n, classes, items), (n, items, classes)
  int64_t n, classes, items;

  T* value;  // (n)
  // The gradients with respect to p and y are p_left[i]^T p_right[i] and y_left[i]^T y_right[i]: p_left, y_right
  // (n, 2, classes), p_right, y_left (n, 2, items).
  T *p_left, *p_right, *y_left, *y_right;
  double* scratch = nullptr;  // CUDA
};

D2NET_DECLARE(joint_log_condition_number, JointLogConditionNumber)

namespace cuda {

int64_t log_condition_number_scratch(int64_t n, int64_t rows, int64_t cols, int device, void* stream);
int64_t joint_log_condition_number_scratch(int64_t n, int64_t classes, int64_t items, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
