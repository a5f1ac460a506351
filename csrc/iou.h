// Pairwise intersection over union of 1-D segments.
//
// a (n, 2) and b (m, 2) rows (start, end) -> iou (n, m), row-major. A segment with end <= start is empty, the IoU of
// two empty ones is 0, and so is that of segments whose lengths add up to infinity. NaN propagates.
#pragma once

#include <cstdint>

namespace d2net {

namespace cpu {

template <typename T>
void iou_1d(const T* a, int64_t n, const T* b, int64_t m, T* iou, int threads);

}  // namespace cpu

namespace cuda {

// The same on `device`, enqueued on `stream` (a cudaStream_t); every pointer is device memory. Throws
// std::runtime_error when the launch fails.
template <typename T>
void iou_1d(const T* a, int64_t n, const T* b, int64_t m, T* iou, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
