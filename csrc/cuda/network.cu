// Bytes: every operand is read once, every result written once; signs and dropout are kept as bits, an eighth of a byte
// an element. A thread takes 8 elements of a row, which share a byte of them, of several rows: the loads of these are
// on their way together, and a bias is read once for all.
#include <algorithm>
#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/vector.h"
#include "math/dropout.h"
#include "network.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBits = int(kBitsOf);
constexpr int kLeastLanes = kThreads / int(kBlockRows);

template <typename T>
constexpr int kBytePack = kWidePackOf<T> < kBits ? kWidePackOf<T> : kBits;  // elements of one access

// Rows that a thread loads at once.
template <typename T>
constexpr int kRowsAtOnce = sizeof(T) == 2   ? 4
                            : sizeof(T) == 4 ? 2
                                             : 1;

// 8 neighbouring elements of a row. kPacks: all of them are there, and aligned.
template <typename T>
struct Eight {
  Pack<T, kBytePack<T>> parts[kBits / kBytePack<T>];

  template <bool kPacks>
  __device__ __forceinline__ void read(const T* from, int present) {
    if constexpr (kPacks) {
#pragma unroll
      for (int p = 0; p < kBits / kBytePack<T>; ++p) parts[p] = load<kBytePack<T>>(from + p * kBytePack<T>);
    } else {
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        if (i < present) parts[i / kBytePack<T>].at[i % kBytePack<T>] = from[i];
      }
    }
  }
  template <bool kPacks>
  __device__ __forceinline__ void write(T* to, int present) const {
    if constexpr (kPacks) {
#pragma unroll
      for (int p = 0; p < kBits / kBytePack<T>; ++p) store(to + p * kBytePack<T>, parts[p]);
    } else {
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        if (i < present) to[i] = parts[i / kBytePack<T>].at[i % kBytePack<T>];
      }
    }
  }
  __device__ __forceinline__ accumulator_t<T> get(int i) const {
    return to_float(parts[i / kBytePack<T>].at[i % kBytePack<T>]);
  }
  __device__ __forceinline__ void set_pair(int i, accumulator_t<T> first, accumulator_t<T> second) {
    parts[i / kBytePack<T>].at[i % kBytePack<T>] = from_float<T>(first);
    parts[(i + 1) / kBytePack<T>].at[(i + 1) % kBytePack<T>] = from_float<T>(second);
  }
};

// Of bfloat16, whose halves of a word the compiler would take apart and put together one by one.
template <>
struct Eight<bfloat16> {
  Pack<unsigned, 4> words;

  template <bool kPacks>
  __device__ __forceinline__ void read(const bfloat16* from, int present) {
    if constexpr (kPacks) {
      words = load<4>(reinterpret_cast<const unsigned*>(from));
    } else {
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        if (i < present) words.at[i / 2] |= unsigned(from[i].bits) << (i % 2 * 16);
      }
    }
  }
  template <bool kPacks>
  __device__ __forceinline__ void write(bfloat16* to, int present) const {
    if constexpr (kPacks) {
#ifdef D2NET_SIMT
      store(reinterpret_cast<unsigned*>(to), words);
#else  // ptxas would make four stores of it
      const unsigned* w = words.at;
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(__cvta_generic_to_global(to)), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                   : "memory");
#endif
    } else {
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        if (i < present) to[i].bits = uint16_t(words.at[i / 2] >> (i % 2 * 16));
      }
    }
  }
  __device__ __forceinline__ float get(int i) const {
    return __uint_as_float(i % 2 == 0 ? words.at[i / 2] << 16 : words.at[i / 2] & 0xffff0000u);
  }
  __device__ __forceinline__ void set_pair(int i, float first, float second) {
    words.at[i / 2] = unsigned(from_float<bfloat16>(first).bits) | unsigned(from_float<bfloat16>(second).bits) << 16;
  }
};

