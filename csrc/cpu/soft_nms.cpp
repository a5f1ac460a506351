#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <queue>
#include <utility>
#include <vector>

#include "cpu/common/order.h"
#include "cpu/common/segment.h"
#include "cpu/common/simd.h"
#include "nms.h"

namespace d2net::cpu {
namespace {

// exp(x) for x <= 0 to the last bit or two, and 0 where the result is below the normal numbers: plain arithmetic, which
// vectorizes. x = k log 2 + r with |r| <= log(2) / 2, exp(r) by its Taylor series, and k goes into the exponent.
inline float exp_of_negative(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the lowest bits
  const float shifted = x * 1.44269504f + kShift, k = shifted - kShift;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}
inline double exp_of_negative(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634 + kShift, k = shifted - kShift;
  const double r = (x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800;
  for (const double c : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                         1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0}) {
    p = p * r + c;
  }
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 52) + 0x3ff0000000000000;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -708.0 ? 0.0 : p * power;
}

template <typename T>
struct Decay {
  T threshold, sigma, min_score;
  bool gaussian;
};

// Decays the scores of n segments for one that was taken; returns how many fell below min_score.
template <bool kGaussian, typename T>
inline int decay_rows(Segment<T> s, const T* start, const T* end, T* score, int64_t n, Decay<T> d) {
  const T length = s.length();
  int fallen = 0;
#pragma omp simd reduction(+ : fallen)
  for (int64_t i = 0; i < n; ++i) {
    const T intersection = overlap(s, {start[i], end[i]});
    const T v = iou(length, end[i] - start[i], intersection);
    T weight;
    if constexpr (kGaussian) {
      weight = exp_of_negative(-(v * v) / d.sigma);
    } else {
      weight = v >= d.threshold ? 1 - v : T(1);
    }
    const T old = score[i], now = intersection > 0 ? old * weight : old;
    score[i] = now;
    fallen += (old >= d.min_score) & !(now >= d.min_score);
  }
  return fallen;
}

D2NET_SIMD int decay(Segment<float> s, const float* start, const float* end, float* score, int64_t n, Decay<float> d) {
  return d.gaussian ? decay_rows<true>(s, start, end, score, n, d) : decay_rows<false>(s, start, end, score, n, d);
}
D2NET_SIMD int decay(Segment<double> s, const double* start, const double* end, double* score, int64_t n,
                     Decay<double> d) {
  return d.gaussian ? decay_rows<true>(s, start, end, score, n, d) : decay_rows<false>(s, start, end, score, n, d);
}

// A band of fewer rows is decayed as a whole, without a search for those within reach.
constexpr int64_t kWholeBand = 64;

// The first element of x[0 .. n) for which `holds` is false, by a branchless binary search.
template <typename T, typename Holds>
inline int64_t partition_point(const T* x, int64_t n, Holds holds) {
  const T* first = x;
  for (; n > 1; n -= n / 2) first += holds(first[n / 2 - 1]) ? n / 2 : 0;
  return first - x + (n == 1 && holds(*first));
}

// The segments of one band of lengths (segment.h), by start. Those that were taken, or whose score fell below
// min_score, are removed when they are half of the band.
template <typename T>
struct Band {
  std::vector<T> start, end, score;
  std::vector<int64_t> index;
  int64_t removed = 0;
};

}  // namespace

