// The outer-inner contrast of a segment (Sec. 3.3).
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace d2net::math {

// S_i - S_o of snippets [start, end) of n, given the prefix sums of their activations: prefix[t] is the sum of the
// first t. S_o is over the max(1, floor(inflation * length)) snippets on either side.
D2NET_HD inline double contrast(const double* prefix, int64_t start, int64_t end, int64_t n, double inflation,
                                bool mean_of_sides) {
  const double length = double(end - start), wanted = inflation * length;
  const int64_t whole = int64_t(wanted < double(n) ? wanted : double(n)), reach = whole > 1 ? whole : 1;
  const int64_t n_before = start < reach ? start : reach, n_after = n - end < reach ? n - end : reach;
  const double before = prefix[start] - prefix[start - n_before], after = prefix[end + n_after] - prefix[end];
  double background;
  if (mean_of_sides) {
    background = before / double(n_before > 1 ? n_before : 1) + after / double(n_after > 1 ? n_after : 1);
    if (n_before > 0 && n_after > 0) background /= 2;
  } else {
    background = (before + after) / double(n_before + n_after > 1 ? n_before + n_after : 1);
  }
  return (prefix[end] - prefix[start]) / length - background;
}

}  // namespace d2net::math
