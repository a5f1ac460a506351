#include "iou.h"

#include <memory>

#include "cpu/common/parallel.h"
#include "cpu/common/simd.h"
#include "math/interval.h"

namespace d2net::cpu {
namespace {

// Segments as columns, of which vectors are read at once.
template <typename T>
struct Columns {
  T *start, *end, *length;
};

template <typename T>
[[gnu::always_inline]] inline void split_rows(const T* b, int64_t m, Columns<T> columns) {
  for (int64_t j = 0; j < m; ++j) {
    const Interval<T> segment = interval_of(b[2 * j], b[2 * j + 1]);
    columns.start[j] = segment.start;
    columns.end[j] = segment.end;
    columns.length[j] = segment.length;
  }
}
D2NET_SIMD void split(const float* b, int64_t m, Columns<float> columns) { split_rows(b, m, columns); }
D2NET_SIMD void split(const double* b, int64_t m, Columns<double> columns) { split_rows(b, m, columns); }

template <typename T>
[[gnu::always_inline]] inline void row(const Interval<T>& a, Columns<T> b, int64_t m, T* iou) {
  for (int64_t j = 0; j < m; ++j) iou[j] = iou_of(a, Interval<T>{b.start[j], b.end[j], b.length[j]});
}

D2NET_SIMD void rows(const float* a, int64_t begin, int64_t end, Columns<float> b, int64_t m, float* iou) {
  for (int64_t i = begin; i < end; ++i) row(interval_of(a[2 * i], a[2 * i + 1]), b, m, iou + i * m);
}
D2NET_SIMD void rows(const double* a, int64_t begin, int64_t end, Columns<double> b, int64_t m, double* iou) {
  for (int64_t i = begin; i < end; ++i) row(interval_of(a[2 * i], a[2 * i + 1]), b, m, iou + i * m);
}

}  // namespace

template <typename T>
void iou_1d(const Iou<T>& x, int threads) {
  const int64_t m = x.m;
  const std::unique_ptr<T[]> memory(new T[3 * m]);
  const Columns<T> columns{memory.get(), memory.get() + m, memory.get() + 2 * m};
  split(x.b, m, columns);
  const int64_t grain = 1 + 16384 / (m + 1);  // about 10 us of work
  parallel_for(x.n, grain, threads, [&](int64_t first, int64_t last) { rows(x.a, first, last, columns, m, x.iou); });
}

D2NET_INSTANTIATE_CPU(iou_1d, Iou)

}  // namespace d2net::cpu
