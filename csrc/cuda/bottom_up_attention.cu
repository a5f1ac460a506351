// Bytes: every row of x before its length is read once, and 8 bytes a row written. The reference comes from the caches;
// its norm is summed beside the dot products rather than by a launch of its own, one multiplication more to eight.
//
// Layout: a warp takes 4 snippets at once, so that it reads the reference a quarter as often, and loads their next
// columns before it uses the last ones, so that 4 to 8 loads are on their way; a lane takes a pack of columns, so a
// warp reads neighbouring bytes. 240 blocks of 256 threads for 10 recordings of 750 snippets.
#include "bottom_up_attention.h"
#include "cuda/block.h"
#include "cuda/device.h"
#include "cuda/vector.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256, kRows = 4;  // of a warp
constexpr int kBlockRows = kThreads / 32 * kRows;

struct LargestOrNan {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Whether a sum of squares kept its precision: no square that matters left the range of its type.
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

// Where the squares of a row or of the reference leave the range of A: both are scaled by their largest element first.
// The whole warp takes part.
template <typename T, typename A>
__device__ __forceinline__ Angle<A> angle_of_scaled(const T* __restrict__ x, const A* __restrict__ reference,
                                                    int64_t d) {
  const A largest_reference = largest_of<A>(reference, d);
  if (largest_reference == 0) return {0, 0};  // nothing depends on x, NaN or not
  const A largest = largest_of<A>(x, d), divisor = largest == 0 ? A(1) : largest;
  A dot = 0, squares = 0, reference_squares = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < d; i += 32) {
    const A value = to_float(x[i]) / divisor, direction = reference[i] / largest_reference;
    dot += value * direction;
    squares += value * value;
    reference_squares += direction * direction;
  }
  dot = warp_reduce(dot, Sum()) / sqrt(warp_reduce(reference_squares, Sum()));
  const A norm = sqrt(warp_reduce(squares, Sum()));
  return {norm == 0 ? dot : dot / norm, norm * largest};  // dot of a zero vector: 0, or NaN from the reference
}

// A block takes 32 snippets of one recording (blockIdx.x).
template <typename T, int N, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kThreads, 2)
    bottom_up(const T* __restrict__ x, const A* __restrict__ reference, const int64_t* __restrict__ lengths,
              int64_t groups, int64_t t, int64_t d, A* __restrict__ attention, A* __restrict__ norms) {
  const int lane = threadIdx.x % 32;
  const int64_t recording = blockIdx.x / groups;
  const int64_t first = blockIdx.x % groups * kBlockRows + threadIdx.x / 32 * kRows;
  if (first >= t) return;  // whole warps; no barrier of the block follows
  const int64_t length = lengths == nullptr ? t : min(lengths[recording], t);
  const int rows = int(max(min(length - first, int64_t(kRows)), int64_t(0)));
  const T* from = x + (recording * t + first) * d;
  A dots[kRows] = {}, squares[kRows] = {}, reference_squares = 0;
  const auto read = [&](int64_t column, Pack<T, N>(&values)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows && column < d) values[r] = load<N>(from + r * d + column);
    }
  };
  Pack<T, N> next[kRows] = {};
  read(lane * N, next);
  for (int64_t column = lane * N; column < d; column += 32 * N) {
    Pack<T, N> values[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = next[r];
    read(column + 32 * N, next);
    const Pack<A, N> direction = load<N>(reference + column);
#pragma unroll
    for (int j = 0; j < N; ++j) reference_squares += direction.at[j] * direction.at[j];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
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
  for (int r = 0; r < kRows; ++r) {
    const A dot_of_row = warp_reduce(dots[r], Sum()), square_of_row = warp_reduce(squares[r], Sum());
    if (lane == r) {
      dot = dot_of_row;
      square = square_of_row;
    }
  }
  reference_squares = warp_reduce(reference_squares, Sum());
  Angle<A> mine = {0, 0};
  const bool sound = in_range(square) && in_range(reference_squares);
  if (lane < rows && sound) {
    mine.norm = sqrt(square);
    mine.cosine = dot / (mine.norm * sqrt(reference_squares));
  }
  for (unsigned left = __ballot_sync(kAllLanes, lane < rows && !sound); left != 0; left &= left - 1) {
    const int row = __ffs(int(left)) - 1;
    const Angle<A> angle = angle_of_scaled(from + row * d, reference, d);
    if (lane == row) mine = angle;
  }
  if (lane >= kRows || first + lane >= t) return;
  if (mine.cosine > 1) mine.cosine = 1;  // not min and max: NaN stays NaN
  if (mine.cosine < -1) mine.cosine = -1;
  const int64_t to = recording * t + first + lane;
  attention[to] = A(0.5) * (1 - mine.cosine);
  norms[to] = mine.norm;
}

}  // namespace

template <typename T>
void bottom_up_attention(const T* x, const accumulator_t<T>* reference, const int64_t* lengths, int64_t b, int64_t t,
                         int64_t d, accumulator_t<T>* attention, accumulator_t<T>* norms, int device, void* stream) {
  if (b == 0 || t == 0) return;
  const Stream on("bottom_up_attention", device, stream);
  const int64_t groups = (t + kBlockRows - 1) / kBlockRows;
  on.launch(fits_packs(d, x, reference) ? bottom_up<T, kPackOf<T>> : bottom_up<T, 1>, b * groups, kThreads, 0, x,
            reference, lengths, groups, t, d, attention, norms);
}

#define INSTANTIATE(T)                                                                                               \
  template void bottom_up_attention<T>(const T*, const accumulator_t<T>*, const int64_t*, int64_t, int64_t, int64_t, \
                                       accumulator_t<T>*, accumulator_t<T>*, int, void*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(float16)
INSTANTIATE(bfloat16)
#undef INSTANTIATE

}  // namespace d2net::cuda
