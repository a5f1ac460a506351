// Work on the rows of a batch, split evenly over threads however long its recordings are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/common/parallel.h"
#include "math/rows.h"

namespace d2net::cpu {

// The snippets of all recordings, one after the other: up to t or, of a packed batch, up to each length.
class Snippets {
 public:
  Snippets(const Rows& rows, const int64_t* lengths, int64_t b, int64_t t) : rows_(rows), t_(t), ends_(b + 1) {
    for (int64_t i = 0; i < b; ++i) ends_[i + 1] = ends_[i] + rows.written(lengths, i, t);
  }

  int64_t count() const { return ends_.back(); }

  // Calls body(recording, from, to, row) for the snippets [from, to) of each recording that are among those from
  // `begin` to `end` of all; `row` is the row of the first.
  template <typename Body>
  void each(int64_t begin, int64_t end, Body&& body) const {
    int64_t recording = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin() - 1;
    for (; begin < end; ++recording) {
      const int64_t from = begin - ends_[recording], to = std::min(ends_[recording + 1], end) - ends_[recording];
      if (from < to) body(recording, from, to, rows_.first(recording, t_) + from);
      begin += to - from;
    }
  }

 private:
  const Rows rows_;
  const int64_t t_;
  std::vector<int64_t> ends_;  // of recording i: where it begins, then where it ends
};

// Calls body(recording, from, to, row) for ranges that cover all snippets. grain: of them, see parallel_for.
template <typename Body>
void parallel_rows(const Snippets& snippets, int64_t grain, int threads, Body&& body) {
  parallel_for(snippets.count(), grain, threads, [&](int64_t begin, int64_t end) { snippets.each(begin, end, body); });
}

}  // namespace d2net::cpu
