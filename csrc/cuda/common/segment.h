// What greedy and soft NMS share on the device; the same arithmetic as csrc/cpu/common/segment.h.
#pragma once

#include "cuda/common/device.h"

namespace d2net::cuda {

template <typename T>
struct alignas(2 * sizeof(T)) Segment {
  T start, end;
  __device__ __forceinline__ T length() const { return end - start; }
};

// The caller's tensor is only aligned to T.
template <typename T>
__device__ __forceinline__ Segment<T> segment_at(const T* segments, int64_t i) {
  return {segments[2 * i], segments[2 * i + 1]};
}

// The length of the intersection; negative where the segments are apart.
template <typename T>
__device__ __forceinline__ T overlap(Segment<T> a, Segment<T> b) {
  return min(a.end, b.end) - max(a.start, b.start);
}

template <typename T>
__device__ __forceinline__ bool is_finite(T x) {
  return x - x == 0;
}

// Whether NMS refuses the row.
template <typename T>
__device__ __forceinline__ bool is_bad(Segment<T> s, T score) {
  return !is_finite(s.start) || !is_finite(s.end) || score != score;
}

}  // namespace d2net::cuda
