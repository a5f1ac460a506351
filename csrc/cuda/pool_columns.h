// The forward kernel that topk_pool, tcam_pool and two_stream_tcam share: top-k mean of every column and, for the last
// two, the maximum of every row, in one launch.
//
// Bytes: activations (b, t, c) are read once for the columns and, where row maxima are wanted, once for the rows, the
// second time from the L2 cache as a rule; two_stream_tcam computes its sigmoids both times rather than wait for
// another block's. Written: b t (c + 2) and 3 b c numbers.
//
// Layout: a block has up to 8 neighbouring classes of one recording (32 bytes: a sector), as few as it takes to occupy
// the chip, and an equal share of the recording's rows. Its threads keep the columns as integer keys in registers, so
// the rounds of the search touch no memory; lanes of one row are neighbours, so reads are coalesced without a
// transposing step. What registers cannot hold (t above 16384, float64 8192) is read again, by topk_pool, in every
// round; row maxima then take a launch of their own.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cuda/columns.h"
#include "cuda/device.h"
#include "cuda/vector.h"
#include "math/topk.h"

namespace d2net::cuda {

// Ordered keys of activations. Those of half precision go without the bits that are always the same, which the search
// need not look at.
template <typename T>
struct Keys {
  using Value = accumulator_t<T>;
  using Key = typename math::Ordered<Value>::Key;
  static constexpr int kDropped = std::is_same_v<T, float16> ? 13 : std::is_same_v<T, bfloat16> ? 16 : 0;
  static constexpr Key kNone = std::numeric_limits<Key>::min();  // below every key

  static __device__ __forceinline__ Key of(T x) { return math::ordered_key(to_float(x)) >> kDropped; }
  static __device__ __forceinline__ Value value(Key key) {
    constexpr Key kUnit = Key(1) << kDropped;
    return math::ordered_value<Value>(key * kUnit + (key < 0 ? kUnit - 1 : 0));
  }
};

// Activations as they come, for kernels that take other sources too.
template <typename T>
struct Plain {
  using Number = T;
  const T* __restrict__ x;

