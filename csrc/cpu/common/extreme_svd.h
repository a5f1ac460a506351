// The largest and the smallest singular value of small matrices, with their vectors, in double: those of B = L^T A R
// (bidiagonal.h), found by bidiagonal_svd.h, brought back by the reflections. Of everything there is a version for one
// matrix and one for kGroup of them, in arrays whose last dimension is the matrix.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/common/bidiagonal.h"

namespace d2net::cpu {

// Of `group` matrices (m, n) at once, m >= n: one, whose columns fill the vectors, or kGroup small ones, one in each
// lane. What is in the other lanes does not matter to a matrix.
template <int group>
class ExtremeSvd {
 public:
  // precision: largest relative error of the singular values.
  ExtremeSvd(int64_t m, int64_t n, double precision);

  // Sets a row of matrix g (at first all are 0) to x, whose elements are `step` apart; run() destroys the matrices.
  template <typename T>
  void set_row(int64_t row, int g, const T* x, int64_t step) {
    for (int64_t first = 0; first < n_; first += kPanel) {
      const int64_t panel = group == 1 ? first * m_ + row * kPanel : (row * n_ + first) * group + g;
      double* to = a_ + panel;
      for (int64_t l = 0; l < std::min<int64_t>(kPanel, n_ - first); ++l) to[l * group] = x[(first + l) * step];
    }
  }
  void clear(int g) {
    for (int64_t i = g; i < m_ * stride_ * group; i += group) a_[i] = 0;
  }

  // Smaller singular values than rank_tol do not count.
  void run(const double (&rank_tol)[group]);

  bool finite[group];           // no element was NaN or infinite
  bool proper[group];           // finite and of rank >= 2; else the following mean nothing
  double log_condition[group];  // log(sigma_1 / sigma_r)
  double inverse[2][group];     // 1 / sigma_1, 1 / sigma_r
  double *left, *right;         // (2, m, group), (2, n, group): their vectors

 private:
  const int64_t m_, n_, stride_;
  const double precision_;
  std::vector<double> memory_;
  double *a_, *left_reflectors_, *right_reflectors_, *left_tau_, *right_tau_, *b_, *squares_, *work_, *w_, *x_, *y_;
};

}  // namespace d2net::cpu
