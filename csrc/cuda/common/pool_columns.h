// The forward kernel of topk_pool, tcam_pool and the loss: top-k mean of every column and, for the last two, the
// maximum of every row, in one launch.
//
// Bytes: activations (b, t, c) are read once for the columns and, for row maxima, once for the rows, the second time
// mostly from the L2 cache. Written: 2 b t and 3 b c numbers. The time is mostly the latency of the search, of about 15
// rounds.
//
// Layout: a column of up to 1024 rows (float64: 512) has one warp, so that no round waits at a barrier; a longer one
// has several. Its keys stay in registers. A block has up to 8 neighbouring classes of one recording (32 bytes: a
// sector), fewer if the chip is not occupied: neighbouring lanes load neighbouring classes, and shared memory
// transposes what they loaded, so that a warp gets its column. What registers cannot hold (t above 16384, float64 8192)
// is read again in every round. Row maxima have blocks of their own, which end before the search does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cuda/common/columns.h"
#include "cuda/common/device.h"
#include "cuda/common/vector.h"
#include "math/topk.h"
#include "topk_pool.h"

namespace d2net::cuda {

// Ordered keys of activations. Those of half precision are without the bits that are the same in all of them, which the
// search need not look at.
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

// Activations; the loss finds the lengths of their recordings in another way.
template <typename T>
struct Plain {
  using Number = T;
  const T* __restrict__ x;

  // Of a recording; all threads of a block call it once. The last argument: whether it is the recording's first block.
  __device__ __forceinline__ int64_t length(const TopkPool<T>& pool, int64_t recording, bool) const {
    return pool.rows.length(pool.lengths, recording, pool.t);
  }
};

template <bool kOneWarp>
constexpr int kPoolThreads = kOneWarp ? 256 : 512;  // of a block, at most
template <typename T>
constexpr int kKept = 128 / sizeof(typename Keys<T>::Key);  // entries of its column that a thread keeps
constexpr int kRowBatch = 8;                                // of them, which are skipped together in a short column
constexpr int kRowsOfLane = 2;                              // in a block of rows, one after another

struct PoolLayout {
  int width, warps;            // columns of a block and warps of a column, powers of two
  unsigned columns_blocks;     // b times `tiles`; blocks of rows follow
  unsigned tiles, row_blocks;  // blocks of a recording for its columns, and for its rows
  int64_t rows;                // of a block of rows
  bool packs;                  // rows: several classes a load
  int lanes;                   // of one row, a power of two
};

// attention and argmax of rows [begin, end) of a recording, by all threads of a block.
template <int N, typename Input, typename T = typename Input::Number>
__device__ __forceinline__ void class_maxima(const Input& input, const TopkPool<T>& pool, int lanes, int64_t recording,
                                             int64_t length, int64_t begin, int64_t end) {
  using Key = typename Keys<T>::Key;
  const int rows = 32 / lanes, lane = threadIdx.x % lanes;  // rows of a warp
  const int64_t origin = pool.rows.first(recording, pool.t);
  for (int64_t first = begin + threadIdx.x / 32 * rows; first < end; first += blockDim.x / 32 * rows) {
    const int64_t row = first + threadIdx.x % 32 / lanes;
    Key best = Keys<T>::kNone;
    int32_t found = -1;
    if (row < min(end, length)) {
      for (int64_t j = lane * N; j < pool.c; j += lanes * N) {
        const int64_t i = (origin + row) * pool.c + j;
        const Pack<T, N> values = load<N>(input.x + i);
#pragma unroll
        for (int l = 0; l < N; ++l) {
          const Key key = Keys<T>::of(values.at[l]);
          found = key > best ? int32_t(j + l) : found;
          best = key > best ? key : best;
        }
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
      pool.attention[origin + row] = from_float<T>(found < 0 ? 0 : Keys<T>::value(best));
      pool.argmax[origin + row] = found;
    }
  }
}

// A block has a column for every `layout.warps` warps: tile blockIdx.x % tiles of recording blockIdx.x / tiles. Where
// row maxima are computed, the last blocks have `layout.rows` rows of a recording each.
template <bool kOneWarp, typename Input, typename T = typename Input::Number>
__global__ void __launch_bounds__(kPoolThreads<kOneWarp>, 1)
    pool_columns_kernel(const Input input, const TopkPool<T> pool, const PoolLayout layout) {
  using Key = typename Keys<T>::Key;
  constexpr int R = kKept<T>;
  if (blockIdx.x >= layout.columns_blocks) {
    const unsigned block = blockIdx.x - layout.columns_blocks, recording = block / layout.row_blocks;
    const int64_t length = input.length(pool, recording, false);
    const int64_t written = pool.rows.written(pool.lengths, recording, pool.t);
    const int64_t begin = block % layout.row_blocks * layout.rows, end = min(begin + layout.rows, written);
    if (layout.packs) {
      class_maxima<kPackOf<T>>(input, pool, layout.lanes, recording, length, begin, end);
    } else {
      class_maxima<1>(input, pool, layout.lanes, recording, length, begin, end);
    }
    return;
  }

  // Loads are issued before the length is known; beyond the last row or column they load the last one.
  const unsigned recording = blockIdx.x / layout.tiles, tile = blockIdx.x % layout.tiles;
  const unsigned t = unsigned(pool.rows.room(recording, pool.t)), c = unsigned(pool.c), step = 32 * layout.warps;
  const int64_t origin = pool.rows.first(recording, pool.t) * c, first_column = int64_t(tile) * layout.width;
  unsigned at = threadIdx.x % layout.width, first = threadIdx.x / layout.width;
  const int64_t loaded = origin + min(first_column + at, pool.c - 1);
  T raw[R];
#pragma unroll
  for (int batch = 0; batch < R; batch += kRowBatch) {
    if (batch * step >= t || c == 0) continue;
#pragma unroll
    for (int i = batch; i < batch + kRowBatch; ++i) {
      raw[i] = input.x[loaded + int64_t(min(first + i * step, t - 1)) * c];
    }
  }
  const unsigned length = unsigned(input.length(pool, recording, tile == 0));
  if (c == 0) return;
  const int topk = int(math::topk_count(length, pool.divisor));

  D2NET_SHARED(Key, transposed, [kRowBatch * kPoolThreads<kOneWarp> / 4 * 5]);
  const unsigned pitch = layout.width < 4 ? layout.width : layout.width + 1;  // few bank conflicts
  const unsigned own = threadIdx.x / step, own_first = threadIdx.x % step;
  Key kept[R];  // of rows first + i * step of column `own`; kNone past the length
#pragma unroll
  for (int batch = 0; batch < R; batch += kRowBatch) {
#pragma unroll
    for (int i = batch; i < batch + kRowBatch; ++i) kept[i] = Keys<T>::kNone;
    if (batch * step >= length) continue;
#pragma unroll
    for (int i = batch; i < batch + kRowBatch; ++i) {
      const Key key = Keys<T>::of(raw[i]);
      kept[i] = first + i * step < length ? key : Keys<T>::kNone;
    }
    if (layout.width == 1) continue;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) transposed[(i * step + first) * pitch + at] = kept[batch + i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) kept[batch + i] = transposed[(i * step + own_first) * pitch + own];
  }
  at = own, first = own_first;
  const int64_t column = first_column + at, out = recording * c + column;
  const bool present = column < c, writes = present && first == 0;
  if (length == 0) {
    if (writes) {
      pool.pooled[out] = from_float<T>(0);
      pool.kth[out] = 0;
      pool.last[out] = -1;
    }
    return;
  }
  if (kOneWarp && !present) return;

  const auto reread = [&](auto f) {
    if (!kOneWarp && present) {
#pragma unroll 4
      for (int64_t row = first + int64_t(R) * step; row < length; row += step) {
        f(int(row), Keys<T>::of(input.x[origin + column + row * c]));
      }
    }
  };
  const auto each = [&](auto f) {  // of the column's keys
#pragma unroll
    for (int batch = 0; batch < R; batch += kRowBatch) {
      if (batch * step >= length) continue;
#pragma unroll
      for (int i = batch; i < batch + kRowBatch; ++i) f(kept[i]);
    }
    reread([&](int, Key key) { f(key); });
  };

  Columns<kOneWarp> columns{layout.warps};
  Key ends[2] = {math::kLargest<Key>, math::kLargest<Key>};  // the smallest key, and ~ of the largest
  each([&](Key key) {
    ends[0] = key != Keys<T>::kNone && key < ends[0] ? key : ends[0];
    ends[1] = ~key < ends[1] ? ~key : ends[1];
  });
  columns.reduce(ends, math::kLargest<Key>, Min());

  const int k = present ? topk : 0;
  const Key kth = kth_largest(columns, k, ends[0], Key(~ends[1]), present ? int(length) : 0, each);

  // A bit for each key equal to the k-th: the compiler would keep R row numbers in registers.
  unsigned equals = 0;
#pragma unroll
  for (int i = 0; i < R; ++i) equals |= unsigned(kept[i] == kth) << i;
  double sum[1] = {0};
  int count[2] = {0, __popc(equals)};  // of keys above the k-th, and of those equal to it
  each([&](Key key) {
    if (key > kth) sum[0] += Keys<T>::value(key);
    count_if_reached(count[0], key, Key(kth + 1));
  });
  reread([&](int, Key key) { count[1] += key == kth; });
  columns.reduce(sum, 0.0, Sum());
  columns.reduce(count, 0, Sum());

  // Among equal keys the first rows are taken, which are the largest of ~row.
  const int ties = k - count[0];
  const int last = ~kth_largest(columns, ties, -int(length), -1, present ? count[1] : 0, [&](auto f) {
    for (unsigned left = equals; left != 0; left &= left - 1) f(~int(first + (__ffs(int(left)) - 1) * step));
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

// The columns of every recording and, where pool.attention is not null, the rows.
template <typename Input, typename T = typename Input::Number>
void pool_columns(const Stream& on, const Input& input, const TopkPool<T>& pool) {
  if (std::max(pool.t, pool.c) > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("topk_pool: T and C must be below 2^31");
  }
  constexpr int kMostWarps = kPoolThreads<false> / 32;
  int warps = 1, width = kPoolThreads<true> / 32;
  while (warps < kMostWarps && int64_t(32) * kKept<T> * warps < pool.t) warps *= 2;
  while (width > 1 && (width * warps > kMostWarps || width / 2 >= pool.c)) width /= 2;
  // Fewer columns a block waste bandwidth, but idle multiprocessors are worse.
  const auto tiles = [&](int of) { return pool.c > 0 ? (pool.c + of - 1) / of : 1; };
  while (width > 1 && 2 * pool.b * tiles(width) <= on.multiprocessors()) width /= 2;

  const bool packs = fits_packs(pool.c, input.x);
  const int64_t loads = packs ? pool.c / kPackOf<T> : pool.c, threads = 32 * warps * width;
  int lanes = 1;
  while (lanes < 32 && lanes < loads) lanes *= 2;
  const int64_t rows = threads / lanes * kRowsOfLane;
  const int64_t row_blocks = pool.attention == nullptr ? 0 : (pool.t + rows - 1) / rows;
  const int64_t columns_blocks = pool.b * tiles(width);
  on.launch(warps == 1 ? pool_columns_kernel<true, Input> : pool_columns_kernel<false, Input>,
            columns_blocks + pool.b * row_blocks, threads, 0, input, pool,
            PoolLayout{width, warps, unsigned(columns_blocks), unsigned(tiles(width)), unsigned(row_blocks), rows,
                       packs, lanes});
}

}  // namespace d2net::cuda
