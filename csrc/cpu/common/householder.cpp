#include "cpu/common/householder.h"

#include "cpu/common/simd.h"

namespace d2net::cpu {

D2NET_SIMD void apply_reflectors(const double* v, const double* tau, int64_t n, int64_t stride, int64_t offset,
                                 int64_t length, double* x) {
  double* x2 = x + length;
  for (int64_t k = n - 1; k >= 0; --k) {
    const double* y = v + k * stride;
    double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t i = k + offset; i < length; ++i) {
      first += y[i] * x[i];
      second += y[i] * x2[i];
    }
    first *= tau[k];
    second *= tau[k];
#pragma omp simd
    for (int64_t i = k + offset; i < length; ++i) {
      x[i] -= first * y[i];
      x2[i] -= second * y[i];
    }
  }
}

D2NET_SIMD void apply_reflectors_group(const double* v, const double* tau, int64_t n, int64_t stride, int64_t offset,
                                       int64_t length, double* x) {
  double* x2 = x + length * kGroup;
  for (int64_t k = n - 1; k >= 0; --k) {
    const double* y = v + k * stride * kGroup;
    double first[kGroup] = {}, second[kGroup] = {};
    for (int64_t i = k + offset; i < length; ++i) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) {
        first[g] += y[i * kGroup + g] * x[i * kGroup + g];
        second[g] += y[i * kGroup + g] * x2[i * kGroup + g];
      }
    }
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) {
      first[g] *= tau[k * kGroup + g];
      second[g] *= tau[k * kGroup + g];
    }
    for (int64_t i = k + offset; i < length; ++i) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) {
        x[i * kGroup + g] -= first[g] * y[i * kGroup + g];
        x2[i * kGroup + g] -= second[g] * y[i * kGroup + g];
      }
    }
  }
}

}  // namespace d2net::cpu
