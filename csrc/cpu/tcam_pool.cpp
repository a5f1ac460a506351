// The maximum of every row of classes; the pooling over time is topk_pool's.
#include <algorithm>
#include <limits>

#include "cpu/common/rows.h"
#include "cpu/common/simd.h"
#include "math/topk.h"
#include "topk_pool.h"

namespace d2net::cpu {
namespace {

using math::Ordered;

// Rows whose maxima are computed at once, in the lanes of vectors: there may be few classes, but there are many rows.
constexpr int kRows = 16;

// Maximum of each of up to kRows rows of classes, and the lowest class of that value.
template <typename T>
[[gnu::always_inline]] inline void maxima(const T* tcam, int rows, int64_t c, T* attention, int32_t* argmax) {
  using Key = typename Ordered<T>::Key;
  Key best[kRows], found[kRows];
  for (int l = 0; l < kRows; ++l) {
    best[l] = std::numeric_limits<Key>::min();
    found[l] = -1;
  }
  for (int64_t j = 0; j < c; ++j) {
#pragma omp simd
    for (int l = 0; l < rows; ++l) {
      const Key key = math::ordered_key(tcam[l * c + j]);
      found[l] = key > best[l] ? Key(j) : found[l];
      best[l] = key > best[l] ? key : best[l];
    }
  }
  for (int l = 0; l < rows; ++l) {
    attention[l] = c > 0 ? tcam[l * c + found[l]] : T(0);
    argmax[l] = int32_t(found[l]);
  }
}
template <typename T>
[[gnu::always_inline]] inline void all_maxima(const T* tcam, int64_t rows, int64_t c, T* attention, int32_t* argmax) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) maxima(tcam + row * c, kRows, c, attention + row, argmax + row);
  maxima(tcam + row * c, int(rows - row), c, attention + row, argmax + row);
}
D2NET_SIMD void class_max(const float* tcam, int64_t rows, int64_t c, float* attention, int32_t* argmax) {
  all_maxima(tcam, rows, c, attention, argmax);
}
D2NET_SIMD void class_max(const double* tcam, int64_t rows, int64_t c, double* attention, int32_t* argmax) {
  all_maxima(tcam, rows, c, attention, argmax);
}

}  // namespace

template <typename T>
void tcam_pool(const TopkPool<T>& x, int threads) {
  const int64_t c = x.c, grain = 1 + 16384 / (c + 1);  // about 10 us of work
  parallel_rows(Snippets(x.rows, x.lengths, x.b, x.t), grain, threads,
                [&](int64_t recording, int64_t from, int64_t to, int64_t row) {
                  const int64_t valid = std::clamp(x.rows.length(x.lengths, recording, x.t), from, to) - from;
                  class_max(x.x + row * c, valid, c, x.attention + row, x.argmax + row);
                  std::fill_n(x.attention + row + valid, to - from - valid, T(0));
                  std::fill_n(x.argmax + row + valid, to - from - valid, -1);
                });
  topk_pool(x, threads);
}

D2NET_INSTANTIATE_CPU(tcam_pool, TopkPool)

}  // namespace d2net::cpu
