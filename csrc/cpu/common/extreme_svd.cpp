#include "cpu/common/extreme_svd.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "cpu/common/bidiagonal.h"
#include "cpu/common/bidiagonal_svd.h"
#include "cpu/common/householder.h"
#include "cpu/common/simd.h"

namespace d2net::cpu {
namespace {

constexpr int kLanes = 8;  // arrays begin at multiples of it: vectors that cross a cache line are slow

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Largest magnitude of the elements of x (n, group), and whether none is NaN or infinite.
template <int group>
[[gnu::always_inline]] inline void magnitudes(const double* x, int64_t n, double* largest, bool* finite) {
  constexpr int kWide = group == 1 ? kLanes : group;
  double most[kWide] = {}, nan_or_0[kWide] = {};
  for (int64_t i = 0; i < n * group; i += kWide) {
#pragma omp simd
    for (int l = 0; l < kWide; ++l) {
      most[l] = std::max(most[l], std::fabs(x[i + l]));
      nan_or_0[l] += x[i + l] - x[i + l];
    }
  }
  for (int g = 0; g < group; ++g) {
    largest[g] = most[g];
    for (int l = g + group; l < kWide; l += group) {
      largest[g] = std::max(largest[g], most[l]);
      nan_or_0[g] += nan_or_0[l];
    }
    finite[g] = nan_or_0[g] == 0;
  }
}
D2NET_SIMD void magnitudes_of_one(const double* x, int64_t n, double* largest, bool* finite) {
  magnitudes<1>(x, n, largest, finite);
}
D2NET_SIMD void magnitudes_of_group(const double* x, int64_t n, double* largest, bool* finite) {
  magnitudes<kGroup>(x, n, largest, finite);
}

}  // namespace

template <int group>
ExtremeSvd<group>::ExtremeSvd(int64_t m, int64_t n, double precision)
    : m_(m), n_(n), stride_(group == 1 ? padded(n, kPanel) : n), precision_(precision) {
  struct {
    double** pointer;
    int64_t size;
  } const parts[] = {{&a_, m * stride_},
                     {&left_reflectors_, n * m},
                     {&right_reflectors_, n * stride_},
                     {&left_tau_, n},
                     {&right_tau_, n},
                     {&b_, 2 * n},
                     {&squares_, 4 * n},
                     {&work_, 28 * n},
                     {&w_, stride_},
                     {&x_, m},
                     {&y_, 4 * m},
                     {&left, 2 * m},
                     {&right, 2 * n}};
  int64_t size = kLanes;
  for (const auto& part : parts) size += padded(part.size * group, kLanes);
  memory_.resize(size);
  void* next = memory_.data();
  size_t space = size * sizeof(double);
  double* aligned = static_cast<double*>(std::align(kLanes * sizeof(double), sizeof(double), next, space));
  for (const auto& part : parts) *part.pointer = std::exchange(aligned, aligned + padded(part.size * group, kLanes));
}

template <int group>
void ExtremeSvd<group>::run(const double (&rank_tol)[group]) {
  // Divided by the power of two that brings the largest magnitude into [0.5, 1), so that squares neither overflow nor
  // vanish.
  double largest[group], half[group], rest[group], tolerance[group], sigma[2 * group];
  int exponent[group];
  const int64_t elements = m_ * stride_;
  group == 1 ? magnitudes_of_one(a_, elements, largest, finite) : magnitudes_of_group(a_, elements, largest, finite);
  for (int g = 0; g < group; ++g) {
    exponent[g] = 0;
    if (finite[g]) std::frexp(largest[g], &exponent[g]);
    tolerance[g] = std::ldexp(rank_tol[g], -exponent[g]);
    // In two steps: the power itself may overflow.
    half[g] = std::ldexp(1, -exponent[g] / 2);
    rest[g] = std::ldexp(1, -exponent[g] - -exponent[g] / 2);
  }
  for (int64_t i = 0; i < elements; ++i) {
    for (int g = 0; g < group; ++g) a_[i * group + g] = finite[g] ? a_[i * group + g] * half[g] * rest[g] : 0;
  }

  const auto expand = [&](double* entries) {  // b for both sides
    for (int64_t i = 0; i < 2 * n_; ++i) {
      for (int l = 0; l < 2 * group; ++l) entries[i * 2 * group + l] = b_[i * group + l % group];
    }
  };
  std::fill_n(b_ + (2 * n_ - 1) * group, group, 0.0);
  double* entries = work_ + 24 * n_ * group;
  const int64_t left_side = m_ * group, right_side = n_ * group;
  if constexpr (group == 1) {
    bidiagonalize(a_, m_, n_, stride_, b_, left_reflectors_, left_tau_, right_reflectors_, right_tau_, w_, x_, y_);
    extreme_values_of_one(b_, n_, tolerance, precision_, squares_, sigma, proper);
    if (!proper[0]) return;
    expand(entries);
    singular_vectors_of_one(entries, n_, sigma, work_, left, left_side, right, right_side);
  } else {
    bidiagonalize_group(a_, m_, n_, b_, left_reflectors_, left_tau_, right_reflectors_, right_tau_, w_);
    extreme_values_of_group(b_, n_, tolerance, precision_, squares_, sigma, proper);
    expand(entries);
    singular_vectors_of_group(entries, n_, sigma, work_, left, left_side, right, right_side);
  }
  for (int s = 0; s < 2; ++s) std::fill(left + s * left_side + right_side, left + (s + 1) * left_side, 0.0);
  const auto apply = group == 1 ? apply_reflectors : apply_reflectors_group;
  apply(left_reflectors_, left_tau_, n_, m_, 0, m_, left);
  apply(right_reflectors_, right_tau_, n_ - 1, stride_, 1, n_, right);
  for (int g = 0; g < group; ++g) {
    proper[g] &= finite[g];
    log_condition[g] = std::max(0.0, std::log(sigma[g] / sigma[group + g]));  // equal ones may differ in their last bit
    for (int s = 0; s < 2; ++s) inverse[s][g] = std::ldexp(1 / sigma[s * group + g], -exponent[g]);
  }
}

template class ExtremeSvd<1>;
template class ExtremeSvd<kGroup>;

}  // namespace d2net::cpu
