// Householder reflections that make a matrix bidiagonal, B = L^T A R.
#pragma once

#include <cstdint>

#include "cpu/common/householder.h"

namespace d2net::cpu {

constexpr int kPanel = 8;  // columns of a panel

// One matrix (m, n), m >= n, in panels (m, kPanel) that lie one after the other, padded with 0 to `stride` columns; it
// is destroyed. b: the entries d_0, e_0, d_1, ..., e_{n-2}, d_{n-1} of B. Left reflectors come as rows of `left`
// (n, m), the right ones as rows of `right` (n, stride), with their tau. w (stride), x (m), y (m, 4): scratch.
void bidiagonalize(double* a, int64_t m, int64_t n, int64_t stride, double* b, double* left, double* left_tau,
                   double* right, double* right_tau, double* w, double* x, double* y);

// kGroup matrices (m, n, kGroup); here stride is n, and x and y are not needed.
void bidiagonalize_group(double* a, int64_t m, int64_t n, double* b, double* left, double* left_tau, double* right,
                         double* right_tau, double* w);

}  // namespace d2net::cpu
