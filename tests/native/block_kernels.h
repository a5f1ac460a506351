// Kernels that try csrc/cuda/common/device.h, block.h and device_algorithms.h.
#pragma once

#include <cstdint>

#include "float16.h"

namespace d2net::cuda {

// Per block of `threads` rows: sum, maximum and (n) exclusive sums of x (blocks * threads).
void block_results(const int64_t* x, int64_t blocks, int64_t threads, int64_t* sum, int64_t* max, int64_t* before);

// Per warp of one block: ballot of x > 0, the value of the lane `by` below, and any and all of the upper half-warp.
void warp_results(const int* x, int64_t threads, int by, unsigned* ballot, int* below, int* any, int* all);

// counts[x[i]] += 1, in shared memory (bins numbers, dynamic) and then in counts; returns on how many threads x is odd.
void histogram(const int* x, int64_t n, int bins, unsigned* counts, int* odd);

void convert(const float16* x, int64_t n, float* y, float16* back);
void convert(const bfloat16* x, int64_t n, float* y, bfloat16* back);
void round_to_half(const float* x, int64_t n, float16* y);

// keys ascending (stable) with their values; then values where keep, and the exclusive sum of values.
void algorithms(const uint64_t* keys, const int64_t* values, const uint8_t* keep, int64_t n, uint64_t* sorted_keys,
                int64_t* sorted_values, int64_t* selected, int64_t* count, int64_t* sums, void* scratch,
                int64_t scratch_bytes);
int64_t algorithms_scratch_bytes(int64_t n);

void launch_nothing(int64_t grid_x, int64_t grid_y, int64_t block, int64_t shared_bytes);

}  // namespace d2net::cuda