  template <int N>
  __device__ __forceinline__ Pack<T, N> at(int64_t i) const {
    return load<N>(x + i);
  }
  template <int N>
  __device__ __forceinline__ void keep(int64_t, const Pack<T, N>&) const {}
  bool packs(int64_t c) const { return fits_packs(c, x); }
  // Of a recording; asked once by all threads of a block. The last argument: whether it is the recording's first block.
  __device__ __forceinline__ int64_t length(const int64_t* lengths, int64_t recording, int64_t t, bool) const {
    return math::clamped_length(lengths, recording, t);
  }
};

constexpr int kPoolThreads = 256, kMostPoolThreads = 512;  // 512: what the registers are enough for

template <typename T>
struct Pool {
  const int64_t* __restrict__ lengths;
  int64_t b, t, c, divisor;
  T* attention;  // with peak: see two_stream_tcam.h
  int32_t* peak;
  T* pooled;  // with kth, last: see topk_pool.h
  accumulator_t<T>* kth;
  int32_t* last;
};

// How a warp goes through rows of c classes.
struct RowLayout {
  bool packs;  // several classes a load
  int lanes;   // of one row, a power of two
};

template <typename Input>
RowLayout row_layout(const Input& input, int64_t c) {
  const bool packs = input.packs(c);
  const int64_t loads = packs ? c / kPackOf<typename Input::Number> : c;
  int lanes = 1;
  while (lanes < 32 && lanes < loads) lanes *= 2;
  return {packs, lanes};
}

// attention and peak of rows [begin, end) of a recording, by all threads of the block.
template <int N, typename Input, typename T = typename Input::Number>
__device__ __forceinline__ void class_maxima(const Input& input, const Pool<T>& pool, int lanes, int64_t recording,
                                             int64_t length, int64_t begin, int64_t end) {
  using Key = typename Keys<T>::Key;
  const int rows = 32 / lanes, lane = threadIdx.x % lanes;  // rows of a warp
  for (int64_t first = begin + threadIdx.x / 32 * rows; first < end; first += blockDim.x / 32 * rows) {
    const int64_t row = first + threadIdx.x % 32 / lanes;
    Key best = Keys<T>::kNone;
    int32_t found = -1;
    if (row < end) {
      for (int64_t j = lane * N; j < pool.c; j += lanes * N) {
        const int64_t i = (recording * pool.t + row) * pool.c + j;
        Pack<T, N> values = {};
        if (row < length) {
          values = input.template at<N>(i);
#pragma unroll
          for (int l = 0; l < N; ++l) {
            const Key key = Keys<T>::of(values.at[l]);
            found = key > best ? int32_t(j + l) : found;
            best = key > best ? key : best;
          }
        }
        input.template keep<N>(i, values);
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      if (step >= lanes) continue;
      const Key other = __shfl_xor_sync(kAllLanes, best, step);
      const int32_t at = __shfl_xor_sync(kAllLanes, found, step);
      found = other > best || (other == best && at < found) ? at : found;
      best = other > best ? other : best;
    }
    if (lane == 0 && row < end) {
      pool.attention[recording * pool.t + row] = from_float<T>(found < 0 ? 0 : Keys<T>::value(best));
      pool.peak[recording * pool.t + row] = found;
    }
  }
}

// The same for one of `shares` equal parts of a recording's rows.
template <typename Input, typename T = typename Input::Number>
__device__ __forceinline__ void class_maxima_of_share(const Input& input, const Pool<T>& pool, RowLayout layout,
                                                      int64_t shares, int64_t recording, int64_t share,
                                                      int64_t length) {
  const int64_t rows = (pool.t + shares - 1) / shares;
  const int64_t begin = share * rows, end = begin + rows < pool.t ? begin + rows : pool.t;
  if (layout.packs) {
    class_maxima<kPackOf<T>>(input, pool, layout.lanes, recording, length, begin, end);
  } else {
    class_maxima<1>(input, pool, layout.lanes, recording, length, begin, end);
  }
}

// R: entries of its column that a thread keeps. kReread: there may be more, to be read again in every round. A block
// takes tile blockIdx.x % tiles of recording blockIdx.x / tiles.
template <int R, bool kMaxima, bool kReread, typename Input, typename T = typename Input::Number>
__global__ void __launch_bounds__(kMostPoolThreads, 1)
    pool_columns_kernel(const Input input, const Pool<T> pool, RowLayout layout, int width, int64_t tiles) {
  using Key = typename Keys<T>::Key;
  const int64_t recording = blockIdx.x / tiles, tile = blockIdx.x % tiles, c = pool.c;
  const int length = int(input.length(pool.lengths, recording, pool.t, tile == 0));
  if (kMaxima) class_maxima_of_share(input, pool, layout, tiles, recording, tile, length);

  const int64_t column = tile * width + threadIdx.x % width, out = recording * c + column;
  const bool present = column < c;
  const bool writes = present && int(threadIdx.x) < width;
  if (length == 0) {
    if (writes) {
      pool.pooled[out] = from_float<T>(0);
      pool.kth[out] = 0;
      pool.last[out] = -1;
    }
    return;
  }

  const int first = threadIdx.x / width, step = blockDim.x / width;  // this thread's rows
  const int64_t origin = recording * pool.t * c + column;
  const auto key_at = [&](int row) { return Keys<T>::of(input.template at<1>(origin + row * c).at[0]); };
  Key kept[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int row = first + i * step;
    kept[i] = present && row < length ? key_at(row) : Keys<T>::kNone;
  }
  const auto reread = [&](auto f) {
    if (kReread && present) {
#pragma unroll 4
      for (int64_t row = first + int64_t(R) * step; row < length; row += step) f(int(row), key_at(int(row)));
    }
  };
  const auto each = [&](auto f) {  // of the column's keys; kNone past the length
#pragma unroll
    for (int i = 0; i < R; ++i) f(kept[i]);
    reread([&](int, Key key) { f(key); });
  };

  Columns columns{width};
  Key ends[2] = {math::kLargest<Key>, math::kLargest<Key>};  // smallest key, and turned (~) the largest
  each([&](Key key) {
    ends[0] = key != Keys<T>::kNone && key < ends[0] ? key : ends[0];
    ends[1] = ~key < ends[1] ? ~key : ends[1];
  });
  columns.reduce(ends, math::kLargest<Key>, Min());

  const int k = present ? int(math::topk_count(length, pool.divisor)) : 0;
  const Key kth = kth_largest(columns, k, ends[0], Key(~ends[1]), present ? length : 0, each);

  double sum[1] = {0};
  int count[2] = {0, 0};  // of entries above the k-th, and of its equals
  each([&](Key key) {
    if (key > kth) sum[0] += Keys<T>::value(key);
    count[0] += key > kth;
    count[1] += key == kth;
  });
  columns.reduce(sum, 0.0, Sum());
  columns.reduce(count, 0, Sum());

  // The first of the equals in time are taken: the largest once rows are turned (~). A bit for each equal, because the
  // compiler would keep R row numbers in registers.
  unsigned equals = 0;
#pragma unroll
  for (int i = 0; i < R; ++i) equals |= unsigned(kept[i] == kth) << i;
  const int ties = k - count[0];
  const int last = ~kth_largest(columns, ties, -length, -1, present ? count[1] : 0, [&](auto f) {
    for (unsigned left = equals; left != 0; left &= left - 1) f(~(first + (__ffs(int(left)) - 1) * step));
    reread([&](int row, Key key) {
      if (key == kth) f(~row);
    });
  });
  if (writes) {
    const accumulator_t<T> value = Keys<T>::value(kth);
    pool.pooled[out] = from_float<T>(accumulator_t<T>((sum[0] + double(ties) * value) / k));
    pool.kth[out] = value;
    pool.last[out] = last;
  }
}

// A block takes share blockIdx.x % shares of recording blockIdx.x / shares.
template <typename Input, typename T = typename Input::Number>
__global__ void __launch_bounds__(kPoolThreads, 1)
    class_maxima_kernel(const Input input, const Pool<T> pool, RowLayout layout, int64_t shares) {
  const int64_t recording = blockIdx.x / shares, share = blockIdx.x % shares;
  const int64_t length = input.length(pool.lengths, recording, pool.t, share == 0);
  class_maxima_of_share(input, pool, layout, shares, recording, share, length);
}

template <typename T>
constexpr int kMostKept = 128 / sizeof(typename Keys<T>::Key);

// Whether a block's registers hold a column.
template <typename T>
bool fits_registers(int64_t t) {
  return t <= kMostKept<T> * kMostPoolThreads;
}

// The columns of every recording and, with kMaxima, the rows, for which fits_registers(t) must be true.
template <bool kMaxima, typename Input, typename T = typename Input::Number>
void pool_columns(const Stream& on, const Input& input, const Pool<T>& pool) {
  if (std::max(pool.t, pool.c) > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("topk_pool: T and C must be below 2^31");
  }
  const auto tiles = [&](int width) { return pool.c > 0 ? (pool.c + width - 1) / width : 1; };
  int width = kMostColumns, threads = kPoolThreads;
  while (width > 1 && width / 2 >= pool.c) width /= 2;
  // Fewer columns a block waste bandwidth, but idle multiprocessors waste more.
  while (width > 1 && 2 * pool.b * tiles(width) <= on.multiprocessors()) width /= 2;
  constexpr int kMany = kMostKept<T>, kFew = kMany / 4;
  const auto fits = [&](int kept) { return pool.t * width <= int64_t(kept) * threads; };
  if (!fits(kMany)) threads = kMostPoolThreads;
  while (width > 1 && !fits(kMany)) width /= 2;
  auto kernel = pool_columns_kernel<kMany, kMaxima, !kMaxima, Input>;  // with row maxima, columns fit
  if (fits(kFew)) {
    kernel = pool_columns_kernel<kFew, kMaxima, false, Input>;
  } else if (fits(kMany)) {
    kernel = pool_columns_kernel<kMany, kMaxima, false, Input>;
  }
  on.launch(kernel, pool.b * tiles(width), threads, 0, input, pool, row_layout(input, pool.c), width, tiles(width));
}

// Only the rows of every recording.
template <typename Input, typename T = typename Input::Number>
void pool_rows(const Stream& on, const Input& input, const Pool<T>& pool) {
  const int64_t shares = pool.t / kPoolThreads + 1;
  on.launch(class_maxima_kernel<Input>, pool.b * shares, kPoolThreads, 0, input, pool, row_layout(input, pool.c),
            shares);
}

}  // namespace d2net::cuda
