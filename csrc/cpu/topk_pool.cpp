// Selection without sorting. A tile of up to 16 neighbouring columns, of one recording or of several, is copied to
// integer keys in the order of the numbers (math/ordered_float.h). Bisection finds the key of the k-th largest entry of
// all its columns at once: one pass counts, in every lane, the keys at or above a pivot. For long columns a sample
// gives the first pivots, and time steps without a candidate are dropped on the way, so that a column is read about ten
// times whatever its length.
#include "topk_pool.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>

#include "cpu/common/parallel.h"
#include "cpu/common/pooled_gradient.h"
#include "cpu/common/simd.h"
#include "math/topk.h"

namespace d2net::cpu {
namespace {

using math::Ordered;

// Lanes of a vector. A tile narrower than that has several time steps in one vector: lane l is column l % width.
constexpr int kLanes = 16;
constexpr int64_t kSampleStep = 16;
template <typename Key>
constexpr Key kNothing = std::numeric_limits<Key>::min();  // below every key: never counted

template <int columns, typename T, typename Key>
[[gnu::always_inline]] inline void load_columns(const T* x, int64_t stride, int64_t rows, int width, Key* keys) {
  for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
    for (int l = 0; l < columns; ++l) keys[row * width + l] = math::ordered_key(x[row * stride + l]);
  }
}
template <int columns, typename Key>
[[gnu::always_inline]] inline void spread(const Key* dense, int64_t rows, int width, Key* keys) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int l = 0; l < columns; ++l) keys[row * width + l] = dense[row * columns + l];
  }
}

// Keys of `rows` rows of some columns of a recording, which has `stride` of them; `width` a row of the tile. `spare`
// has room for half of the tile.
template <typename T, typename Key>
[[gnu::always_inline]] inline void load_keys(const T* x, int64_t stride, int64_t rows, int columns, int width,
                                             Key* keys, Key* spare) {
  const bool dense = columns == stride;
  if (dense && columns == width) return load_columns<1>(x, 1, rows * width, 1, keys);
  if (dense && columns < 4 && 2 * columns <= width) {  // too short for vectors: first all numbers one after the other
    load_columns<1>(x, 1, rows * columns, 1, spare);
    if (columns == 1) return spread<1>(spare, rows, width, keys);
    if (columns == 2) return spread<2>(spare, rows, width, keys);
    return spread<3>(spare, rows, width, keys);
  }
  for (int done, l = 0; l < columns; l += done) {
    const int left = columns - l;
    done = left >= 16 ? 16 : left >= 8 ? 8 : left >= 4 ? 4 : 1;
    if (done == 16) load_columns<16>(x + l, stride, rows, width, keys + l);
    if (done == 8) load_columns<8>(x + l, stride, rows, width, keys + l);
    if (done == 4) load_columns<4>(x + l, stride, rows, width, keys + l);
    if (done == 1) load_columns<1>(x + l, stride, rows, width, keys + l);
  }
}
D2NET_SIMD void load(const float* x, int64_t stride, int64_t rows, int columns, int width, int32_t* keys,
                     int32_t* spare) {
  load_keys(x, stride, rows, columns, width, keys, spare);
}
D2NET_SIMD void load(const double* x, int64_t stride, int64_t rows, int columns, int width, int64_t* keys,
                     int64_t* spare) {
  load_keys(x, stride, rows, columns, width, keys, spare);
}

template <typename Key>
[[gnu::always_inline]] inline void count_lanes(const Key* keys, int64_t vectors, const Key* pivot, Key* count) {
  Key at_least[kLanes], n[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) at_least[l] = pivot[l];
  for (int64_t v = 0; v < vectors; ++v) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) n[l] += keys[v * kLanes + l] >= at_least[l];
  }
  for (int l = 0; l < kLanes; ++l) count[l] = n[l];
}
D2NET_SIMD void count_from(const int32_t* keys, int64_t vectors, const int32_t* pivot, int32_t* count) {
  count_lanes(keys, vectors, pivot, count);
}
D2NET_SIMD void count_from(const int64_t* keys, int64_t vectors, const int64_t* pivot, int64_t* count) {
  count_lanes(keys, vectors, pivot, count);
}

