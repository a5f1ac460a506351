// The warps of a block, dealt to columns, and the search for the k-th largest entry of each column.
#pragma once

#include <type_traits>

#include "cuda/common/block.h"
#include "cuda/common/device.h"
#include "math/ordered_float.h"

namespace d2net::cuda {

// kOneWarp: a column has one warp, so nothing waits for the rest of the block. Otherwise all threads must call, and the
// columns of a block are searched in step.
template <bool kOneWarp>
struct Columns {
  int warps;       // of a column, at most 32; warp i has column i / warps
  int parity = 0;  // of the shared memory that `reduce` uses next

  // Combines, for every j, the values[j] of a column's threads, in a fixed order; each of them gets the result.
  // combine: as for warp_reduce, with its identity.
  template <typename V, int n, typename Combine>
  __device__ __forceinline__ void reduce(V (&values)[n], V identity, Combine combine) {
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = warp_reduce(values[j], combine);
    if (kOneWarp) return;
    // Two of them: who still reads one is not overtaken by who already writes the other.
    D2NET_SHARED(V, of_warp, [2][n][32]);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (lane == 0) of_warp[parity][j][warp] = values[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < n; ++j) {
      values[j] = warp_reduce(lane < warps ? of_warp[parity][j][warp / warps * warps + lane] : identity, combine);
    }
    parity ^= 1;
  }

  // Whether any column that is searched in step with this one still `goes_on`, which its threads agree on.
  __device__ __forceinline__ bool any(bool goes_on) const { return kOneWarp ? goes_on : __syncthreads_or(goes_on); }
};

// Adds 1 to count if key >= pivot, in two instructions. The compiler would take three that wait for each other.
template <typename Key>
__device__ __forceinline__ void count_if_reached(int& count, Key key, Key pivot) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Key) == 4) {
    asm("{ .reg .pred p; setp.ge.s32 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(count) : "r"(key), "r"(pivot));
  } else {
    asm("{ .reg .pred p; setp.ge.s64 p, %1, %2; @p add.s32 %0, %0, 1; }"
        : "+r"(count)
        : "l"((long long)key), "l"((long long)pivot));
  }
#else
  count += key >= pivot;
#endif
}

// The k-th largest of the n integer keys of this thread's column, all within [low, highest]; highest is not the largest
// integer. each(f) calls f(key) for this thread's share of them. n = k = 0 for no column: its result means nothing.
//
// Every round counts the keys at or above a pivot and so halves the range: more pivots make fewer rounds, but counting
// takes longer than adding up what was counted. It ends when k keys are left at or above `low`, mostly long before the
// range is down to one key.
template <bool kOneWarp, typename Key, typename Each>
__device__ __forceinline__ Key kth_largest(Columns<kOneWarp>& columns, int k, Key low, Key highest, int n, Each each) {
  using Unsigned = std::make_unsigned_t<Key>;
  Key high = highest + 1;
  while (columns.any(n != k && Unsigned(high) - Unsigned(low) > 1)) {
    const Key pivot = Key(Unsigned(low) + (Unsigned(high) - Unsigned(low)) / 2);
    int count[1] = {0};
    each([&](Key key) { count_if_reached(count[0], key, pivot); });
    columns.reduce(count, 0, Sum());
    const bool enough = count[0] >= k;
    low = enough ? pivot : low;
    n = enough ? count[0] : n;
    high = enough ? high : pivot;
  }
  Key smallest[1] = {math::kLargest<Key>};
  each([&](Key key) { smallest[0] = key >= low && key < smallest[0] ? key : smallest[0]; });
  columns.reduce(smallest, math::kLargest<Key>, Min());
  return smallest[0];
}

}  // namespace d2net::cuda
