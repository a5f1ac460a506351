#include "nms.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

namespace d2net::cpu {
namespace {

// Up to here a plain scan over the kept segments beats the ordered structure.
constexpr std::size_t kScanLimit = 128;

template <typename T>
struct Segment {
  T start, end;
  T length() const { return std::max(end - start, T(0)); }
};

template <typename T>
T overlap(Segment<T> a, Segment<T> b) {
  return std::max(std::min(a.end, b.end) - std::max(a.start, b.start), T(0));
}

// Only called where the overlap is positive, so the union is too.
template <typename T>
T iou(Segment<T> a, Segment<T> b, T shared) {
  return shared / (a.length() + b.length() - shared);
}

template <typename T>
bool collide(Segment<T> a, Segment<T> b, T threshold) {
  const T shared = overlap(a, b);
  return shared > 0 && iou(a, b, shared) >= threshold;
}

// The kept segments, by octave of their length and then by start. IoU >= t bounds the ratio of two colliding lengths
// by 1/t and demands an overlap of t * the longer one, so a candidate looks at few octaves and a short run in each;
// kept segments do not collide with each other, so such a run stays short however many segments there are.
template <typename T>
class Kept {
 public:
  explicit Kept(T threshold) : threshold_(threshold) {}

  bool collides(Segment<T> s) const {
    const double length = s.length(), t = threshold_;
    const int first = std::ilogb(length * t * (1 - kSlack)), last = std::ilogb(length / t * (1 + kSlack));
    for (auto octave = octaves_.lower_bound(first); octave != octaves_.end() && octave->first <= last; ++octave) {
      const double shortest = std::ldexp(1.0, octave->first), longest = 2 * shortest;
      const double demanded = t * std::max(length, shortest);
      // Bounds are widened by more than the rounding of the IoU in T, which alone decides.
      const double slack = kSlack * (length + longest) + 1e-15 * (std::abs(double(s.start)) + std::abs(double(s.end)));
      const double low = s.start + demanded - longest - slack, high = s.end - demanded + slack;
      for (auto k = octave->second.lower_bound(low); k != octave->second.end() && k->first <= high; ++k) {
        if (collide(s, Segment<T>{T(k->first), k->second}, threshold_)) return true;
      }
    }
    return false;
  }

  void insert(Segment<T> s) { octaves_[std::ilogb(double(s.length()))].emplace(double(s.start), s.end); }

 private:
  static constexpr double kSlack = 1e-5;
  T threshold_;
  std::map<int, std::multimap<double, T>> octaves_;
};

// order[0..n) by falling score, ties by index.
template <typename T>
std::vector<int64_t> falling(const T* scores, int64_t n) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  return order;
}

// Greedy NMS over candidates in the given order; calls take(index) for each kept one.
template <typename T, typename Take>
void greedy(const T* segments, const int64_t* order, std::size_t n, T threshold, Take take) {
  const auto at = [&](int64_t i) { return Segment<T>{segments[2 * i], segments[2 * i + 1]}; };
  // A length that is 0, or overflows T, collides with nothing and need not be remembered.
  const auto solid = [](Segment<T> s) { return s.length() > 0 && std::isfinite(s.length()); };
  if (n <= kScanLimit) {
    std::vector<Segment<T>> kept;
    for (std::size_t r = 0; r < n; ++r) {
      const Segment<T> s = at(order[r]);
      if (std::any_of(kept.begin(), kept.end(), [&](Segment<T> k) { return collide(s, k, threshold); })) continue;
      if (solid(s)) kept.push_back(s);
      take(order[r]);
    }
    return;
  }
  Kept<T> kept(threshold);
  for (std::size_t r = 0; r < n; ++r) {
    const Segment<T> s = at(order[r]);
    if (solid(s)) {
      if (kept.collides(s)) continue;
      kept.insert(s);
    }
    take(order[r]);
  }
}

}  // namespace