// Copies the vectors that hold a key in [low, high) to `out`, which may be `keys`, and returns how many. Writes one
// vector past them.
template <typename Key>
[[gnu::always_inline]] inline int64_t keep_lanes(const Key* keys, int64_t vectors, const Key* low, const Key* high,
                                                 Key* out) {
  Key from[kLanes], to[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    from[l] = low[l];
    to[l] = high[l];
  }
  int64_t kept = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    Key any = 0;
#pragma omp simd reduction(| : any)
    for (int l = 0; l < kLanes; ++l) {
      const Key key = keys[v * kLanes + l];
      any |= Key(key >= from[l]) & Key(key < to[l]);
      out[kept * kLanes + l] = key;
    }
    kept += any;
  }
  return kept;
}
D2NET_SIMD int64_t keep(const int32_t* keys, int64_t vectors, const int32_t* low, const int32_t* high, int32_t* out) {
  return keep_lanes(keys, vectors, low, high, out);
}
D2NET_SIMD int64_t keep(const int64_t* keys, int64_t vectors, const int64_t* low, const int64_t* high, int64_t* out) {
  return keep_lanes(keys, vectors, low, high, out);
}

// Where the search stands, by lane: low <= key of the k-th largest < high, with the number of keys at or above each.
template <typename Key>
struct Bounds {
  Key low[kLanes], high[kLanes];
  Key from_low[kLanes], from_high[kLanes];
};

// Takes in that `count` keys are at or above `pivot`, and turns pivot into the middle between the new bounds. Returns
// whether every lane has found what it looks for: k keys at or above low, or else low as the key of the k-th largest.
template <typename Key>
[[gnu::always_inline]] inline bool narrow_lanes(Bounds<Key>* bounds, Key* pivot, const Key* count, const Key* k) {
  Key undecided = 0;
#pragma omp simd reduction(| : undecided)
  for (int l = 0; l < kLanes; ++l) {
    const Key p = pivot[l], n = count[l];
    const bool enough = n >= k[l];
    const Key low = enough ? p : bounds->low[l], high = enough ? bounds->high[l] : p;
    const Key from_low = enough ? n : bounds->from_low[l];
    bounds->low[l] = low;
    bounds->high[l] = high;
    bounds->from_low[l] = from_low;
    bounds->from_high[l] = enough ? bounds->from_high[l] : n;
    pivot[l] = (low & high) + ((low ^ high) >> 1);  // their mean, rounded down, without overflow
    undecided |= Key(from_low != k[l]) & Key(low + 1 != high);
  }
  return !undecided;
}
D2NET_SIMD bool narrow(Bounds<int32_t>* bounds, int32_t* pivot, const int32_t* count, const int32_t* k) {
  return narrow_lanes(bounds, pivot, count, k);
}
D2NET_SIMD bool narrow(Bounds<int64_t>* bounds, int64_t* pivot, const int64_t* count, const int64_t* k) {
  return narrow_lanes(bounds, pivot, count, k);
}

// As count_from, with the lanes of one column (l, l + width, ...) added up and the sum in each of them.
template <typename Key>
void count_columns(const Key* keys, int64_t vectors, int width, const Key* pivot, Key* count) {
  count_from(keys, vectors, pivot, count);
  for (int half = kLanes / 2; half >= width; half /= 2) {
    for (int l = 0; l < half; ++l) count[l] += count[l + half];
  }
  for (int filled = width; filled < kLanes; filled *= 2) {
    for (int l = 0; l < filled; ++l) count[l + filled] = count[l];
  }
}

// Bounds of the k[l]-th largest of the keys of every column (`width` of them a row), as narrow as `narrow` wants them.
// Column l has n[l] keys, or fewer. The first pivots are given, then comes bisection. `spare` has room for half of the
// vectors and one more.
template <typename T, typename Key = typename Ordered<T>::Key>
Bounds<Key> search(const Key* keys, int64_t rows, int width, const Key* n, const Key* k, const Key (*pivots)[kLanes],
                   int n_pivots, Key* spare) {
  int64_t vectors = (rows * width + kLanes - 1) / kLanes;
  Bounds<Key> bounds;
  Key pivot[kLanes], count[kLanes], dropped[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    pivot[l] = bounds.low[l] = Ordered<T>::kMinusInf;
    bounds.high[l] = Ordered<T>::kNaN + 1;
    count[l] = bounds.from_low[l] = n[l];
    bounds.from_high[l] = 0;
  }
  for (int step = 0; !narrow(&bounds, pivot, count, k); ++step) {
    if (step < n_pivots) {
      for (int l = 0; l < kLanes; ++l) pivot[l] = std::clamp(pivots[step][l], bounds.low[l], Key(bounds.high[l] - 1));
    }
    int64_t candidates = 0;  // each keeps at most one vector
    for (int l = 0; l < width; ++l) candidates += bounds.from_low[l] - bounds.from_high[l];
    if (candidates < vectors / 2) {
      vectors = keep(keys, vectors, bounds.low, bounds.high, spare);
      keys = spare;
      count_columns(keys, vectors, width, bounds.high, count);
      for (int l = 0; l < kLanes; ++l) dropped[l] = bounds.from_high[l] - count[l];
    }
    count_columns(keys, vectors, width, pivot, count);
    for (int l = 0; l < kLanes; ++l) count[l] += dropped[l];
  }
  return bounds;
}

