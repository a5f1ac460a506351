// What greedy and soft NMS share: the overlap of two segments, and where the segments lie that one can collide with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace d2net::cpu {

template <typename T>
struct Segment {
  T start, end;
  T length() const { return end - start; }
};

template <typename T>
inline Segment<T> segment_at(const T* segments, int64_t i) {
  return {segments[2 * i], segments[2 * i + 1]};
}

// The length of the intersection; negative where the segments are apart.
template <typename T>
inline T overlap(Segment<T> a, Segment<T> b) {
  return std::min(a.end, b.end) - std::max(a.start, b.start);
}

// intersection > 0, so that the union is too.
template <typename T>
inline T iou(T length_a, T length_b, T intersection) {
  return intersection / (length_a + length_b - intersection);
}

// Index of the first row that is not finite or whose score is NaN; n where there is none.
template <typename T>
int64_t first_bad(const T* segments, const T* scores, int64_t n) {
  // x - x is 0 for finite x, else NaN. No early exit, so that the loops vectorize.
  int bad = 0;
  for (int64_t i = 0; i < 2 * n; ++i) bad |= !(segments[i] - segments[i] == 0);
  for (int64_t i = 0; i < n; ++i) bad |= scores[i] != scores[i];
  if (!bad) return n;
  int64_t i = 0;
  while (std::isfinite(segments[2 * i]) && std::isfinite(segments[2 * i + 1]) && scores[i] == scores[i]) ++i;
  return i;
}

// Segments sorted into bands of similar length, and what a segment s must look at in a band to find all k with
// IoU(s, k) >= t. With l and m the lengths of s and k: the overlap is at least t max(l, m), hence
//   t l <= m <= l / t;
//   k starts at most (1 - t) m before s, since what sticks out leaves an overlap of m less that, and at most
//   (1 - t) l / t, since overlap / (overlap + what sticks out) >= t;
//   k starts at most l - t max(l, m) after s.
// Everything is widened by kSlack, far more than the rounding of an IoU in float, so that the IoU alone decides. Only
// differences of coordinates are compared, whose rounding is relative to themselves however large the coordinates are.
class Bands {
 public:
  // A band is an octave of lengths, or 2^k to the octave where t is so near 1 that few lengths of an octave can reach
  // it: the band is then about as wide as the lengths that a segment can collide with.
  explicit Bands(double t) : t_(t * (1 - kSlack)), bits_(std::clamp(int(std::floor(-std::log2(1 - t_))) - 1, 0, 4)) {}

  // Rises with length (> 0); infinity has a band of its own.
  int of(double length) const {
    uint64_t bits;
    std::memcpy(&bits, &length, sizeof bits);
    return int(bits >> (52 - bits_));
  }
  int shortest_for(double length) const { return t_ > 0 ? of(length * t_) : 0; }
  int longest_for(double length) const { return of(length / t_); }

  // How far before and after the start of a segment of length `length` those of `band` start that it can collide with.
  struct Reach {
    double before, after;
  };
  Reach reach(double length, int band) const {
    const double shortest = value(band), longest = std::isfinite(shortest) ? value(band + 1) : shortest;
    const double demanded = t_ > 0 ? t_ * std::max(length, shortest) : 0;
    return {(1 - t_) * std::min(length / t_, longest) * (1 + kSlack), (length - demanded) * (1 + kSlack)};
  }

 private:
  static constexpr double kSlack = 1e-5;

  double value(int band) const {
    const uint64_t bits = uint64_t(band) << (52 - bits_);
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  double t_;
  int bits_;
};

}  // namespace d2net::cpu
