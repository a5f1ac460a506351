#include "nms.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "cpu/common/order.h"
#include "cpu/common/pages.h"
#include "cpu/common/parallel.h"
#include "cpu/common/position_set.h"
#include "cpu/common/segment.h"
#include "cpu/common/simd.h"

namespace d2net::cpu {
namespace {

template <typename T>
inline bool collide(Segment<T> a, T length_a, Segment<T> b, T length_b, T threshold) {
  const T intersection = overlap(a, b);
  // !(iou < threshold) and not iou >= threshold: inf / inf, which only a threshold of 0 lets through, counts as 0.
  return intersection > 0 && !(iou(length_a, length_b, intersection) < threshold);
}

// Up to so many kept segments, a vectorized scan of all is faster than the index.
constexpr int kScanLimit = 128;

template <typename T>
struct KeptList {
  T start[kScanLimit], end[kScanLimit], length[kScanLimit];
  int size = 0;

  void add(Segment<T> s) {
    start[size] = s.start;
    end[size] = s.end;
    length[size++] = s.length();
  }
};

template <typename T>
inline bool scan_blocks(const KeptList<T>& kept, Segment<T> s, T threshold) {
  const T length = s.length();
  constexpr int kBlock = 16;
  int first = 0;
  for (; first + kBlock <= kept.size; first += kBlock) {
    int any = 0;
    for (int k = first; k < first + kBlock; ++k) {
      any |= collide({kept.start[k], kept.end[k]}, kept.length[k], s, length, threshold);
    }
    if (any) return true;
  }
  int any = 0;
  for (int k = first; k < kept.size; ++k) {
    any |= collide({kept.start[k], kept.end[k]}, kept.length[k], s, length, threshold);
  }
  return any;
}

D2NET_SIMD bool scan(const KeptList<float>& kept, Segment<float> s, float t) { return scan_blocks(kept, s, t); }
D2NET_SIMD bool scan(const KeptList<double>& kept, Segment<double> s, double t) { return scan_blocks(kept, s, t); }

// Greedy NMS of one group; its memory is used again for the next group.
//
// The first kept segments are scanned. When they become many, every candidate gets its position in the order of
// starts, and each band of lengths (segment.h) a set of the positions of its kept segments. A candidate looks, in the
// few bands that it can collide with, at its kept neighbours left and right of its own position until their starts
// are out of reach, and stops at the first collision.
//
// Cost. Two sorts, linear. Then for each candidate (log 1/t + 1) bands, with a handful of memory accesses to find a
// neighbour, times the neighbours within reach. These are few because kept segments do not collide: let u be the
// shortest length of a band and d = u (1 - t) / (1 + 2 t). Two segments of the band, of lengths m and up to m + d and
// with starts up to d apart, overlap by m - d or more and span m + 2 d or less, so that
// IoU >= (m - d) / (m + 2 d) >= (u - d) / (u + 2 d) = t: they collide. Thus every d x d square of the (start, length)
// plane holds at most one kept segment. Bands and reaches are multiples of u (1 - t), that is of d (1 + 2 t), as long
// as Bands can make them so:
//   t = 0.1 … 0.98  at most a constant number of neighbours a band;
//   t near 1        the bands stay a 16th of an octave wide: O(1 / (1 - t)) neighbours;
//   t near 0        O(1 / t), all in the band around t times the candidate's length, whose segments may lie within the
//                   candidate without colliding. In longer bands whatever lies within it collides and ends the search.
//                   At t = 0 exactly kept segments do not overlap at all, and each band holds one or two neighbours.
// So n segments cost O(n log n) for a given t in (0, 1), whatever the data. It is quadratic only for adversarial data
// with t within about 1 / n of 0 or 1, or with lengths whose sum overflows T (such segments never collide).
template <typename T>
class Greedy {
 public:
  explicit Greedy(T threshold) : threshold_(threshold), bands_(threshold) {}

  // Takes the segments at(0) … at(n - 1), by falling score, and calls take(r) for every kept one.
  template <typename At, typename Take>
  void run(int64_t n, At at, Take take) {
    listed_.size = 0;
    int64_t r = 0;
    for (; r < n && listed_.size < kScanLimit; ++r) {
      const Segment<T> s = at(r);
      if (can_collide(s)) {
        if (scan(listed_, s, threshold_)) continue;
        listed_.add(s);
      }
      take(r);
    }
    if (r < n) run_indexed(r, n, at, take);
  }

 private:
  bool can_collide(Segment<T> s) const {
    return s.end > s.start && (threshold_ == 0 || std::isfinite(s.length()));  // x / infinity reaches 0 only
  }

  template <typename At, typename Take>
  void run_indexed(int64_t done, int64_t n, At at, Take take) {
    // Items: what the list holds, then the candidates that are left.
    const int64_t size = kScanLimit + (n - done);
    const auto item = [&](int64_t i) {
      return i < kScanLimit ? Segment<T>{listed_.start[i], listed_.end[i]} : at(done + i - kScanLimit);
    };
    const HugeVector<uint32_t>& by_start = order_.by(size, [&](int64_t i) { return ordered_key(item(i).start); });
    rows_.resize(size);
    position_.resize(size);
    first_band_ = std::numeric_limits<int>::max();
    last_band_ = 0;
    for (int64_t p = 0; p < size; ++p) {
      const Segment<T> s = rows_[p] = item(by_start[p]);
      position_[by_start[p]] = uint32_t(p);
      if (!can_collide(s)) continue;
      const int band = bands_.of(s.length());
      first_band_ = std::min(first_band_, band);
      last_band_ = std::max(last_band_, band);
    }
    for (PositionSet& set : kept_) set.clear();
    if (const std::size_t many = last_band_ - first_band_ + 1; kept_.size() < many) kept_.resize(many);

    for (int64_t i = 0; i < kScanLimit; ++i) insert(position_[i]);
    for (int64_t r = done; r < n; ++r) {
      const int64_t p = position_[kScanLimit + r - done];
      if (can_collide(rows_[p])) {
        if (collides(p)) continue;
        insert(p);
      }
      take(r);
    }
  }

