// Bytes: every row of x before its length is read once, and 8 bytes a row written. A first launch of one block makes
// the reference a unit vector, which then comes from the caches.
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

constexpr int kUnitThreads = 512;
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

// unit[0 .. d) = reference / |reference| or zeros, whatever its magnitude; unit[d] = |reference|. One block.
template <typename A>
__global__ void __launch_bounds__(kUnitThreads, 1)
    normalize_reference(const A* __restrict__ reference, int64_t d, A* __restrict__ unit) {
  double largest = 0;
  for (int64_t i = threadIdx.x; i < d; i += kUnitThreads) {
    largest = LargestOrNan()(fabs(double(reference[i])), largest);
  }
  largest = block_reduce(largest, LargestOrNan());
  const double divisor = largest == 0 ? 1 : largest;
  double squares = 0;
  for (int64_t i = threadIdx.x; i < d; i += kUnitThreads) {
    const double value = reference[i] / divisor;
    squares += value * value;
  }
  const double norm = sqrt(block_reduce(squares, Sum()));
  for (int64_t i = threadIdx.x; i < d; i += kUnitThreads) {
    unit[i] = largest == 0 ? A(0) : A(reference[i] / divisor / norm);
  }
  if (threadIdx.x == 0) unit[d] = A(norm * largest);
}

template <typename A>
struct Angle {
  A cosine, norm;
};

// Of a row whose squares leave the range of A: scaled by its largest element first. The whole warp takes part.
template <typename T, typename A>
__device__ __forceinline__ Angle<A> angle_of_scaled(const T* __restrict__ x, const A* __restrict__ unit, int64_t d) {
  const int lane = threadIdx.x % 32;
  A largest = 0;
#pragma unroll 1
  for (int64_t i = lane; i < d; i += 32) largest = LargestOrNan()(A(fabs(to_float(x[i]))), largest);
  largest = warp_reduce(largest, LargestOrNan());
  const A divisor = largest == 0 ? A(1) : largest;
  A dot = 0, squares = 0;
#pragma unroll 1
  for (int64_t i = lane; i < d; i += 32) {
    const A value = to_float(x[i]) / divisor;
    dot += value * unit[i];
    squares += value * value;
  }
  dot = warp_reduce(dot, Sum());
  const A norm = sqrt(warp_reduce(squares, Sum()));
  return {norm == 0 ? dot : dot / norm, norm * largest};  // dot of a zero vector: 0, or NaN from the reference
}

// A block takes 32 snippets of one recording (blockIdx.x).
template <typename T, int N, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kThreads, 2)
    bottom_up(const T* __restrict__ x, const A* __restrict__ unit, const int64_t* __restrict__ lengths, int64_t groups,
              int64_t t, int64_t d, T* __restrict__ attention, A* __restrict__ norms) {
  const int lane = threadIdx.x % 32;
  const int64_t recording = blockIdx.x / groups;
  const int64_t first = blockIdx.x % groups * kBlockRows + threadIdx.x / 32 * kRows;
  if (first >= t) return;  // whole warps; no barrier of the block follows
  const int64_t length = lengths == nullptr ? t : min(lengths[recording], t);
  // Without a reference nothing depends on x.
  const int rows = unit[d] == 0 ? 0 : int(max(min(length - first, int64_t(kRows)), int64_t(0)));
  const T* from = x + (recording * t + first) * d;
  A dots[kRows] = {}, squares[kRows] = {};
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
    const Pack<A, N> direction = load<N>(unit + column);
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
  Angle<A> mine = {0, 0};
  const bool sound = in_range(square);
  if (lane < rows && sound) {
    mine.norm = sqrt(square);
    mine.cosine = dot / mine.norm;
  }
  for (unsigned left = __ballot_sync(kAllLanes, lane < rows && !sound); left != 0; left &= left - 1) {
    const int row = __ffs(int(left)) - 1;
    const Angle<A> angle = angle_of_scaled(from + row * d, unit, d);
    if (lane == row) mine = angle;
  }
  if (lane >= kRows || first + lane >= t) return;
  if (mine.cosine > 1) mine.cosine = 1;  // not min and max: NaN stays NaN
  if (mine.cosine < -1) mine.cosine = -1;
  const int64_t to = recording * t + first + lane;
  attention[to] = from_float<T>(A(0.5) * (1 - mine.cosine));
  norms[to] = mine.norm;
}

}  // namespace

template <typename T>
void bottom_up_attention(const T* x, const accumulator_t<T>* reference, const int64_t* lengths, int64_t b, int64_t t,
                         int64_t d, accumulator_t<T>* unit, T* attention, accumulator_t<T>* norms, int device,
                         void* stream) {
  if (b == 0 || t == 0) return;
  const Stream on("bottom_up_attention", device, stream);
  on.launch(normalize_reference<accumulator_t<T>>, 1, kUnitThreads, 0, reference, d, unit);
  const int64_t groups = (t + kBlockRows - 1) / kBlockRows;
  on.launch(fits_packs(d, x, unit) ? bottom_up<T, kPackOf<T>> : bottom_up<T, 1>, b * groups, kThreads, 0, x, unit,
            lengths, groups, t, d, attention, norms);
}

#define INSTANTIATE(T)                                                                                               \
  template void bottom_up_attention<T>(const T*, const accumulator_t<T>*, const int64_t*, int64_t, int64_t, int64_t, \
                                       accumulator_t<T>*, T*, accumulator_t<T>*, int, void*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(float16)
INSTANTIATE(bfloat16)
#undef INSTANTIATE

}  // namespace d2net::cuda