// Sum of the keys' values above a key, in order of time, and the lowest of these keys, by lane. Reads 16 lanes a row
// whatever the width.
template <typename T, typename Key>
[[gnu::always_inline]] inline void sum_lanes(const Key* keys, int64_t rows, int width, const Key* above, double* sum,
                                             Key* lowest) {
  double total[kLanes] = {};
  T value[kLanes];
  Key bound[kLanes], low[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    bound[l] = above[l];
    low[l] = std::numeric_limits<Key>::max();
  }
  for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const Key key = keys[row * width + l];
      const Key taken = key > bound[l] ? key : std::numeric_limits<Key>::max();
      low[l] = low[l] < taken ? low[l] : taken;
      value[l] = key > bound[l] ? math::ordered_value<T>(key) : T(0);
    }
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) total[l] += value[l];
  }
  for (int l = 0; l < kLanes; ++l) {
    sum[l] = total[l];
    lowest[l] = low[l];
  }
}
D2NET_SIMD void sum_above(const int32_t* keys, int64_t rows, int width, const int32_t* above, double* sum,
                          int32_t* lowest) {
  sum_lanes<float>(keys, rows, width, above, sum, lowest);
}
D2NET_SIMD void sum_above(const int64_t* keys, int64_t rows, int width, const int64_t* above, double* sum,
                          int64_t* lowest) {
  sum_lanes<double>(keys, rows, width, above, sum, lowest);
}

// Row of the `nth` (from 1) key equal to `wanted` by lane, or of the last where there are fewer.
template <typename Key>
[[gnu::always_inline]] inline void find_lanes(const Key* keys, int64_t rows, int width, const Key* wanted,
                                              const Key* nth, Key* found) {
  Key key[kLanes], limit[kLanes], last[kLanes], seen[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    key[l] = wanted[l];
    limit[l] = nth[l];
    last[l] = -1;
  }
  for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const Key equal = keys[row * width + l] == key[l];
      seen[l] += equal;
      const Key hit = equal & Key(seen[l] <= limit[l]);
      const Key here = Key(row) | (hit - 1);  // row, or -1 without a hit
      last[l] = last[l] > here ? last[l] : here;
    }
  }
  for (int l = 0; l < kLanes; ++l) found[l] = last[l];
}
D2NET_SIMD void find(const int32_t* keys, int64_t rows, int width, const int32_t* wanted, const int32_t* nth,
                     int32_t* found) {
  find_lanes(keys, rows, width, wanted, nth, found);
}
D2NET_SIMD void find(const int64_t* keys, int64_t rows, int width, const int64_t* wanted, const int64_t* nth,
                     int64_t* found) {
  find_lanes(keys, rows, width, wanted, nth, found);
}

// Memory for the tiles of one thread, one after the other.
template <typename Key>
struct Scratch {
  int64_t vectors;
  std::unique_ptr<Key[]> keys, spare;
  Scratch(int64_t t, int width)
      : vectors((t * width + kLanes - 1) / kLanes),
        keys(new Key[(vectors + 1) * kLanes]),
        spare(new Key[(vectors / 2 + 2) * kLanes]) {}
};

