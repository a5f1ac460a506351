#include "proposals.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "cpu/common/parallel.h"
#include "cpu/common/simd.h"
#include "math/contrast.h"

namespace d2net::cpu {
namespace {

constexpr int64_t kTile = 8;    // columns of one recording that are gathered together
constexpr int64_t kBlock = 64;  // snippets that are gathered, or compared with the thresholds, together

// As wide as a value, so that comparing and counting vectorise without conversion.
template <typename T>
using Level = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <typename T>
inline void count_exceeded(const T* x, int64_t n, const T* thresholds, int64_t n_thresholds, Level<T>* level) {
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = std::min(kBlock, n - first);
    const T* block = x + first;
    Level<T>* out = level + first;
    std::fill(out, out + size, Level<T>(0));
    for (int64_t k = 0; k < n_thresholds; ++k) {
      const T threshold = thresholds[k];
      for (int64_t t = 0; t < size; ++t) out[t] += block[t] > threshold;
    }
  }
}

// level[t] = how many of the thresholds x[t] lies above.
D2NET_SIMD void levels_of(const float* x, int64_t n, const float* thresholds, int64_t count, int32_t* level) {
  count_exceeded(x, n, thresholds, count, level);
}
D2NET_SIMD void levels_of(const double* x, int64_t n, const double* thresholds, int64_t count, int64_t* level) {
  count_exceeded(x, n, thresholds, count, level);
}

// An unsigned integer that grows as the score falls; equal for 0 and -0.
template <typename T>
using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <typename T>
inline Key<T> falling_key(T score) {
  Key<T> bits;
  score += T(0);  // -0 + 0 is 0
  std::memcpy(&bits, &score, sizeof bits);
  const Key<T> sign = Key<T>(1) << (8 * sizeof bits - 1);
  return bits & sign ? bits : bits ^ ~sign;
}

template <typename T>
struct Ranked {
  Key<T> key;
  int32_t node;
};

// Sorts items[0..n) by rising key; those of equal key end up in any order. spare has room for n.
template <typename T>
void sort_by_key(Ranked<T>* items, int64_t n, Ranked<T>* spare) {
  if (n < 64) {  // a radix sort has to look at all of its counts
    std::sort(items, items + n, [](const Ranked<T>& a, const Ranked<T>& b) { return a.key < b.key; });
    return;
  }
  // By bytes, from the lowest; an even number of passes ends in items.
  constexpr int kBytes = sizeof(Key<T>);
  int32_t counts[kBytes][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int byte = 0; byte < kBytes; ++byte) ++counts[byte][items[i].key >> (8 * byte) & 255];
  }
  for (int byte = 0; byte < kBytes; ++byte) {
    int32_t place = 0;
    for (int32_t& count : counts[byte]) {
      const int32_t size = count;
      count = place;
      place += size;
    }
    for (int64_t i = 0; i < n; ++i) spare[counts[byte][items[i].key >> (8 * byte) & 255]++] = items[i];
    std::swap(items, spare);
  }
}

struct Settings {
  int64_t min_length;
  double inflation;
  bool mean_of_sides;
  double min_contrast;
  double nms_iou;
};