  void insert(int64_t p) { kept_[bands_.of(rows_[p].length()) - first_band_].insert(p, int64_t(rows_.size())); }

  bool collides(int64_t p) const {
    const double length = rows_[p].length();
    const int own = bands_.of(length);
    // First near-duplicates, the most frequent collisions; then from long to short, which the bound on the cost needs.
    if (collides_in(own, p, length)) return true;
    const int first = std::max(bands_.shortest_for(length), first_band_);
    const int last = std::min(bands_.longest_for(length), last_band_);
    for (int band = last; band >= first; --band) {
      if (band != own && collides_in(band, p, length)) return true;
    }
    return false;
  }

  bool collides_in(int band, int64_t p, double length) const {
    const PositionSet& set = kept_[band - first_band_];
    if (set.empty()) return false;
    const Segment<T> s = rows_[p];
    const Bands::Reach reach = bands_.reach(length, band);
    for (int64_t q = set.before(p); q >= 0 && double(s.start - rows_[q].start) <= reach.before; q = set.before(q)) {
      if (collide(rows_[q], rows_[q].length(), s, s.length(), threshold_)) return true;
    }
    for (int64_t q = set.from(p + 1); q >= 0 && double(rows_[q].start - s.start) <= reach.after; q = set.from(q + 1)) {
      if (collide(rows_[q], rows_[q].length(), s, s.length(), threshold_)) return true;
    }
    return false;
  }

  T threshold_;
  Bands bands_;
  KeptList<T> listed_;
  Order order_;
  HugeVector<Segment<T>> rows_;    // by start
  HugeVector<uint32_t> position_;  // of each item among them
  int first_band_ = 0, last_band_ = 0;
  std::vector<PositionSet> kept_;  // by band, from first_band_ on
};

// Rises where the score falls.
template <typename T>
auto falling(const T* scores) {
  return [scores](int64_t i) { return decltype(ordered_key(*scores))(~ordered_key(scores[i])); };
}

}  // namespace

template <typename T>
int64_t nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, int64_t* keep, int) {
  if (const int64_t bad = first_bad(segments, scores, n); bad < n) return -1 - bad;
  Order by_score;
  const HugeVector<uint32_t>& order = by_score.by(n, falling(scores));
  int64_t count = 0;
  Greedy<T>(T(iou_threshold))
      .run(
          n, [&](int64_t r) { return segment_at(segments, order[r]); },
          [&](int64_t r) { keep[count++] = int64_t(order[r]); });
  return count;
}

template <typename T>
int64_t batched_nms_1d(const T* segments, const T* scores, const int64_t* groups, int64_t n, double iou_threshold,
                       int64_t* keep, int threads) {
  if (const int64_t bad = first_bad(segments, scores, n); bad < n) return -1 - bad;
  if (n == 0) return 0;
  Order by_score, by_group;
  const HugeVector<uint32_t>& order = by_score.by(n, falling(scores));
  // Ranks by group and, the order being stable, by falling score within a group.
  const auto group = [&](int64_t rank) { return groups[order[rank]]; };
  const auto [low, high] = std::minmax_element(groups, groups + n);
  const uint64_t lowest = uint64_t(*low);
  const auto above = [&](int64_t rank) { return uint64_t(group(rank)) - lowest; };
  const HugeVector<uint32_t>& ranks = uint64_t(*high) - lowest <= std::numeric_limits<uint32_t>::max()
                                          ? by_group.by(n, [&](int64_t rank) { return uint32_t(above(rank)); })
                                          : by_group.by(n, above);
  std::vector<unsigned char> kept(n, 0);
  // A range of rows has the groups that begin in it.
  parallel_for(n, 2048, threads, [&](int64_t begin, int64_t end) {
    while (begin > 0 && begin < end && group(ranks[begin]) == group(ranks[begin - 1])) ++begin;
    Greedy<T> greedy{T(iou_threshold)};
    for (int64_t first = begin, last = begin; first < end; first = last) {
      while (last < n && group(ranks[last]) == group(ranks[first])) ++last;
      const uint32_t* members = ranks.data() + first;
      greedy.run(
          last - first, [&](int64_t r) { return segment_at(segments, order[members[r]]); },
          [&](int64_t r) { kept[members[r]] = 1; });
    }
  });
  int64_t count = 0;
  for (int64_t rank = 0; rank < n; ++rank) {
    if (kept[rank]) keep[count++] = int64_t(order[rank]);
  }
  return count;
}

#define D2NET_INSTANTIATE(T)                                                      \
  template int64_t nms_1d<T>(const T*, const T*, int64_t, double, int64_t*, int); \
  template int64_t batched_nms_1d<T>(const T*, const T*, const int64_t*, int64_t, double, int64_t*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu
