// lambda'(t) of Eq. 8 for the rows of one block, for bottom_up_attention and for the loss, which goes on with them.
//
// Bytes: every row of x before its length is read once. x_ref comes from the caches; its norm is summed beside the dot
// products, one more multiplication to eight, rather than by a launch of its own.
//
// Layout: a warp takes 4 snippets at once, so that it reads x_ref a quarter as often, and loads their next
// columns before it uses the last ones, so that 4 to 8 loads are on their way; a lane takes a pack of columns, so a
// warp reads neighbouring bytes. 240 blocks of 256 threads for 10 recordings of 750 snippets.
#pragma once

#include "cuda/common/block.h"
#include "cuda/common/device.h"
#include "cuda/common/vector.h"

namespace d2net::cuda {

constexpr int kScoreThreads = 256, kScoreRows = 4;  // of a warp
constexpr int kScoreBlockRows = kScoreThreads / 32 * kScoreRows;

struct LargestOrNan {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Whether a sum of squares is precise: no square that matters was out of the range of its type.
__device__ __forceinline__ bool in_range(float squares) { return squares > 1e-25f && squares < 1e30f; }
__device__ __forceinline__ bool in_range(double squares) { return squares > 1e-280 && squares < 1e280; }

template <typename A>
struct Angle {
  A cosine, norm;
};

// The largest magnitude among x[0 .. d), or NaN if one is there. The whole warp takes part.
template <typename A, typename T>
__device__ __forceinline__ A largest_of(const T* __restrict__ x, int64_t d) {
  A largest = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < d; i += 32) largest = LargestOrNan()(A(fabs(to_float(x[i]))), largest);
  return warp_reduce(largest, LargestOrNan());
}

// For a row or an x_ref whose squares are out of the range of A: both are scaled by their largest element first. The
// whole warp takes part.
template <typename T, typename A>
__device__ __forceinline__ Angle<A> angle_of_scaled(const T* __restrict__ x, const A* __restrict__ x_ref, int64_t d) {
  const A largest_x_ref = largest_of<A>(x_ref, d);
  if (largest_x_ref == 0) return {0, 0};  // nothing depends on x, NaN or not
  const A largest = largest_of<A>(x, d), divisor = largest == 0 ? A(1) : largest;
  A dot = 0, squares = 0, x_ref_squares = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < d; i += 32) {
    const A value = to_float(x[i]) / divisor, direction = x_ref[i] / largest_x_ref;
    dot += value * direction;
    squares += value * value;
    x_ref_squares += direction * direction;
  }
  dot = warp_reduce(dot, Sum()) / sqrt(warp_reduce(x_ref_squares, Sum()));
  const A norm = sqrt(warp_reduce(squares, Sum()));
  return {norm == 0 ? dot : dot / norm, norm * largest};  // dot of a zero vector: 0, or NaN from x_ref
}

// The angle between x_ref (d) and row `lane` of up to 4 rows from `from` on, for lanes below `rows`; for others
// cosine and norm are 0. By a whole warp.
template <int N, typename T, typename A = accumulator_t<T>>
__device__ __forceinline__ Angle<A> angles_of(const T* __restrict__ from, const A* __restrict__ x_ref, int rows,
                                              int64_t d) {
  const int lane = threadIdx.x % 32;
  A dots[kScoreRows] = {}, squares[kScoreRows] = {}, x_ref_squares = 0;
  const auto read = [&](int64_t column, Pack<T, N>(&values)[kScoreRows]) {
#pragma unroll
    for (int r = 0; r < kScoreRows; ++r) {
      if (r < rows && column < d) values[r] = load<N>(from + r * d + column);
    }
  };
  Pack<T, N> next[kScoreRows] = {};
  read(lane * N, next);
  for (int64_t column = lane * N; column < d; column += 32 * N) {
    Pack<T, N> values[kScoreRows];
#pragma unroll
    for (int r = 0; r < kScoreRows; ++r) values[r] = next[r];
    read(column + 32 * N, next);
    const Pack<A, N> direction = load<N>(x_ref + column);
#pragma unroll
    for (int j = 0; j < N; ++j) x_ref_squares += direction.at[j] * direction.at[j];
#pragma unroll
    for (int r = 0; r < kScoreRows; ++r) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A value = to_float(values[r].at[j]);
        dots[r] += value * direction.at[j];
        squares[r] += value * value;
      }
    }
  }
  // Lane r goes on with row r.
  A dot = 0, square = 0;
#pragma unroll
  for (int r = 0; r < kScoreRows; ++r) {
    const A dot_of_row = warp_reduce(dots[r], Sum()), square_of_row = warp_reduce(squares[r], Sum());
    if (lane == r) {
      dot = dot_of_row;
      square = square_of_row;
    }
  }
  x_ref_squares = warp_reduce(x_ref_squares, Sum());
  Angle<A> mine = {0, 0};
  const bool sound = in_range(square) && in_range(x_ref_squares);
  if (lane < rows && sound) {
    mine.norm = sqrt(square);
    mine.cosine = dot / (mine.norm * sqrt(x_ref_squares));
  }
  for (unsigned left = __ballot_sync(kAllLanes, lane < rows && !sound); left != 0; left &= left - 1) {
    const int row = __ffs(int(left)) - 1;
    const Angle<A> angle = angle_of_scaled(from + row * d, x_ref, d);
    if (lane == row) mine = angle;
  }
  if (mine.cosine > 1) mine.cosine = 1;  // not min and max: NaN stays NaN
  if (mine.cosine < -1) mine.cosine = -1;
  return mine;
}

}  // namespace d2net::cuda
