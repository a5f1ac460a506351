// Pairwise intersection over union of 1-D segments.
#pragma once

#include "operator.h"

namespace d2net {

// A segment with end <= start is empty. The IoU of two empty segments is 0, and so is that of segments whose lengths
// add up to infinity. NaN propagates.
template <typename T>
struct Iou {
  static constexpr int kSettings = 0;
  const T* a;  // (n, 2) rows (start, end)
  int64_t n;
  const T* b;  // (m, 2)
  int64_t m;
  T* iou;  // (n, m), row-major
};

D2NET_DECLARE(iou_1d, Iou)

}  // namespace d2net
