#include "cpu/common/pooled_gradient.h"

#include "cpu/common/simd.h"

namespace d2net::cpu::detail {
namespace {

template <typename T, typename Key>
[[gnu::always_inline]] inline void gradient_rows(const T* x, int64_t first, int64_t rows, int64_t c, int64_t group,
                                                 const T* grad_taken, const Key* kth, const int32_t* last, T* out) {
  for (int64_t row = 0; row < rows; row += group) {
    const int64_t begin = row * c, n = (rows - row < group ? rows - row : group) * c;
    const int32_t at = int32_t(first + row);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      out[begin + i] = math::among_topk(x[begin + i], at, kth[i], last[i]) ? grad_taken[i] : 0;
  }
}

}  // namespace

D2NET_SIMD void pooled_gradient_rows(const float* x, int64_t first, int64_t rows, int64_t c, int64_t group,
                                     const float* grad_taken, const int32_t* kth, const int32_t* last, float* out) {
  gradient_rows(x, first, rows, c, group, grad_taken, kth, last, out);
}
D2NET_SIMD void pooled_gradient_rows(const double* x, int64_t first, int64_t rows, int64_t c, int64_t group,
                                     const double* grad_taken, const int64_t* kth, const int32_t* last, double* out) {
  gradient_rows(x, first, rows, c, group, grad_taken, kth, last, out);
}

}  // namespace d2net::cpu::detail