template <bool kPacks, typename T, typename A>
__device__ __forceinline__ void write_eight(T* to, const A (&values)[kBits], int present) {
  Eight<T> eight;
#pragma unroll
  for (int j = 0; j < kBits; j += 2) eight.set_pair(j, values[j], values[j + 1]);
  eight.template write<kPacks>(to, present);
}

// Which rows and columns a thread has: a block takes kBlockRows rows of 8 `lanes` columns, a thread 8 columns of every
// kThreads / lanes-th row.
struct Place {
  int64_t bytes_of_row, byte, column, first_row;
  int present, groups, group;

  __device__ __forceinline__ Place(int64_t d, unsigned lanes, unsigned tiles) {
    const unsigned tile = blockIdx.x % tiles;
    groups = int(kThreads / lanes), group = int(threadIdx.x / lanes);
    bytes_of_row = (d + kBits - 1) / kBits;
    byte = int64_t(tile) * lanes + threadIdx.x % lanes;
    column = byte * kBits;
    first_row = int64_t(blockIdx.x / tiles) * kBlockRows;
    present = int(min(max(d - column, int64_t(0)), int64_t(kBits)));
  }
};

template <typename T, bool kPacks>
__global__ void __launch_bounds__(kThreads)
    stream_layer_kernel(const StreamLayer<T> g, const math::Dropout dropout, unsigned lanes, unsigned tiles) {
  using A = accumulator_t<T>;
  constexpr int R = kRowsAtOnce<T>;
  const Place at(g.d, lanes, tiles);
  if (at.present == 0) return;
  const A slope = A(g.slope), share = A(g.share), scale = A(dropout.scale);
  const bool drops = g.seed != nullptr, of_dropped = g.mean_of_dropped != 0 && drops;
  const uint64_t seed = drops ? uint64_t(*g.seed) + uint64_t(g.stream) : 0;
  Eight<A> bias = {};
  bias.template read<kPacks>(g.bias + at.column, at.present);
  for (int first = at.group; first < int(kBlockRows); first += at.groups * R) {
    int64_t rows[R];
    bool inside[R];
    Eight<T> ys[R] = {}, residuals[R] = {}, others[R] = {};
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int step = first + i * at.groups;
      rows[i] = step < int(kBlockRows) && at.first_row + step < g.n ? at.first_row + step : -1;
      inside[i] = rows[i] >= 0 && g.mask[rows[i]];
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (!inside[i]) continue;
      const int64_t from = rows[i] * g.d + at.column;
      ys[i].template read<kPacks>(g.y + from, at.present);
      if (g.residual != nullptr) residuals[i].template read<kPacks>(g.residual + from, at.present);
      if (g.other != nullptr) others[i].template read<kPacks>(g.other + from, at.present);
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (rows[i] < 0) continue;
      const int64_t to = rows[i] * g.d + at.column, byte = rows[i] * at.bytes_of_row + at.byte;
      // Branches are the same for all threads but at gaps: what is off costs nothing.
      A value[kBits] = {};
      unsigned signs = 0, kept = 0;
      if (inside[i]) {
#pragma unroll
        for (int j = 0; j < kBits; ++j) {
          const A y = ys[i].get(j) + bias.get(j);
          signs |= y > 0 ? 1u << j : 0u;
          value[j] = y > 0 ? y : slope * y;
        }
        if (g.residual != nullptr) {
#pragma unroll
          for (int j = 0; j < kBits; ++j) value[j] += residuals[i].get(j);
        }
        if (drops) {
          const int64_t number = g.numbers == nullptr ? rows[i] : g.numbers[rows[i]];
          kept = dropout.kept(seed, uint64_t(number) * uint64_t(at.bytes_of_row) + uint64_t(at.byte));
        }
      }
      write_eight<kPacks>(g.x + to, value, at.present);
      if (g.signs != nullptr) g.signs[byte] = uint8_t(signs);
      A passed[kBits] = {};
      if (drops) {
#pragma unroll
        for (int j = 0; j < kBits; ++j) passed[j] = (kept >> j & 1) != 0 ? value[j] * scale : A(0);
        write_eight<kPacks>(g.dropped + to, passed, at.present);
        if (g.kept != nullptr) g.kept[byte] = uint8_t(kept);
      }
      if (g.other == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kBits; ++j) value[j] = share * ((of_dropped ? passed[j] : value[j]) + others[i].get(j));
      write_eight<kPacks>(g.mean + to, value, at.present);
    }
  }
}

template <typename T, bool kPacks>
__global__ void __launch_bounds__(kThreads)
    stream_layer_backward_kernel(const StreamLayer<T> g, accumulator_t<T> scale, unsigned lanes, unsigned tiles) {
  using A = accumulator_t<T>;
  constexpr int R = kRowsAtOnce<T>;
  D2NET_SHARED(A, sums, [kThreads][kBits + 1]);
  const Place at(g.d, lanes, tiles);
  const A slope = A(g.slope), share = A(g.share);
  A sum[kBits] = {};
  for (int first = at.group; first < int(kBlockRows); first += at.groups * R) {
    int64_t rows[R];
    bool inside[R];
    unsigned signs[R] = {}, kept[R] = {};
    Eight<T> of_dropped[R] = {}, of_mean[R] = {};
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int step = first + i * at.groups;
      rows[i] = at.present > 0 && step < int(kBlockRows) && at.first_row + step < g.n ? at.first_row + step : -1;
      inside[i] = rows[i] >= 0 && g.mask[rows[i]];
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (!inside[i]) continue;
      const int64_t from = rows[i] * g.d + at.column, byte = rows[i] * at.bytes_of_row + at.byte;
      if (g.grad_dropped != nullptr) of_dropped[i].template read<kPacks>(g.grad_dropped + from, at.present);
      if (g.grad_mean != nullptr) of_mean[i].template read<kPacks>(g.grad_mean + from, at.present);
      signs[i] = g.signs[byte];
      if (g.kept != nullptr) kept[i] = g.kept[byte];
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (rows[i] < 0) continue;
      const int64_t to = rows[i] * g.d + at.column;
      A grad[kBits] = {};
      if (inside[i]) {
        const bool mean_first = g.grad_mean != nullptr && g.mean_of_dropped != 0;
#pragma unroll
        for (int j = 0; j < kBits; ++j) grad[j] = of_dropped[i].get(j);
        if (mean_first) {
#pragma unroll
          for (int j = 0; j < kBits; ++j) grad[j] += share * of_mean[i].get(j);
        }
        if (g.kept != nullptr) {
#pragma unroll
          for (int j = 0; j < kBits; ++j) grad[j] = (kept[i] >> j & 1) != 0 ? scale * grad[j] : A(0);
        }
        if (g.grad_mean != nullptr && !mean_first) {
#pragma unroll
          for (int j = 0; j < kBits; ++j) grad[j] += share * of_mean[i].get(j);
        }
      }
      if (g.grad_residual != nullptr) write_eight<kPacks>(g.grad_residual + to, grad, at.present);
#pragma unroll
      for (int j = 0; j < kBits; ++j) {
        grad[j] = (signs[i] >> j & 1) != 0 ? grad[j] : slope * grad[j];
        sum[j] += grad[j];
      }
      write_eight<kPacks>(g.grad_y + to, grad, at.present);
    }
  }
#pragma unroll
  for (int j = 0; j < kBits; ++j) sums[threadIdx.x][j] = sum[j];
  __syncthreads();
  for (unsigned i = threadIdx.x; i < lanes * kBits; i += kThreads) {
    const int64_t column = int64_t(blockIdx.x % tiles) * lanes * kBits + i;
    A total = 0;
    for (int other = 0; other < at.groups; ++other) total += sums[other * lanes + i / kBits][i % kBits];
    if (column < g.d) g.partial[int64_t(blockIdx.x / tiles) * g.width + column] = total;
  }
}

template <typename A>
__device__ __forceinline__ A sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}

// A block takes kBlockRows rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) class_head_kernel(const ClassHead<T> g) {
  using A = accumulator_t<T>;
  const int64_t first = int64_t(blockIdx.x) * kBlockRows;
  const unsigned c = unsigned(g.c), count = unsigned(min(kBlockRows, g.n - first)) * c;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) {
    const int64_t row = first + i / c, of = i % c, place = first * c + i;
    const bool inside = g.mask[row];
    A tcam = 0;
    for (int64_t s = 0; s < g.streams; ++s) {
      A logit = 0;
      if (inside) {
        logit = (s == 0 ? g.bias_a : g.bias_b)[of];
        for (int64_t j = 0; j < g.k; ++j) {
          const int64_t from = row + (j - g.k / 2) * g.dilation;
          if (from >= 0 && from < g.n) logit += A(to_float(g.products[(s * g.n + from) * g.row + of * g.k + j]));
        }
        tcam += sigmoid(logit);
      }
      (s == 0 ? g.logits_a : g.logits_b)[place] = logit;
    }
    g.tcam[place] = tcam / A(g.streams);
  }
}

// With respect to the logit of a row and class of stream s; 0 in gaps and past the ends.
template <typename T>
__device__ __forceinline__ accumulator_t<T> grad_logit(const ClassHead<T>& g, int64_t s, int64_t row, int64_t of) {
  using A = accumulator_t<T>;
  if (row < 0 || row >= g.n || !g.mask[row]) return 0;
  const int64_t at = row * g.c + of;
  const A* grad_logits = s == 0 ? g.grad_logits_a : g.grad_logits_b;
  A gradient = grad_logits == nullptr ? A(0) : grad_logits[at];
  if (g.grad_tcam != nullptr) {
    const A probability = sigmoid((s == 0 ? g.logits_a : g.logits_b)[at]);
    gradient += g.grad_tcam[at] / A(g.streams) * probability * (1 - probability);
  }
  return gradient;
}

// A block takes kBlockRows rows of a stream.
template <typename T>
__global__ void __launch_bounds__(kThreads) class_head_backward_kernel(const ClassHead<T> g, unsigned blocks) {
  using A = accumulator_t<T>;
  constexpr int kClasses = kThreads / int(kBlockRows);  // at once
  D2NET_SHARED(A, sums, [kBlockRows][kClasses + 1]);
  const int64_t s = blockIdx.x / blocks, block = blockIdx.x % blocks, first = block * kBlockRows;
  const unsigned width = unsigned(g.row), k = unsigned(g.k), count = unsigned(min(kBlockRows, g.n - first)) * width;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) {
    const unsigned place = i % width, of = place / k, j = place % k;
    const int64_t row = first + i / width;
    const A gradient = of < g.c ? grad_logit(g, s, row - (int64_t(j) - g.k / 2) * g.dilation, of) : A(0);
    g.grad_products[(s * g.n + first) * width + i] = from_float<T>(gradient);
  }
  const int row = int(threadIdx.x) / kClasses, of = int(threadIdx.x) % kClasses;
  for (int64_t tile = 0; tile < g.c; tile += kClasses) {
    sums[row][of] = tile + of < g.c ? grad_logit(g, s, first + row, tile + of) : A(0);
    __syncthreads();
    if (row == 0 && tile + of < g.c) {
      A sum = 0;
      for (int other = 0; other < int(kBlockRows); ++other) sum += sums[other][of];
      g.partial[s * g.partial_stride + block * g.width + tile + of] = sum;
    }
    __syncthreads();
  }
}

constexpr int kSumColumns = 32, kSumGroups = kThreads / kSumColumns;

template <typename T>
__global__ void __launch_bounds__(kThreads) bias_sums_kernel(const BiasSums<T> g, unsigned tiles) {
  D2NET_SHARED(T, sums, [kSumGroups][kSumColumns]);
  const int64_t which = blockIdx.x / tiles,
                column = int64_t(blockIdx.x % tiles) * kSumColumns + threadIdx.x % kSumColumns;
  const int group = int(threadIdx.x / kSumColumns);
  const bool present = column < (which % 3 == 2 ? g.c : g.d);
  T sum = 0;
  if (present) {
    const T* const from = g.partial + which * g.blocks * g.width + column;
#pragma unroll 8
    for (int64_t block = group; block < g.blocks; block += kSumGroups) sum += from[block * g.width];
  }
  sums[group][threadIdx.x % kSumColumns] = sum;
  __syncthreads();
  if (group > 0 || !present) return;
  for (int other = 1; other < kSumGroups; ++other) sum += sums[other][threadIdx.x];
  g.sums[which * g.width + column] = sum;
}

int64_t row_blocks(int64_t n) { return (n + kBlockRows - 1) / kBlockRows; }

template <typename T>
bool fits(const StreamLayer<T>& g) {
  constexpr int N = kBytePack<T>;
  return g.d % kBits == 0 && fits_packs_of<N>(g.d, g.y, g.residual, g.x, g.dropped, g.other) &&
         fits_packs_of<N>(g.d, g.mean, g.grad_dropped, g.grad_mean, g.grad_y, g.grad_residual) &&
         fits_packs_of<kBytePack<accumulator_t<T>>>(g.d, g.bias);
}

// Threads of a row, and tiles of so many.
struct Tiling {
  int64_t lanes = kLeastLanes, tiles;

  explicit Tiling(int64_t d) {
    const int64_t bytes = std::max<int64_t>(1, (d + kBits - 1) / kBits);
    while (lanes < 64 && lanes < bytes) lanes *= 2;
    tiles = (bytes + lanes - 1) / lanes;
  }
};

}  // namespace

template <typename T>
void stream_layer(const StreamLayer<T>& g, int device, void* stream) {
  const Tiling by(g.d);
  Stream("stream_layer", device, stream)
      .launch(fits(g) ? stream_layer_kernel<T, true> : stream_layer_kernel<T, false>, row_blocks(g.n) * by.tiles,
              kThreads, 0, g, math::Dropout(g.dropout), unsigned(by.lanes), unsigned(by.tiles));
}

template <typename T>
void stream_layer_backward(const StreamLayer<T>& g, int device, void* stream) {
  using A = accumulator_t<T>;
  const Tiling by(g.d);
  const A scale = g.kept == nullptr ? A(1) : A(math::Dropout(g.dropout).scale);
  Stream("stream_layer_backward", device, stream)
      .launch(fits(g) ? stream_layer_backward_kernel<T, true> : stream_layer_backward_kernel<T, false>,
              row_blocks(g.n) * by.tiles, kThreads, 0, g, scale, unsigned(by.lanes), unsigned(by.tiles));
}

template <typename T>
void class_head(const ClassHead<T>& g, int device, void* stream) {
  Stream("class_head", device, stream).launch(class_head_kernel<T>, row_blocks(g.n), kThreads, 0, g);
}

template <typename T>
void class_head_backward(const ClassHead<T>& g, int device, void* stream) {
  Stream("class_head_backward", device, stream)
      .launch(class_head_backward_kernel<T>, g.streams * row_blocks(g.n), kThreads, 0, g, unsigned(row_blocks(g.n)));
}

template <typename T>
void bias_sums(const BiasSums<T>& g, int device, void* stream) {
  const int64_t tiles = (g.width + kSumColumns - 1) / kSumColumns;
  Stream("bias_sums", device, stream)
      .launch(bias_sums_kernel<T>, g.streams * 3 * tiles, kThreads, 0, g, unsigned(tiles));
}

D2NET_INSTANTIATE_CUDA_HALF(stream_layer, StreamLayer)
D2NET_INSTANTIATE_CUDA_HALF(stream_layer_backward, StreamLayer)
D2NET_INSTANTIATE_CUDA_HALF(class_head, ClassHead)
D2NET_INSTANTIATE_CUDA_HALF(class_head_backward, ClassHead)
D2NET_INSTANTIATE_CUDA(bias_sums, BiasSums)

}  // namespace d2net::cuda
