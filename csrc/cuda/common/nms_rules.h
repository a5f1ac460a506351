// What both ways of greedy NMS on the device decide by: which segments collide, and the order of the scores.
#pragma once

#include "cuda/common/segment.h"

namespace d2net::cuda {

// Far more than the rounding of an IoU in float. Tests that come before that of the IoU are looser by it, so that the
// IoU alone decides.
constexpr double kSlack = 1e-5;

template <typename T>
__device__ __forceinline__ bool can_collide(Segment<T> s, T threshold) {
  return s.end > s.start && (threshold == 0 || is_finite(s.length()));  // x / infinity reaches 0 only
}

template <typename T>
__device__ __forceinline__ bool collide(Segment<T> a, Segment<T> b, T threshold) {
  const T intersection = overlap(a, b);
  // !(iou < threshold) and not iou >= threshold: inf / inf, which only a threshold of 0 lets through, counts as 0.
  return intersection > 0 && !(intersection / (a.length() + b.length() - intersection) < threshold);
}

// Unsigned integers in the order of the floats. -0.0 and 0.0 have the same key; the order of NaN is not defined.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t ordered_bits(double x) {
  const uint64_t bits = uint64_t(__double_as_longlong(x + 0.0));
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

}  // namespace d2net::cuda