template <typename T>
int64_t nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, int64_t* keep, int) {
  const std::vector<int64_t> order = falling(scores, n);
  int64_t count = 0;
  greedy(segments, order.data(), order.size(), T(iou_threshold), [&](int64_t i) { keep[count++] = i; });
  return count;
}

template <typename T>
int64_t batched_nms_1d(const T* segments, const T* scores, const int64_t* groups, int64_t n, double iou_threshold,
                       int64_t* keep, int) {
  const std::vector<int64_t> order = falling(scores, n);
  std::vector<int64_t> by_group = order;
  std::stable_sort(by_group.begin(), by_group.end(), [&](int64_t a, int64_t b) { return groups[a] < groups[b]; });
  std::vector<char> kept(n, 0);
  for (int64_t first = 0, last = 0; first < n; first = last) {
    while (last < n && groups[by_group[last]] == groups[by_group[first]]) ++last;
    greedy(segments, by_group.data() + first, std::size_t(last - first), T(iou_threshold),
           [&](int64_t i) { kept[i] = 1; });
  }
  int64_t* end = std::copy_if(order.begin(), order.end(), keep, [&](int64_t i) { return kept[i] != 0; });
  return end - keep;
}

template <typename T>
int64_t soft_nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, double sigma, double min_score,
                    bool gaussian, int64_t* keep, T* new_scores, int) {
  const auto at = [&](int64_t i) { return Segment<T>{segments[2 * i], segments[2 * i + 1]}; };
  const T threshold = T(iou_threshold), floor = T(min_score);
  std::vector<T> score(scores, scores + n);
  std::vector<char> alive(n);
  std::vector<int64_t> by_start;
  double longest = 0;
  // Highest score on top, ties by index. Scores only fall, so an entry is an upper bound: a stale one goes back.
  using Entry = std::pair<T, int64_t>;
  const auto later = [](const Entry& a, const Entry& b) {
    return a.first < b.first || (a.first == b.first && a.second > b.second);
  };
  std::vector<Entry> entries;
  for (int64_t i = 0; i < n; ++i) {
    alive[i] = score[i] >= floor;
    if (!alive[i]) continue;
    entries.emplace_back(score[i], i);
    by_start.push_back(i);
    longest = std::max(longest, double(at(i).length()));
  }
  std::priority_queue<Entry, std::vector<Entry>, decltype(later)> queue(later, std::move(entries));
  std::sort(by_start.begin(), by_start.end(), [&](int64_t a, int64_t b) { return segments[2 * a] < segments[2 * b]; });

  int64_t count = 0;
  while (!queue.empty()) {
    const Entry top = queue.top();
    queue.pop();
    const int64_t i = top.second;
    if (!alive[i]) continue;
    if (top.first != score[i]) {
      queue.emplace(score[i], i);
      continue;
    }
    alive[i] = 0;
    keep[count] = i;
    new_scores[count++] = score[i];
    const Segment<T> s = at(i);
    const double low = double(s.start) - longest * (1 + 1e-5);
    auto j = std::lower_bound(by_start.begin(), by_start.end(), low,
                              [&](int64_t a, double value) { return double(segments[2 * a]) < value; });
    for (; j != by_start.end() && segments[2 * *j] < s.end; ++j) {
      if (!alive[*j]) continue;
      const T shared = overlap(s, at(*j));
      if (!(shared > 0)) continue;
      const T v = iou(s, at(*j), shared);
      if (gaussian) {
        score[*j] *= std::exp(-(v * v) / T(sigma));
      } else if (v >= threshold) {
        score[*j] *= 1 - v;
      }
      alive[*j] = score[*j] >= floor;
    }
  }
  return count;
}

#define D2NET_INSTANTIATE(T)                                                                              \
  template int64_t nms_1d<T>(const T*, const T*, int64_t, double, int64_t*, int);                         \
  template int64_t batched_nms_1d<T>(const T*, const T*, const int64_t*, int64_t, double, int64_t*, int); \
  template int64_t soft_nms_1d<T>(const T*, const T*, int64_t, double, double, double, bool, int64_t*, T*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu
