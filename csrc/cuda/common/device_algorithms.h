// Sort, scan and selection over whole arrays: CUB on the device, plain loops under D2NET_SIMT. All are enqueued on the
// stream, take their scratch memory from the caller (`*_scratch_bytes` says how much) and read inputs that must not
// overlap outputs.
#pragma once

#include "cuda/common/device.h"

#ifdef D2NET_SIMT
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_select.cuh>
#endif

namespace d2net::cuda {

#ifdef D2NET_SIMT

// What CUB asks for depends on the chip; any number will do here as long as a caller who gives less is caught.
inline int64_t imitated_scratch_bytes(int64_t n) { return 256 + 16 * n; }
inline void use_scratch(void* scratch, int64_t bytes, int64_t n) {
  if (bytes < imitated_scratch_bytes(n)) throw std::runtime_error("too little scratch memory for " + std::to_string(n));
  std::memset(scratch, 0xff, bytes);
}

template <typename K, typename V>
int64_t sort_pairs_scratch_bytes(const Stream&, int64_t n) {
  return imitated_scratch_bytes(n);
}
// Stable and ascending by bits begin_bit to end_bit (exclusive; default all) of the key, an unsigned integer.
template <typename K, typename V>
void sort_pairs(const Stream&, void* scratch, int64_t scratch_bytes, const K* keys, K* sorted_keys, const V* values,
                V* sorted_values, int64_t n, int begin_bit = 0, int end_bit = 8 * sizeof(K)) {
  static_assert(std::is_unsigned_v<K>, "make ordered unsigned keys");
  if (n == 0) return;
  use_scratch(scratch, scratch_bytes, n);
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t(0));
  const int bits = end_bit - begin_bit;
  const K mask = bits >= int(8 * sizeof(K)) ? K(~K(0)) : K((K(1) << bits) - 1);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return K(keys[a] >> begin_bit & mask) < K(keys[b] >> begin_bit & mask);
  });
  for (int64_t i = 0; i < n; ++i) {
    sorted_keys[i] = keys[order[i]];
    sorted_values[i] = values[order[i]];
  }
}

template <typename T>
int64_t exclusive_sum_scratch_bytes(const Stream&, int64_t n) {
  return imitated_scratch_bytes(n);
}
// out[i] = in[0] + ... + in[i - 1]. T: an integer.
template <typename T>
void exclusive_sum(const Stream&, void* scratch, int64_t scratch_bytes, const T* in, T* out, int64_t n) {
  if (n == 0) return;
  use_scratch(scratch, scratch_bytes, n);
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = sum;
    sum += in[i];
  }
}

template <typename T>
int64_t select_scratch_bytes(const Stream&, int64_t n) {
  return imitated_scratch_bytes(n);
}
// The in[i] with flags[i] != 0, in order; their number goes to *count (device memory).
template <typename T>
void select(const Stream&, void* scratch, int64_t scratch_bytes, const T* in, const uint8_t* flags, T* out,
            int64_t* count, int64_t n) {
  use_scratch(scratch, scratch_bytes, n);
  *count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (flags[i]) out[(*count)++] = in[i];
  }
}

#else

template <typename K, typename V>
int64_t sort_pairs_scratch_bytes(const Stream& on, int64_t n) {
  size_t bytes = 0;
  on.check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, (const K*)nullptr, (K*)nullptr, (const V*)nullptr,
                                           (V*)nullptr, n),
           "asking for the scratch memory of a sort");
  return int64_t(bytes);
}
template <typename K, typename V>
void sort_pairs(const Stream& on, void* scratch, int64_t scratch_bytes, const K* keys, K* sorted_keys, const V* values,
                V* sorted_values, int64_t n, int begin_bit = 0, int end_bit = 8 * sizeof(K)) {
  if (n == 0) return;
  size_t bytes = size_t(scratch_bytes);
  on.check(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, sorted_keys, values, sorted_values, n, begin_bit,
                                           end_bit, on.raw()),
           "sorting " + std::to_string(n) + " pairs");
}

template <typename T>
int64_t exclusive_sum_scratch_bytes(const Stream& on, int64_t n) {
  size_t bytes = 0;
  on.check(cub::DeviceScan::ExclusiveSum(nullptr, bytes, (const T*)nullptr, (T*)nullptr, n),
           "asking for the scratch memory of a scan");
  return int64_t(bytes);
}
template <typename T>
void exclusive_sum(const Stream& on, void* scratch, int64_t scratch_bytes, const T* in, T* out, int64_t n) {
  if (n == 0) return;
  size_t bytes = size_t(scratch_bytes);
  on.check(cub::DeviceScan::ExclusiveSum(scratch, bytes, in, out, n, on.raw()),
           "scanning " + std::to_string(n) + " elements");
}

template <typename T>
int64_t select_scratch_bytes(const Stream& on, int64_t n) {
  size_t bytes = 0;
  on.check(cub::DeviceSelect::Flagged(nullptr, bytes, (const T*)nullptr, (const uint8_t*)nullptr, (T*)nullptr,
                                      (int64_t*)nullptr, n),
           "asking for the scratch memory of a selection");
  return int64_t(bytes);
}
template <typename T>
void select(const Stream& on, void* scratch, int64_t scratch_bytes, const T* in, const uint8_t* flags, T* out,
            int64_t* count, int64_t n) {
  size_t bytes = size_t(scratch_bytes);
  on.check(cub::DeviceSelect::Flagged(scratch, bytes, in, flags, out, count, n, on.raw()),
           "selecting from " + std::to_string(n) + " elements");
}

#endif

}  // namespace d2net::cuda
