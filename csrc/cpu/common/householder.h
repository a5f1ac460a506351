// Householder reflections of plain vectors, and of kGroup vectors at once, in arrays whose last dimension is the
// vector. Call the inline functions from D2NET_SIMD ones (simd.h).
#pragma once

#include <cstdint>

#include "math/reflector.h"

namespace d2net::cpu {

constexpr int kGroup = 8;

[[gnu::always_inline]] inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// x -= by * y
[[gnu::always_inline]] inline void subtract(double* x, const double* y, double by, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] -= by * y[i];
}

// Turns x[0..n) into the reflector's vector v.
[[gnu::always_inline]] inline Reflector reflect(double* x, int64_t n) {
  const Reflector h = reflector(x[0], dot(x + 1, x + 1, n - 1));
  for (int64_t i = 1; i < n; ++i) x[i] *= h.scale;
  x[0] = 1;
  return h;
}

// x = H_0 H_1 ... H_{n-1} x for both x (2, length) and reflectors in rows of `v`, `stride` apart; that of H_k begins at
// element k + offset.
void apply_reflectors(const double* v, const double* tau, int64_t n, int64_t stride, int64_t offset, int64_t length,
                      double* x);

// The same for a group: x (2, length, kGroup), reflectors (n, stride, kGroup), tau (n, kGroup).
void apply_reflectors_group(const double* v, const double* tau, int64_t n, int64_t stride, int64_t offset,
                            int64_t length, double* x);

}  // namespace d2net::cpu
