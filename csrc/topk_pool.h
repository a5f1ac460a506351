// Mean of the k largest values over time, and its gradient.
#pragma once

#include <cstdint>

#include "float16.h"

namespace d2net {

namespace cpu {

// x (b, t, c) row-major -> pooled (b, c), the mean of the k largest of the first length values of each column,
// k = max(1, ceil(length / divisor)); 0 for length 0. lengths (b) is clamped to [0, t]; null: all t. t < 2^31.
//
// kth, last (b, c) tell the backward which were taken: value and time index of the k-th entry when the column is
// ordered by falling value (NaN first, -0 equal to +0) and equals by rising time; (0, -1) for length 0.
template <typename T>
void topk_pool(const T* x, const int64_t* lengths, int64_t b, int64_t t, int64_t c, int64_t divisor, T* pooled, T* kth,
               int32_t* last, int threads);

// grad (b, c) of pooled -> grad_x (b, t, c): grad / k where an entry was taken, else 0.
template <typename T>
void topk_pool_backward(const T* grad, const T* x, const int64_t* lengths, const T* kth, const int32_t* last, int64_t b,
                        int64_t t, int64_t c, int64_t divisor, T* grad_x, int threads);

}  // namespace cpu

// The same on `device`, enqueued on `stream` (a cudaStream_t); every pointer is device memory. Throws
// std::runtime_error when a launch fails.
namespace cuda {

template <typename T>
void topk_pool(const T* x, const int64_t* lengths, int64_t b, int64_t t, int64_t c, int64_t divisor, T* pooled,
               accumulator_t<T>* kth, int32_t* last, int device, void* stream);

template <typename T>
void topk_pool_backward(const T* grad, const T* x, const int64_t* lengths, const accumulator_t<T>* kth,
                        const int32_t* last, int64_t b, int64_t t, int64_t c, int64_t divisor, T* grad_x, int device,
                        void* stream);

}  // namespace cuda

}  // namespace d2net
