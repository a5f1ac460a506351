// Pairwise intersection over union of 1-D segments.
#pragma once

#include <cstdint>

namespace d2net::cpu {

// a (n, 2) and b (m, 2) rows (start, end) -> iou (n, m), row-major. A segment with end <= start is empty, the IoU of
// two empty ones is 0, and NaN propagates.
template <typename T>
void iou_1d(const T* a, int64_t n, const T* b, int64_t m, T* iou, int threads);

}  // namespace d2net::cpu
