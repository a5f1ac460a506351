// The backward of topk_pool, tcam_pool and the loss: from gradients with respect to their results to that with respect
// to the (b, t, c) activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/common/rows.h"
#include "math/topk.h"
#include "topk_pool.h"

namespace d2net::cpu {

namespace detail {

// out = grad_taken where x is among the k largest, for rows [first, first + rows) of one recording, c entries each;
// x and out begin at the first of them. grad_taken, kth and last are given for `group` rows, one after the other,
// with last counted from the row itself.
void pooled_gradient_rows(const float* x, int64_t first, int64_t rows, int64_t c, int64_t group,
                          const float* grad_taken, const int32_t* kth, const int32_t* last, float* out);
void pooled_gradient_rows(const double* x, int64_t first, int64_t rows, int64_t c, int64_t group,
                          const double* grad_taken, const int64_t* kth, const int32_t* last, double* out);

}  // namespace detail

// Writes g.grad_x within the lengths, a few rows of a recording at a time. Calls before(recording, row, rows), after
// which g.grad_attention of these rows is read; then(recording, row, rows), when they are written and still in the L1
// cache; and padding(row, rows) for the rows past the length of a padded recording, which are not written. row_cost:
// the cost of the three for a row, in elements of grad_x.
template <typename T, typename Before, typename Then, typename Padding>
void pooled_gradient(const TopkPool<T>& g, int64_t row_cost, int threads, Before before, Then then, Padding padding) {
  using Key = typename math::Ordered<T>::Key;
  T* const grad_x = g.grad_x;
  const int64_t t = g.t, c = g.c;
  const int64_t grain = 1 + 32768 / (c + row_cost + 1);  // about 10 us of work
  const int64_t group = 1 + 128 / (c + 1);               // rows of few classes are too short for vectors
  const int64_t block = group * (1 + 32 / group);
  const Snippets snippets(g.rows, g.lengths, g.b, t);
  parallel_for(snippets.count(), grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> grad_taken(group * c);
    std::vector<Key> kth(group * c);
    std::vector<int32_t> last(group * c);
    snippets.each(begin, end, [&](int64_t recording, int64_t from, int64_t to, int64_t row) {
      const int64_t length = g.rows.length(g.lengths, recording, t), k = math::topk_count(length, g.divisor);
      for (int64_t i = 0; i < group * c; ++i) {
        const int64_t column = recording * c + i % c;
        grad_taken[i] = g.grad_pooled != nullptr ? g.grad_pooled[column] / k : T(0);
        kth[i] = math::ordered_key(g.kth[column]);
        last[i] = std::max(g.last[column], -1) - int32_t(i / c);
      }
      const int64_t valid = std::clamp(length, from, to);
      const int64_t past = row + valid - from;
      for (int64_t first = from; first < valid; first += block, row += block) {
        const int64_t rows = std::min(block, valid - first);
        before(recording, row, rows);
        detail::pooled_gradient_rows(g.x + row * c, first, rows, c, group, grad_taken.data(), kth.data(), last.data(),
                                     grad_x + row * c);
        if (g.grad_attention != nullptr && c > 0) {
          for (int64_t i = row; i < row + rows; ++i) {
            const int64_t argmax = g.argmax[i];
            if (argmax >= 0 && argmax < c) grad_x[i * c + argmax] += g.grad_attention[i];
          }
        }
        then(recording, row, rows);
      }
      padding(past, to - valid);
    });
  });
}

}  // namespace d2net::cpu