// Uninitialised memory: there may be as many nodes as snippets, but usually there are far fewer, and untouched pages
// cost nothing.
template <typename T>
std::unique_ptr<T[]> uninitialized(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// Finds the proposals of a column; its memory is used again for the next one.
template <typename T>
class Finder {
 public:
  using Span = typename FoundProposals<T>::Span;

  Finder(const std::vector<T>& thresholds, const Settings& settings, int64_t longest)
      : thresholds_(thresholds),
        settings_(settings),
        level_(uninitialized<Level<T>>(longest)),
        prefix_(uninitialized<double>(longest + 1)),
        open_(uninitialized<Open>(int64_t(thresholds.size()) + 1)),
        nodes_(uninitialized<Node>(longest)),
        orphans_(uninitialized<int32_t>(longest)),
        ranking_(uninitialized<Ranked<T>>(longest)),
        spare_(uninitialized<Ranked<T>>(longest)) {}

  // Appends the proposals of x[0..n) to spans, best first. False when x holds NaN or Inf, or its sum overflows.
  bool operator()(const T* x, int64_t n, std::vector<Span>& spans) {
    levels_of(x, n, thresholds_.data(), int64_t(thresholds_.size()), level_.get());
    if (!components(x, n)) return false;
    score(n);
    link();
    rank();
    suppress(spans);
    return true;
  }

 private:
  enum State : int32_t { kUndecided, kKept, kSuppressed };
  struct Node {
    int32_t start, end, parent;
    State state;
    T score;
    double length() const { return double(end - start); }
  };
  struct Open {
    int32_t start;
    Level<T> level;
  };
  static constexpr int32_t kNone = -1;

  // nodes_: the components of all thresholds, each extent once, in one pass. The components around a snippet are
  // nested, so the open ones are on a stack. Where the level falls, those above it end; if no open one has the new
  // level, one of that level began where the last ended one began. Inner ones come before outer ones. A snippet opens
  // at most one.
  bool components(const T* x, int64_t n) {
    n_nodes_ = 0;
    Open* top = open_.get();
    *top = {0, 0};
    double sum = 0, magnitude = 0;
    prefix_[0] = 0;
    for (int64_t t = 0; t < n; ++t) {
      const double value = double(x[t]);
      sum += value;
      magnitude += std::abs(value);
      prefix_[t + 1] = sum;
      if (level_[t] != top->level) top = change(top, int32_t(t), level_[t]);
    }
    change(top, int32_t(n), 0);
    // NaN and Inf fail this, too. Below it no difference or sum of prefix sums overflows, so no score is NaN.
    return magnitude <= std::numeric_limits<double>::max() / 4;
  }

  Open* change(Open* top, int32_t t, Level<T> level) {
    int32_t start = t;
    for (; top->level > level; --top) {
      start = top->start;
      if (t - start >= settings_.min_length) nodes_[n_nodes_++] = {start, t, kNone, kUndecided, T(0)};
    }
    if (top->level < level) *++top = {start, level};
    return top;
  }

  void score(int64_t n) {
    for (int32_t i = 0; i < n_nodes_; ++i) {
      Node& node = nodes_[i];
      node.score =
          T(math::contrast(prefix_.get(), node.start, node.end, n, settings_.inflation, settings_.mean_of_sides));
    }
  }

  // Gives each node the smallest one around it as its parent.
  void link() {
    int32_t n_orphans = 0;
    for (int32_t i = 0; i < n_nodes_; ++i) {
      for (; n_orphans > 0 && nodes_[orphans_[n_orphans - 1]].start >= nodes_[i].start; --n_orphans) {
        nodes_[orphans_[n_orphans - 1]].parent = i;
      }
      orphans_[n_orphans++] = i;
    }
  }

  // ranking_: the nodes by falling score, then start, then end.
  void rank() {
    for (int32_t i = 0; i < n_nodes_; ++i) ranking_[i] = {falling_key(nodes_[i].score), i};
    sort_by_key(ranking_.get(), n_nodes_, spare_.get());
    for (int32_t first = 0, last; first < n_nodes_; first = last) {
      for (last = first + 1; last < n_nodes_ && ranking_[last].key == ranking_[first].key;) ++last;
      if (last - first == 1) continue;
      const auto earlier = [&](const Ranked<T>& a, const Ranked<T>& b) {
        const Node &x = nodes_[a.node], &y = nodes_[b.node];
        return x.start != y.start ? x.start < y.start : x.end < y.end;
      };
      std::sort(ranking_.get() + first, ranking_.get() + last, earlier);
    }
  }

  // Greedy NMS. Two proposals are nested or disjoint, and the IoU of nested ones is the ratio of their lengths. So a
  // proposal is suppressed only by an ancestor, which it finds on the path to the root while the ratio is high enough,
  // or by a descendant, which marks it on its own path. A path has at most as many nodes as there are thresholds.
  void suppress(std::vector<Span>& spans) {
    const T least = T(settings_.min_contrast);
    for (int32_t r = 0; r < n_nodes_; ++r) {
      Node& node = nodes_[ranking_[r].node];
      if (node.score < least) break;
      if (node.state == kSuppressed) continue;
      int32_t beyond = node.parent;  // the first ancestor too long to collide, or a kept one that does
      while (beyond != kNone && node.length() / nodes_[beyond].length() >= settings_.nms_iou) {
        if (nodes_[beyond].state == kKept) {
          node.state = kSuppressed;
          break;
        }
        beyond = nodes_[beyond].parent;
      }
      if (node.state == kSuppressed) continue;
      node.state = kKept;
      for (int32_t i = node.parent; i != beyond; i = nodes_[i].parent) nodes_[i].state = kSuppressed;
      spans.push_back({node.start, node.end, node.score});
    }
  }

  const std::vector<T>& thresholds_;
  const Settings settings_;
  const std::unique_ptr<Level<T>[]> level_;
  const std::unique_ptr<double[]> prefix_;  // prefix_[t]: sum of the first t values
  const std::unique_ptr<Open[]> open_;
  const std::unique_ptr<Node[]> nodes_;
  int32_t n_nodes_ = 0;
  const std::unique_ptr<int32_t[]> orphans_;
  const std::unique_ptr<Ranked<T>[]> ranking_, spare_;
};

}  // namespace

