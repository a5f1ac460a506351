#include "iou.h"

#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace d2net::cpu {
namespace {

// NaN on either side wins, as in torch.maximum and torch.minimum.
template <typename T>
[[gnu::always_inline]] inline T larger(T x, T y) {
  return x > y || x != x ? x : y;
}
template <typename T>
[[gnu::always_inline]] inline T smaller(T x, T y) {
  return x < y || x != x ? x : y;
}

// Asks before it subtracts: infinity less infinity would be NaN.
template <typename T>
[[gnu::always_inline]] inline T length_of(T start, T end) {
  return end <= start ? T(0) : end - start;
}

template <typename T>
[[gnu::always_inline]] inline void row(T start, T end, const T* b, int64_t m, T* iou) {
  const T length = length_of(start, end);
  for (int64_t j = 0; j < m; ++j) {
    const T from = b[2 * j], to = b[2 * j + 1];
    const T both = length + length_of(from, to);
    const bool nothing = both == 0 || both == T(INFINITY);
    const T overlap = nothing ? T(0) : larger(smaller(end, to) - larger(start, from), T(0));
    iou[j] = overlap / (both == 0 ? T(1) : both - overlap);  // which is not 0: no overlap is longer than its segments
  }
}

D2NET_SIMD void rows(const float* a, int64_t begin, int64_t end, const float* b, int64_t m, float* iou) {
  for (int64_t i = begin; i < end; ++i) row(a[2 * i], a[2 * i + 1], b, m, iou + i * m);
}
D2NET_SIMD void rows(const double* a, int64_t begin, int64_t end, const double* b, int64_t m, double* iou) {
  for (int64_t i = begin; i < end; ++i) row(a[2 * i], a[2 * i + 1], b, m, iou + i * m);
}

}  // namespace

template <typename T>
void iou_1d(const T* a, int64_t n, const T* b, int64_t m, T* iou, int threads) {
  const int64_t grain = 1 + 16384 / (m + 1);  // about 10 us of work
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) { rows(a, begin, end, b, m, iou); });
}

template void iou_1d<float>(const float*, int64_t, const float*, int64_t, float*, int);
template void iou_1d<double>(const double*, int64_t, const double*, int64_t, double*, int);

}  // namespace d2net::cpu
