// Two streams of logits to the temporal class activation map (TCAM), its maximum over classes and its top-k mean.
#pragma once

#include <cstdint>

#include "float16.h"

namespace d2net {

namespace cpu {

// tcam (b, t, c) row-major -> attention (b, t), the maximum over classes, and peak (b, t), the lowest class that has it
// (NaN is larger than every number; without classes 0 and -1); pooled, kth, last (b, c) as in topk_pool.h. Past a
// length attention is 0 and peak -1. c < 2^31.
template <typename T>
void tcam_pool(const T* tcam, const int64_t* lengths, int64_t b, int64_t t, int64_t c, int64_t divisor, T* attention,
               int32_t* peak, T* pooled, T* kth, int32_t* last, int threads);

// Gradients of attention and pooled -> grad_tcam (b, t, c). A null gradient is 0.
template <typename T>
void tcam_pool_backward(const T* grad_attention, const T* grad_pooled, const T* tcam, const int64_t* lengths,
                        const int32_t* peak, const T* kth, const int32_t* last, int64_t b, int64_t t, int64_t c,
                        int64_t divisor, T* grad_tcam, int threads);

// tcam = (sigmoid(logits_a) + sigmoid(logits_b)) / 2, 0 past a length, and tcam_pool of it.
template <typename T>
void two_stream_tcam(const T* logits_a, const T* logits_b, const int64_t* lengths, int64_t b, int64_t t, int64_t c,
                     int64_t divisor, T* tcam, T* attention, int32_t* peak, T* pooled, T* kth, int32_t* last,
                     int threads);

// Gradients of tcam, attention and pooled -> grad_a, grad_b (b, t, c). A null gradient is 0.
template <typename T>
void two_stream_tcam_backward(const T* grad_tcam, const T* grad_attention, const T* grad_pooled, const T* logits_a,
                              const T* logits_b, const T* tcam, const int64_t* lengths, const int32_t* peak,
                              const T* kth, const int32_t* last, int64_t b, int64_t t, int64_t c, int64_t divisor,
                              T* grad_a, T* grad_b, int threads);

}  // namespace cpu

// The same on `device`, enqueued on `stream` (a cudaStream_t); every pointer is device memory. In half precision the
// maximum and the selection are those of the rounded TCAM. Throws std::runtime_error when a launch fails.
namespace cuda {

template <typename T>
void tcam_pool(const T* tcam, const int64_t* lengths, int64_t b, int64_t t, int64_t c, int64_t divisor, T* attention,
               int32_t* peak, T* pooled, accumulator_t<T>* kth, int32_t* last, int device, void* stream);

template <typename T>
void tcam_pool_backward(const T* grad_attention, const T* grad_pooled, const T* tcam, const int64_t* lengths,
                        const int32_t* peak, const accumulator_t<T>* kth, const int32_t* last, int64_t b, int64_t t,
                        int64_t c, int64_t divisor, T* grad_tcam, int device, void* stream);

template <typename T>
void two_stream_tcam(const T* logits_a, const T* logits_b, const int64_t* lengths, int64_t b, int64_t t, int64_t c,
                     int64_t divisor, T* tcam, T* attention, int32_t* peak, T* pooled, accumulator_t<T>* kth,
                     int32_t* last, int device, void* stream);

template <typename T>
void two_stream_tcam_backward(const T* grad_tcam, const T* grad_attention, const T* grad_pooled, const T* logits_a,
                              const T* logits_b, const T* tcam, const int64_t* lengths, const int32_t* peak,
                              const accumulator_t<T>* kth, const int32_t* last, int64_t b, int64_t t, int64_t c,
                              int64_t divisor, T* grad_a, T* grad_b, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