// A taken segment decays, in each band, the range of segments whose starts are within reach: a binary search and a
// vectorized loop over those that overlap it, or miss it by less than their own length. A queue holds an upper bound of
// every score, as scores only fall; a stale entry is pushed again with its present score. With P pairs of a taken and a
// decayed segment, n segments cost O(n bands log n + P), and log n for every stale entry. P is n^2 / 2 where everything
// overlaps; with `linear` only lengths and starts that can reach the threshold count.
template <typename T>
int64_t soft_nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, double sigma, double min_score,
                    bool gaussian, int64_t* keep, T* new_scores, int) {
  if (const int64_t bad = first_bad(segments, scores, n); bad < n) return -1 - bad;
  const Decay<T> rule{T(iou_threshold), T(sigma), T(min_score), gaussian};
  const Bands lengths(gaussian ? 0 : double(rule.threshold));

  // Where each segment is; row -1: it cannot overlap any other and so keeps its score.
  struct Place {
    int32_t band;
    int64_t row;
  };
  std::vector<Place> place(n, Place{0, -1});
  std::vector<Band<T>> bands;
  int first_band = 0;
  using Entry = std::pair<T, int64_t>;
  std::vector<Entry> entries;
  {
    Order order;
    const HugeVector<uint32_t>& by_start = order.by(n, [&](int64_t i) { return ordered_key(segments[2 * i]); });
    const auto length_band = [&](int64_t i) {
      const T length = segment_at(segments, i).length();
      // The IoU with an endless segment is 0.
      return scores[i] >= rule.min_score && length > 0 && std::isfinite(length) ? lengths.of(double(length)) : -1;
    };
    int last_band = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (scores[i] >= rule.min_score) entries.emplace_back(scores[i], i);
      const int band = length_band(i);
      if (band < 0) continue;
      first_band = last_band < 0 ? band : std::min(first_band, band);
      last_band = std::max(last_band, band);
    }
    if (last_band >= 0) bands.resize(last_band - first_band + 1);
    for (const uint32_t i : by_start) {
      const int number = length_band(i) - first_band;
      if (number < 0) continue;
      Band<T>& band = bands[number];
      place[i] = {number, int64_t(band.index.size())};
      band.start.push_back(segments[2 * i]);
      band.end.push_back(segments[2 * i + 1]);
      band.score.push_back(scores[i]);
      band.index.push_back(i);
    }
  }
  // Highest score on top, ties by index.
  const auto later = [](const Entry& a, const Entry& b) {
    return a.first < b.first || (a.first == b.first && a.second > b.second);
  };
  std::priority_queue<Entry, std::vector<Entry>, decltype(later)> queue(later, std::move(entries));

  const auto compact = [&](Band<T>& band) {
    int64_t left = 0;
    for (int64_t row = 0; row < int64_t(band.index.size()); ++row) {
      if (!(band.score[row] >= rule.min_score)) {
        place[band.index[row]].band = -1;
        continue;
      }
      band.start[left] = band.start[row];
      band.end[left] = band.end[row];
      band.score[left] = band.score[row];
      band.index[left] = band.index[row];
      place[band.index[row]].row = left++;
    }
    band.start.resize(left);
    band.end.resize(left);
    band.score.resize(left);
    band.index.resize(left);
    band.removed = 0;
  };

  int64_t count = 0;
  while (!queue.empty()) {
    const auto [score, i] = queue.top();
    queue.pop();
    const Place at = place[i];
    if (at.band < 0) continue;
    if (at.row >= 0) {
      T& current = bands[at.band].score[at.row];
      if (!(current >= rule.min_score)) continue;
      if (current != score) {
        queue.emplace(current, i);
        continue;
      }
      current = -1;  // below any min_score
      ++bands[at.band].removed;
    }
    keep[count] = i;
    new_scores[count++] = score;
    if (at.row < 0) continue;

    const Segment<T> s = segment_at(segments, i);
    const double length = s.length();
    const int first = std::max(lengths.shortest_for(length) - first_band, 0);
    const int last = std::min(lengths.longest_for(length) - first_band, int(bands.size()) - 1);
    for (int number = first; number <= last; ++number) {
      Band<T>& band = bands[number];
      const Bands::Reach reach = lengths.reach(length, number + first_band);
      const int64_t size = int64_t(band.index.size());
      int64_t low = 0, high = size;
      if (size > kWholeBand) {
        const T* start = band.start.data();
        low = partition_point(start, size, [&](T x) { return double(s.start - x) > reach.before; });
        high = partition_point(start, size, [&](T x) { return double(x - s.start) <= reach.after; });
      }
      if (low >= high) continue;
      band.removed +=
          decay(s, band.start.data() + low, band.end.data() + low, band.score.data() + low, high - low, rule);
      if (2 * band.removed > size) compact(band);
    }
  }
  return count;
}

#define D2NET_INSTANTIATE(T) \
  template int64_t soft_nms_1d<T>(const T*, const T*, int64_t, double, double, double, bool, int64_t*, T*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu
