// The threads of a block, dealt to neighbouring columns of a row-major array in turn, and the search for the k-th
// largest entry of each column. All threads of the block must call; the columns are searched in step.
#pragma once

#include <type_traits>

#include "cuda/block.h"
#include "cuda/device.h"
#include "math/ordered_float.h"

namespace d2net::cuda {

constexpr int kMostColumns = 8;  // of a block

struct Columns {
  int width;       // number of columns, a power of two: thread i has column i % width
  int parity = 0;  // of the shared memory that `reduce` uses next

  // Combines, for every j, the values[j] of a column's threads, in a fixed order; each of them gets the result.
  // combine: as for warp_reduce, with its identity.
  template <typename V, int n, typename Combine>
  __device__ __forceinline__ void reduce(V (&values)[n], V identity, Combine combine) {
    // Two of them: who still reads one is not overtaken by who already writes the other.
    D2NET_SHARED(V, of_warp, [2][n][32 * kMostColumns]);
    const int lane = threadIdx.x % 32, filled = blockDim.x / 32 * width;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      values[j] = within_warp(values[j], combine);
      if (lane < width) of_warp[parity][j][threadIdx.x / 32 * width + lane] = values[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < n; ++j) {
      values[j] = identity;
      for (int i = lane; i < filled; i += 32) values[j] = combine(values[j], of_warp[parity][j][i]);
      values[j] = within_warp(values[j], combine);
    }
    parity ^= 1;
  }

 private:
  template <typename V, typename Combine>
  __device__ __forceinline__ V within_warp(V value, Combine combine) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      if (step >= width) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
    }
    return value;
  }
};

// The k-th largest of the n integer keys of this thread's column, all within [low, highest]; highest is not the largest
// integer. each(f) calls f(key) for this thread's share of them. n = k = 0 for no column: its result means nothing.
//
// Every round counts the keys at or above three pivots and so quarters the range. It ends when k keys are left at or
// above `low`, mostly long before the range is down to one key.
template <typename Key, typename Each>
__device__ __forceinline__ Key kth_largest(Columns& columns, int k, Key low, Key highest, int n, Each each) {
  using Unsigned = std::make_unsigned_t<Key>;
  constexpr int kPivots = 3;
  Key high = highest + 1;
  while (__syncthreads_or(n != k && Unsigned(high) - Unsigned(low) > 1)) {
    const Unsigned range = Unsigned(high) - Unsigned(low);
    Key pivot[kPivots];
    int count[kPivots] = {};
#pragma unroll
    for (int j = 0; j < kPivots; ++j) {
      const Unsigned quarters = j + 1;
      pivot[j] = Key(Unsigned(low) + range / 4 * quarters + range % 4 * quarters / 4);
    }
    each([&](Key key) {
#pragma unroll
      for (int j = 0; j < kPivots; ++j) count[j] += key >= pivot[j];
    });
    columns.reduce(count, 0, Sum());
#pragma unroll
    for (int j = 0; j < kPivots; ++j) {
      if (count[j] < k) continue;
      low = pivot[j];
      n = count[j];
    }
#pragma unroll
    for (int j = kPivots - 1; j >= 0; --j) high = count[j] < k ? pivot[j] : high;
  }
  Key smallest[1] = {math::kLargest<Key>};
  each([&](Key key) { smallest[0] = key >= low && key < smallest[0] ? key : smallest[0]; });
  columns.reduce(smallest, math::kLargest<Key>, Min());
  return smallest[0];
}

}  // namespace d2net::cuda
