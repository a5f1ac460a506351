// Greedy NMS of one group of a million segments or of many small groups; few segments: nms_block.cu.
//
// Sorted by falling score, a segment has a rank; greedy NMS decides by rank alone: a segment is suppressed if a kept
// one of lower rank collides with it, and kept if every colliding one of lower rank is suppressed. Sorted by (group,
// start), it has a position, and all that it can collide with lies in a window of positions. A word holds the state of
// 32 positions: a bit for "kept", a bit for "undecided", neither for "suppressed" or "not yet looked at".
//
// A warp takes one segment and looks at the set bits of its window, 1024 positions a load. A kept one that collides
// ends the search; while an undecided one of lower rank collides, it looks again. Warps take segments in order of rank
// from a counter, so what a warp waits for is held by a warp that already runs: there is always one that need not wait.
// Nothing else orders the work, and groups need no code of their own.
//
// So that windows hold few undecided segments, ranks are taken in prefixes that double: before a prefix is decided, its
// segments that collide with what is kept by then are dropped, all in parallel. If scores come in random order, only
// O(log n) of a window's survivors collide with one of them, and the chain of those that wait for each other is as
// short (Blelloch et al., SPAA 2012). In the worst case, a chain through all n, they are decided one after the other.
//
// Cost: the sorts move about 200 bytes a float segment (300 with groups), the rest 100, nearly all in order of position
// or of rank and so coalesced. The words, 2 bits a segment, stay in the L2 cache, as do the rows of a dense window. A
// window of w positions costs w / 1024 loads and a test for each kept one in it: n^2 / 2 tests at worst, where long
// segments reach over most of the kept ones.
#include <algorithm>

#include "cuda/common/block.h"
#include "cuda/common/device_algorithms.h"
#include "cuda/common/nms_rules.h"
#include "nms.h"

namespace d2net::cuda {
namespace {

using Word = unsigned long long;  // what 64-bit atomics take

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kFirstPrefix = 2048;
constexpr int kMaxPrefixes = 32;

constexpr int kCollides = -1;  // a result of search_window()

// In the order of the floats, from the highest bit down.
__device__ __forceinline__ Word ordered_key(float x) { return Word(ordered_bits(x)) << 32; }
__device__ __forceinline__ Word ordered_key(double x) { return ordered_bits(x); }

// Orders by group, then by start. Of a group it has a hash, and of a double without its last bits: groups that share a
// hash get longer windows, full of segments that search_window() passes over.
template <typename T>
__device__ __forceinline__ Word position_key(const int64_t* groups, int64_t i, T start) {
  constexpr int kHashBits = sizeof(T) == 4 ? 32 : 20;
  const Word key = ordered_key(start);
  if (groups == nullptr) return key;
  const Word hash = Word(groups[i]) * 0x9E3779B97F4A7C15ull >> (64 - kHashBits);
  return hash << (64 - kHashBits) | key >> kHashBits;
}

// How many of the n sorted keys are below `key`.
__device__ __forceinline__ int64_t count_below(const Word* sorted, int64_t n, Word key) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    const bool below = sorted[low + half] < key;
    low += below ? half + 1 : 0;
    n = below ? n - half - 1 : half;
  }
  return low;
}

// A load that sees what other warps have written by now.
__device__ __forceinline__ Word load_now(const Word* word) {
#ifdef D2NET_SIMT
  return simt::load_now(word);
#else
  return *const_cast<const volatile Word*>(word);
#endif
}

__device__ __forceinline__ Word kept_bit(int position) { return Word(1) << position % 32; }
__device__ __forceinline__ Word undecided_bit(int position) { return Word(1) << (32 + position % 32); }

struct Candidate {
  int position, first_word, end_word;  // its window; empty where it cannot collide
};

template <typename T>
struct Work {
  // Inputs.
  const T* segments;
  const T* scores;
  const int64_t* groups;  // null: one group
  int64_t n;
  T threshold;
  // For the sorts.
  Word* key;
  Word* sorted;
  uint32_t* counting;  // 0, 1, 2 …
  // By rank.
  uint32_t* order;  // index
  Candidate* candidate;
  uint8_t* alive;  // not suppressed
  // By position.
  uint32_t* rank;
  Segment<T>* row;
  Word* state;
  // One each.
  Word* longest;      // length that can collide, the bits of a double
  Word* first_bad;    // the complement of the row; 0: none
  unsigned* tickets;  // of each prefix
  int64_t* result;
};

template <typename T>
__global__ void score_keys_kernel(Work<T> w) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  double length = 0;
  if (i < w.n) {
    const Segment<T> s = segment_at(w.segments, i);
    if (is_bad(s, w.scores[i])) atomicMax(w.first_bad, ~Word(i));
    if (can_collide(s, w.threshold)) length = double(s.length());
    w.key[i] = ~ordered_key(w.scores[i]);
    w.counting[i] = uint32_t(i);
  }
  length = block_reduce(length, Max());
  if (threadIdx.x == 0) atomicMax(w.longest, Word(__double_as_longlong(length)));
}

template <typename T>
__global__ void position_keys_kernel(Work<T> w) {
  const int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= w.n) return;
  const int64_t i = w.order[r];
  w.key[r] = position_key(w.groups, i, w.segments[2 * i]);
}

// With l and m the lengths of s and k, t the threshold: IoU(s, k) >= t needs an overlap of t max(l, m), so m is at most
// l / t and k starts at most (1 - t) m before s and at most (1 - t) l after it. The bounds are rounded as the starts
// are, so that no start within a bound is lost.
template <typename T>
__global__ void windows_kernel(Work<T> w) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p == 0) w.result[1] = int64_t(~*w.first_bad);
  bool undecided = false;
  if (p < w.n) {
    const int64_t r = w.rank[p], i = w.order[r];
    const Segment<T> s = segment_at(w.segments, i);
    Candidate c{int(p), 0, 0};
    if (can_collide(s, w.threshold)) {
      const double length = double(s.length()), t = double(w.threshold) * (1 - kSlack);
      const double longest = __longlong_as_double((long long)*w.longest);
      const double before = (1 - t) * min(length / t, longest) * (1 + kSlack), after = (1 - t) * length * (1 + kSlack);
      const Word low = position_key(w.groups, i, T(double(s.start) - before));
      const Word high = position_key(w.groups, i, T(double(s.start) + after));
      c.first_word = int(count_below(w.sorted, w.n, low) / 32);
      c.end_word = int((count_below(w.sorted, w.n, high + 1) + 31) / 32);
    }
    w.row[p] = s;
    w.candidate[r] = c;
    w.alive[r] = 1;
    undecided = r < kFirstPrefix;
  }
  const unsigned bits = __ballot_sync(kAllLanes, undecided);
  if (p < w.n && p % 32 == 0) w.state[p / 32] = Word(bits) << 32;
}

// The warp searches the window of the segment of rank r, from a word on. Returns kCollides if a kept segment collides;
// else the first word with an undecided one of lower rank that collides; else end_word. Words before the returned one
// need not be searched again: nothing becomes undecided while others decide, and a colliding segment of higher rank is
// not kept before this one is decided.
template <bool kWait, typename T>
__device__ __forceinline__ int search_window(const Work<T>& w, int64_t r, Candidate c, int from_word) {
  const int lane = threadIdx.x % 32;
  const Segment<T> s = w.row[c.position];
  int result = c.end_word;
  for (int base = from_word; base < c.end_word; base += 32) {
    Word words = 0;
    if (base + lane < c.end_word) words = load_now(w.state + base + lane);
    if (!kWait) words &= 0xffffffffu;
    for (unsigned left = __ballot_sync(kAllLanes, words != 0); left != 0; left &= left - 1) {
      const int source = __ffs(int(left)) - 1, q = 32 * (base + source) + lane;
      const Word word = __shfl_sync(kAllLanes, words, source);
      const bool kept = (word & kept_bit(lane)) != 0, undecided = (word & undecided_bit(lane)) != 0;
      bool collides = (kept || undecided) && collide(s, w.row[q], w.threshold);
      if (collides && w.groups != nullptr) collides = w.groups[w.order[r]] == w.groups[w.order[w.rank[q]]];
      if (__any_sync(kAllLanes, collides && kept)) return kCollides;
      if (kWait && result == c.end_word && __any_sync(kAllLanes, collides && w.rank[q] < r)) result = base + source;
    }
  }
  return result;
}

// Of ranks begin … end - 1, suppresses those that collide with a kept one, and marks the others as undecided.
template <typename T>
__global__ void drop_kernel(Work<T> w, int64_t begin, int64_t end) {
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t r = begin + int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; r < end; r += warps) {
    const Candidate c = w.candidate[r];
    const bool collides = search_window<false>(w, r, c, c.first_word) == kCollides;
    if (threadIdx.x % 32 != 0) continue;
    if (collides) {
      w.alive[r] = 0;
    } else {
      atomicOr(w.state + c.position / 32, undecided_bit(c.position));
    }
  }
}

// Decides the undecided of ranks begin … end - 1; a warp takes up to 32 at a time.
template <typename T>
__global__ void decide_kernel(Work<T> w, int64_t begin, int64_t end, int at_a_time, unsigned* ticket) {
  const int lane = threadIdx.x % 32;
  for (;;) {
    unsigned number = 0;
    if (lane == 0) number = atomicAdd(ticket, 1u);
    const int64_t first = begin + int64_t(__shfl_sync(kAllLanes, number, 0)) * at_a_time;
    if (first >= end) return;
    const bool undecided = lane < at_a_time && first + lane < end && w.alive[first + lane];
    for (unsigned left = __ballot_sync(kAllLanes, undecided); left != 0; left &= left - 1) {
      const int source = __ffs(int(left)) - 1;
      const int64_t r = first + source;
      const Candidate c = w.candidate[r];
      int word = search_window<true>(w, r, c, c.first_word);
      while (word != c.end_word && word != kCollides) {
        __nanosleep(64);  // thousands of polling warps would slow down the one that they wait for
        word = search_window<true>(w, r, c, word);
      }
      if (lane != source) continue;
      if (word == kCollides) w.alive[r] = 0;
      // One update: no warp may see it as neither undecided nor decided.
      const Word becomes = word == kCollides ? 0 : kept_bit(c.position);
      atomicAdd(w.state + c.position / 32, becomes - undecided_bit(c.position));
    }
  }
}