// Of the columns first … first + columns - 1 of all b * c, those of a recording next to each other.
template <typename T>
void pool_tile(const TopkPool<T>& x, int64_t first, int columns, int width,
               Scratch<typename Ordered<T>::Key>& scratch) {
  using Key = typename Ordered<T>::Key;
  const int64_t t = x.t, c = x.c;
  Key* keys = scratch.keys.get();
  Key* spare = scratch.spare.get();
  Key length[kLanes] = {}, k[kLanes] = {};  // of lanes without a column too: nothing of nothing
  int64_t rows = 0;
  for (int l = 0; l < columns; ++l) {
    const int64_t own = x.rows.length(x.lengths, (first + l) / c, t);
    for (int lane = l; lane < kLanes && own > 0; lane += width) {
      length[lane] = Key(own);
      k[lane] = Key(math::topk_count(own, x.divisor));
    }
    rows = std::max(rows, own);
  }
  const int64_t vectors = (rows * width + kLanes - 1) / kLanes;
  for (int group, l = 0; l < width; l += group) {  // columns of one recording, then the lanes without one
    const int64_t recording = (first + l) / c, column = (first + l) % c;
    group = l < columns ? int(std::min<int64_t>(columns - l, c - column)) : width - l;
    if (length[l] > 0) load(x.x + x.rows.first(recording, t) * c + column, c, length[l], group, width, keys + l, spare);
    for (int64_t row = length[l]; row < rows; ++row) std::fill_n(keys + row * width + l, group, kNothing<Key>);
  }
  // The last vector may be half full, and the last rows are read in full vectors.
  std::fill(keys + rows * width, keys + (vectors + 1) * kLanes, kNothing<Key>);

  // Two keys from the sample, chosen so that the k-th largest of all is most likely between them; where a value is
  // frequent, just it.
  Key pivots[2][kLanes];
  int n_pivots = 0;
  const int64_t sampled = vectors / kSampleStep;
  if (sampled >= 32) {
    for (int64_t v = 0; v < sampled; ++v) std::copy_n(keys + v * kSampleStep * kLanes, kLanes, spare + v * kLanes);
    const int64_t n = sampled * (kLanes / width);
    const auto sample = [&](int side) {
      Key most[kLanes], nth[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const double rank = double(k[l]) * n / rows, margin = 1.5 * std::sqrt(rank) + 1;
        most[l] = k[l] > 0 ? Key(n) : 0;
        nth[l] = k[l] > 0 ? Key(std::clamp<int64_t>(int64_t(rank + side * margin), 1, n)) : 0;
      }
      return search<T>(spare, n, width, most, nth, pivots, 0, spare + sampled * kLanes);
    };
    std::copy_n(sample(1).low, kLanes, pivots[0]);
    std::copy_n(sample(-1).high, kLanes, pivots[1]);
    n_pivots = 2;
  }

  const Bounds<Key> bounds = search<T>(keys, rows, width, length, k, pivots, n_pivots, spare);
  // Either the k largest are those at or above low, or low is the k-th and the first few equal to it are taken.
  Key above[kLanes], lowest[kLanes], ties[kLanes], found[kLanes];
  double sum[kLanes];
  for (int l = 0; l < kLanes; ++l) above[l] = bounds.low[l] - Key(bounds.from_low[l] == k[l]);
  sum_above(keys, rows, width, above, sum, lowest);
  for (int l = 0; l < kLanes; ++l) {
    ties[l] = k[l];
    if (bounds.from_low[l] == k[l]) continue;
    lowest[l] = bounds.low[l];
    ties[l] = k[l] - bounds.from_high[l];
    sum[l] += double(ties[l]) * math::ordered_value<T>(lowest[l]);
  }
  find(keys, rows, width, lowest, ties, found);
  for (int l = 0; l < columns; ++l) {
    x.pooled[first + l] = k[l] > 0 ? T(sum[l] / k[l]) : T(0);
    x.kth[first + l] = k[l] > 0 ? math::ordered_value<T>(lowest[l]) : T(0);
    x.last[first + l] = k[l] > 0 ? int32_t(found[l]) : -1;
  }
}

int next_power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

}  // namespace

template <typename T>
void topk_pool(const TopkPool<T>& x, int threads) {
  const int64_t b = x.b, t = x.t, c = x.c;
  if (std::max(t, c) > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("topk_pool: T and C must be below 2^31");
  }
  if (b == 0 || c == 0) return;
  // Narrower tiles where there are too few to go round and each is work enough; a column's result does not depend on
  // its tile.
  const int64_t columns = b * c;
  int width = next_power_of_two(std::min<int64_t>(columns, kLanes));
  const int64_t enough = 16384;  // keys of a tile: about 10 us of work
  while (width > 4 && (columns + width - 1) / width < threads && t * width / 2 >= enough) width /= 2;
  const int64_t tiles = (columns + width - 1) / width;
  const int64_t grain = 1 + enough / (t * width + 1);
  parallel_for(tiles, grain, threads, [&](int64_t begin, int64_t end) {
    Scratch<typename Ordered<T>::Key> scratch(t, width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * width;
      const int held = int(std::min<int64_t>(width, columns - first));
      pool_tile(x, first, held, next_power_of_two(held), scratch);
    }
  });
}

template <typename T>
void topk_pool_backward(const TopkPool<T>& x, int threads) {
  const auto nothing = [](int64_t, int64_t, int64_t) {};
  pooled_gradient(x, 0, threads, nothing, nothing,
                  [&](int64_t row, int64_t rows) { std::fill_n(x.grad_x + row * x.c, rows * x.c, T(0)); });
}

D2NET_INSTANTIATE_CPU(topk_pool, TopkPool)
D2NET_INSTANTIATE_CPU(topk_pool_backward, TopkPool)

}  // namespace d2net::cpu
