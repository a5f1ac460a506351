#include "cpu/common/bidiagonal.h"

#include <algorithm>

#include "cpu/common/householder.h"
#include "cpu/common/simd.h"

namespace d2net::cpu {
namespace {

// A panel of A (m, kPanel), less u w^T + x v^T, from row k on; sum = A^T next_u.
[[gnu::always_inline]] inline void update_panel(double* panel, int64_t k, int64_t m, const double* u, const double* w,
                                                const double* x, const double* v, const double* next_u, double* sum) {
  double by_u[kPanel], by_x[kPanel], total[kPanel] = {};
  for (int l = 0; l < kPanel; ++l) {
    by_u[l] = w[l];
    by_x[l] = v[l];
  }
  for (int64_t i = k; i < m; ++i) {
    double* row = panel + i * kPanel;
    const double u_i = u[i], x_i = x[i], next_i = next_u[i];
#pragma omp simd
    for (int l = 0; l < kPanel; ++l) {
      const double now = row[l] - (u_i * by_u[l] + x_i * by_x[l]);
      row[l] = now;
      total[l] += next_i * now;
    }
  }
  for (int l = 0; l < kPanel; ++l) sum[l] = total[l];
}

// y += A z for one or two panels of A, from row k on; y in kPart parts, to be added up.
constexpr int kPart = 4;
template <int panels>
[[gnu::always_inline]] inline void add_products(const double* panel, int64_t k, int64_t m, const double* z, double* y) {
  double by[panels * kPanel];
  for (int l = 0; l < panels * kPanel; ++l) by[l] = z[l];
  for (int64_t i = k; i < m; ++i) {
    const double *row = panel + i * kPanel, *row2 = row + (panels - 1) * m * kPanel, *by2 = by + (panels - 1) * kPanel;
#pragma omp simd
    for (int l = 0; l < kPart; ++l) {
      const double one = row[l] * by[l] + row[l + kPart] * by[l + kPart];
      const double two = panels == 1 ? 0 : row2[l] * by2[l] + row2[l + kPart] * by2[l + kPart];
      y[i * kPart + l] += one + two;
    }
  }
}

// Turns x (n, kGroup) into the reflectors' vectors.
[[gnu::always_inline]] inline void reflect_group(double* x, int64_t n, double* beta, double* tau) {
  double squares[kGroup] = {}, scale[kGroup];
  for (int64_t i = 1; i < n; ++i) {
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) squares[g] += x[i * kGroup + g] * x[i * kGroup + g];
  }
#pragma omp simd
  for (int g = 0; g < kGroup; ++g) {
    const Reflector h = reflector(x[g], squares[g]);
    beta[g] = h.beta;
    tau[g] = h.tau;
    scale[g] = h.scale;
    x[g] = 1;
  }
  for (int64_t i = 1; i < n; ++i) {
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) x[i * kGroup + g] *= scale[g];
  }
}

// w = tau A^T u for `columns` columns of A.
template <int columns>
[[gnu::always_inline]] inline void multiply_columns(const double* a, int64_t stride, int64_t rows, const double* u,
                                                    const double* tau, double* w) {
  double sum[columns][kGroup] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int c = 0; c < columns; ++c) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) sum[c][g] += u[i * kGroup + g] * a[i * stride + c * kGroup + g];
    }
  }
  for (int c = 0; c < columns; ++c) {
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) w[c * kGroup + g] = tau[g] * sum[c][g];
  }
}

// A -= u w^T + tau (A v - u w^T v) v^T for `rows` rows of A.
template <int rows>
[[gnu::always_inline]] inline void update_rows(double* a, int64_t stride, int64_t columns, const double* u,
                                               const double* w, const double* v, const double* wv, const double* tau) {
  double x[rows][kGroup] = {};
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < rows; ++r) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) x[r][g] += a[r * stride + j * kGroup + g] * v[j * kGroup + g];
    }
  }
  for (int r = 0; r < rows; ++r) {
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) x[r][g] = tau[g] * (x[r][g] - u[r * kGroup + g] * wv[g]);
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < rows; ++r) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) {
        a[r * stride + j * kGroup + g] -= u[r * kGroup + g] * w[j * kGroup + g] + x[r][g] * v[j * kGroup + g];
      }
    }
  }
}

}  // namespace

// Step k maps A to A - u w^T - x v^T, with u of column k, w = tau_u A^T u, v of row k less w, x = tau_v (A v - u w^T
// v). It waits until step k + 1, which reads and writes every panel once: it brings the panel up to date, adds up its
// part of the next w, which gives its part z of the row that v is made of, and adds up A z. A v follows from it, as v
// is z - beta e_0 but for a factor.
D2NET_SIMD void bidiagonalize(double* a, int64_t m, int64_t n, int64_t stride, double* b, double* left,
                              double* left_tau, double* right, double* right_tau, double* w, double* x, double* y) {
  std::fill_n(w, stride, 0.0);
  std::fill_n(x, m, 0.0);
  const double *u = x, *v = w;  // of the step before; at first there is none
  for (int64_t k = 0; k < n; ++k) {
    double* next_u = left + k * m;
    const double *column = a + k / kPanel * m * kPanel + k % kPanel, w_k = w[k], v_k = v[k];
    for (int64_t i = k; i < m; ++i) next_u[i] = column[i * kPanel] - (u[i] * w_k + x[i] * v_k);
    const Reflector h = reflect(next_u + k, m - k);
    b[2 * k] = h.beta;
    left_tau[k] = h.tau;
    right_tau[k] = 0;
    if (k + 1 == n) return;

    double* z = right + k * stride;
    std::fill(y + k * kPart, y + m * kPart, 0.0);
    for (int64_t first = (k + 1) / kPanel * kPanel, end; first < stride; first = end) {
      end = std::min(first + 2 * kPanel, stride);
      for (int64_t p = first; p < end; p += kPanel) {
        double *panel = a + p * m, sum[kPanel];
        update_panel(panel, k, m, u, w + p, x, v + p, next_u, sum);
        for (int l = 0; l < kPanel; ++l) {
          const bool done = p + l <= k;  // a column of an earlier step
          w[p + l] = done ? 0 : h.tau * sum[l];
          z[p + l] = done ? 0 : panel[k * kPanel + l] - w[p + l];
        }
      }
      const double* panel = a + first * m;
      end - first == kPanel ? add_products<1>(panel, k + 1, m, z + first, y)
                            : add_products<2>(panel, k + 1, m, z + first, y);
    }
    const int64_t from = k + 1;
    const double wz = dot(w + from, z + from, stride - from);
    const Reflector g = reflect(z + from, stride - from);
    b[2 * k + 1] = g.beta;
    right_tau[k] = g.tau;
    const double wv = g.scale * (wz - g.beta * w[from]);
    column = a + from / kPanel * m * kPanel + from % kPanel;
    for (int64_t i = from; i < m; ++i) {
      const double* part = y + i * kPart;
      const double az = (part[0] + part[2]) + (part[1] + part[3]);
      x[i] = g.tau * (g.scale * (az - g.beta * column[i * kPanel]) - next_u[i] * wv);
    }
    u = next_u;
    v = z;
  }
}

// Step by step.
D2NET_SIMD void bidiagonalize_group(double* a, int64_t m, int64_t n, double* b, double* left, double* left_tau,
                                    double* right, double* right_tau, double* w) {
  const int64_t stride = n * kGroup;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t rows = m - k, columns = n - k - 1;
    double *rest = a + k * stride + k * kGroup, *u = left + (k * m + k) * kGroup;
    double *tau_u = left_tau + k * kGroup, *tau_v = right_tau + k * kGroup;
    for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) u[i * kGroup + g] = rest[i * stride + g];
    }
    reflect_group(u, rows, b + 2 * k * kGroup, tau_u);
    std::fill_n(tau_v, kGroup, 0.0);
    if (columns == 0) return;

    rest += kGroup;
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) multiply_columns<4>(rest + j * kGroup, stride, rows, u, tau_u, w + j * kGroup);
    for (; j < columns; ++j) multiply_columns<1>(rest + j * kGroup, stride, rows, u, tau_u, w + j * kGroup);

    double* v = right + (k * n + k + 1) * kGroup;
#pragma omp simd
    for (int64_t l = 0; l < columns * kGroup; ++l) v[l] = rest[l] - w[l];
    reflect_group(v, columns, b + (2 * k + 1) * kGroup, tau_v);
    double wv[kGroup] = {};
    for (j = 0; j < columns; ++j) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) wv[g] += w[j * kGroup + g] * v[j * kGroup + g];
    }
    int64_t i = 1;
    for (; i + 4 <= rows; i += 4) update_rows<4>(rest + i * stride, stride, columns, u + i * kGroup, w, v, wv, tau_v);
    for (; i < rows; ++i) update_rows<1>(rest + i * stride, stride, columns, u + i * kGroup, w, v, wv, tau_v);
  }
}

}  // namespace d2net::cpu