// Divides the caller's scratch memory into arrays.
struct Parts {
  uintptr_t begin;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(begin + used);
    used += (n * int64_t(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
};

// The memory of the sorts and of the selection comes last.
template <typename T>
struct Scratch {
  Work<T> work = {};
  int64_t cleared_bytes, own_bytes;

  Scratch(void* begin, int64_t n) {
    Parts parts{reinterpret_cast<uintptr_t>(begin)};
    work.longest = parts.take<Word>(1);  // these three are cleared together
    work.first_bad = parts.take<Word>(1);
    work.tickets = parts.take<unsigned>(kMaxPrefixes);
    cleared_bytes = parts.used;
    work.key = parts.take<Word>(n);
    work.sorted = parts.take<Word>(n);
    work.counting = parts.take<uint32_t>(n);
    work.order = parts.take<uint32_t>(n);
    work.candidate = parts.take<Candidate>(n);
    work.alive = parts.take<uint8_t>(n);
    work.rank = parts.take<uint32_t>(n);
    work.row = parts.take<Segment<T>>(n);
    work.state = parts.take<Word>((n + 31) / 32);
    own_bytes = parts.used;
  }
};

}  // namespace

template <typename T>
int64_t nms_1d_scratch_bytes(int64_t n, int device, void* stream) {
  const Stream on("nms_1d", device, stream);
  return Scratch<T>(nullptr, n).own_bytes +
         std::max(sort_pairs_scratch_bytes<Word, uint32_t>(on, n), select_scratch_bytes<uint32_t>(on, n));
}

template <typename T>
void nms_1d(const T* segments, const T* scores, const int64_t* groups, int64_t n, double iou_threshold, void* scratch,
            int64_t scratch_bytes, int32_t* keep, int64_t* result, int device, void* stream) {
  const Stream on(groups == nullptr ? "nms_1d" : "batched_nms_1d", device, stream);
  const Scratch<T> parts(scratch, n);
  unsigned char* for_algorithms = static_cast<unsigned char*>(scratch) + parts.own_bytes;
  const int64_t for_algorithms_bytes = scratch_bytes - parts.own_bytes;
  Work<T> w = parts.work;
  w.segments = segments;
  w.scores = scores;
  w.groups = groups;
  w.n = n;
  w.threshold = T(iou_threshold);
  w.result = result;
  on.fill(static_cast<unsigned char*>(scratch), 0, parts.cleared_bytes);

  const int64_t blocks = (n + kThreads - 1) / kThreads;
  const int float_bits = 64 - 8 * int(sizeof(T));  // the bits of ordered_key below are constant
  on.launch(score_keys_kernel<T>, blocks, kThreads, 0, w);
  sort_pairs(on, for_algorithms, for_algorithms_bytes, w.key, w.sorted, w.counting, w.order, n, float_bits);
  on.launch(position_keys_kernel<T>, blocks, kThreads, 0, w);
  sort_pairs(on, for_algorithms, for_algorithms_bytes, w.key, w.sorted, w.counting, w.rank, n,
             groups == nullptr ? float_bits : 0);
  on.launch(windows_kernel<T>, blocks, kThreads, 0, w);

  const int64_t most_blocks =
      8 * on.multiprocessors();  // that run at once; a warp takes the next segments when it is done
  const auto enough_blocks = [&](int64_t warps) { return std::min((warps + kWarps - 1) / kWarps, most_blocks); };
  unsigned* ticket = w.tickets;
  for (int64_t begin = 0, end = std::min(n, kFirstPrefix); begin < n; begin = end, end = std::min(n, 2 * end)) {
    const int64_t size = end - begin;
    if (begin > 0) on.launch(drop_kernel<T>, enough_blocks(size), kThreads, 0, w, begin, end);
    const int64_t at_a_time = std::clamp<int64_t>(size / (most_blocks * kWarps), 1, 32);
    on.launch(decide_kernel<T>, enough_blocks((size + at_a_time - 1) / at_a_time), kThreads, 0, w, begin, end,
              at_a_time, ticket++);
  }
  select(on, for_algorithms, for_algorithms_bytes, w.order, w.alive, reinterpret_cast<uint32_t*>(keep), result, n);
}

#define D2NET_INSTANTIATE(T)                                                                                       \
  template int64_t nms_1d_scratch_bytes<T>(int64_t, int, void*);                                                   \
  template void nms_1d<T>(const T*, const T*, const int64_t*, int64_t, double, void*, int64_t, int32_t*, int64_t*, \
                          int, void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cuda
