#include "bottom_up_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/common/rows.h"
#include "cpu/common/simd.h"

namespace d2net::cpu {
namespace {

struct Sums {
  double dot, squares;
};

template <typename T>
inline Sums sums(const T* x, const double* unit, int64_t d) {
  double dot = 0, squares = 0;
#pragma omp simd reduction(+ : dot, squares)
  for (int64_t j = 0; j < d; ++j) {
    const double v = x[j];
    dot += v * unit[j];
    squares += v * v;
  }
  return {dot, squares};
}

D2NET_SIMD Sums sums_of(const float* x, const double* unit, int64_t d) { return sums(x, unit, d); }
D2NET_SIMD Sums sums_of(const double* x, const double* unit, int64_t d) { return sums(x, unit, d); }

// Whether a sum of squares is precise: no square that matters was out of the range of a double.
inline bool in_range(double squares) { return squares > 1e-280 && squares < 1e280; }

// x (d) / |x| in double, whatever its magnitude; returns |x|, 0 for a zero vector.
template <typename T>
double normalize(const T* x, int64_t d, double* unit) {
  double largest = 0;
  for (int64_t j = 0; j < d; ++j) {
    const double magnitude = std::fabs(double(x[j]));
    if (magnitude > largest || magnitude != magnitude) largest = magnitude;  // NaN stays
  }
  if (largest == 0) {
    std::fill(unit, unit + d, 0.0);
    return 0;
  }
  double squares = 0;
  for (int64_t j = 0; j < d; ++j) {
    unit[j] = x[j] / largest;
    squares += unit[j] * unit[j];
  }
  const double norm = std::sqrt(squares);
  for (int64_t j = 0; j < d; ++j) unit[j] /= norm;
  return norm * largest;
}

}  // namespace

template <typename T>
void bottom_up_attention(const BottomUpAttention<T>& x, int threads) {
  const int64_t d = x.d;
  std::vector<double> unit(d);
  const bool has_x_ref = normalize(x.x_ref, d, unit.data()) != 0;
  const auto rows = [&](int64_t recording, int64_t from, int64_t to, int64_t row) {
    std::vector<double> scaled;
    const int64_t length = has_x_ref ? x.rows.length(x.lengths, recording, x.t) : 0;
    for (; from < to; ++from, ++row) {
      double cosine = 0, norm = 0;
      if (from < length) {
        const Sums s = sums_of(x.x + row * d, unit.data(), d);
        if (in_range(s.squares)) {
          norm = std::sqrt(s.squares);
          cosine = s.dot / norm;
        } else {
          scaled.resize(d);
          norm = normalize(x.x + row * d, d, scaled.data());
          cosine = sums_of(scaled.data(), unit.data(), d).dot;
        }
      }
      // Not std::clamp: NaN stays NaN.
      if (cosine > 1) cosine = 1;
      if (cosine < -1) cosine = -1;
      x.attention[row] = T(0.5 * (1 - cosine));
      if (x.norms != nullptr) x.norms[row] = T(norm);
    }
  };
  parallel_rows(Snippets(x.rows, x.lengths, x.b, x.t), 1 + 65536 / (d + 1), threads, rows);
}

D2NET_INSTANTIATE_CPU(bottom_up_attention, BottomUpAttention)

}  // namespace d2net::cpu