template <typename T>
FoundProposals<T> find_proposals(const T* activations, int64_t batch, int64_t snippets, int64_t width,
                                 int64_t by_recording, int64_t by_snippet, int64_t by_class, const bool* classes,
                                 const int64_t* lengths, const double* thresholds, int64_t n_thresholds,
                                 int64_t min_length, double inflation, bool mean_of_sides, double min_contrast,
                                 double nms_iou, int threads) {
  FoundProposals<T> found;
  auto& columns = found.columns;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < width; ++c) {
      if (classes[b * width + c]) columns.push_back({b, c, 0});
    }
  }
  std::vector<T> distinct(n_thresholds);
  std::transform(thresholds, thresholds + n_thresholds, distinct.begin(), [](double t) { return T(t); });
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  const Settings settings{min_length, inflation, mean_of_sides, min_contrast, nms_iou};

  // A range stores its proposals at its first column, so that the order does not depend on how columns are divided.
  found.spans.resize(columns.size());
  std::atomic<bool> refused{false};
  const int64_t grain = 1 + 4096 / (snippets + 1);  // about 50 us of work
  parallel_for(int64_t(columns.size()), grain, threads, [&](int64_t begin, int64_t end) {
    Finder<T> finder(distinct, settings, snippets);
    const auto tile = uninitialized<T>(snippets * std::min(kTile, end - begin));
    auto& spans = found.spans[begin];
    for (int64_t first = begin, last; first < end && !refused.load(std::memory_order_relaxed); first = last) {
      const int64_t recording = columns[first].recording;
      const int64_t n = lengths ? std::clamp<int64_t>(lengths[recording], 0, snippets) : snippets;
      for (last = first + 1; last < std::min(end, first + kTile) && columns[last].recording == recording;) ++last;
      // A column strides over all classes, so the columns of a tile are gathered while a block is in the cache.
      for (int64_t block = 0; block < n; block += kBlock) {
        for (int64_t s = first; s < last; ++s) {
          const T* x = activations + recording * by_recording + columns[s].label * by_class;
          T* row = tile.get() + (s - first) * n;
          for (int64_t t = block; t < std::min(n, block + kBlock); ++t) row[t] = x[t * by_snippet];
        }
      }
      for (int64_t s = first; s < last; ++s) {
        const std::size_t before = spans.size();
        if (!finder(tile.get() + (s - first) * n, n, spans)) refused = true;
        columns[s].spans = int64_t(spans.size() - before);
      }
    }
  });
  found.count = FoundProposals<T>::kRefused;
  if (refused) return found;
  found.count = 0;
  for (const auto& column : columns) found.count += column.spans;
  return found;
}

template <typename T>
void copy_proposals(const FoundProposals<T>& found, int64_t* places, T* scores, int) {
  int64_t *recording = places, *label = recording + found.count;
  int64_t *start = label + found.count, *end = start + found.count;
  for (const auto& column : found.columns) {
    recording = std::fill_n(recording, column.spans, column.recording);
    label = std::fill_n(label, column.spans, column.label);
  }
  for (const auto& part : found.spans) {
    for (const auto& span : part) {
      *start++ = span.start;
      *end++ = span.end;
      *scores++ = span.score;
    }
  }
}

#define D2NET_INSTANTIATE(T)                                                                                         \
  template FoundProposals<T> find_proposals<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,       \
                                               const bool*, const int64_t*, const double*, int64_t, int64_t, double, \
                                               bool, double, double, int);                                           \
  template void copy_proposals<T>(const FoundProposals<T>&, int64_t*, T*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu
