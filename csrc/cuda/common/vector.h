// Neighbouring elements that a thread reads or writes at once: in one access of up to 16 bytes.
#pragma once

#include "cuda/common/device.h"

namespace d2net::cuda {

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

// Through a type that is one word to the compiler: of a struct of halves it makes a store for every two of them.
template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& values) {
#ifndef D2NET_SIMT
  if constexpr (N * sizeof(T) == 16) {
    uint4 word;
    memcpy(&word, &values, sizeof word);
    *reinterpret_cast<uint4*>(to) = word;
    return;
  } else if constexpr (N * sizeof(T) == 8) {
    uint2 word;
    memcpy(&word, &values, sizeof word);
    *reinterpret_cast<uint2*>(to) = word;
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(to) = values;
}

// Elements that a thread takes at once: as many as 16 bytes hold of what T is summed in.
template <typename T>
constexpr int kPackOf = int(16 / sizeof(accumulator_t<T>));

// As many as 16 bytes hold of T itself: where rows are long, and memory rather than registers is the limit.
template <typename T>
constexpr int kWidePackOf = int(16 / sizeof(T));

// Whether every row of width d can be moved in packs of N from each of the given addresses (null: not used).
template <int N, typename... T>
bool fits_packs_of(int64_t d, const T*... rows) {
  return d % N == 0 && ((reinterpret_cast<std::uintptr_t>(rows) % alignof(Pack<T, N>) == 0) && ...);
}
template <typename... T>
bool fits_packs(int64_t d, const T*... rows) {
  return (fits_packs_of<kPackOf<T>>(d, rows) && ...);
}

// Threads of a block of whole warps, at most `limit`, that covers n packs if it can.
inline int64_t threads_for(int64_t n, int64_t limit) {
  const int64_t whole_warps = (n + 31) / 32 * 32;
  return whole_warps < 32 ? 32 : whole_warps > limit ? limit : whole_warps;
}

}  // namespace d2net::cuda
