// Bottom-up attention lambda'(t) = 0.5 (1 - cos(x(t), x_ref)) (Eq. 8).
#pragma once

#include <cstdint>

#include "float16.h"

namespace d2net {

namespace cpu {

// x (b, t, d) and reference (d) -> attention (b, t), 0.5 where either vector is zero, and norms (b, t) of the x(t) for
// the backward: 0 where attention does not depend on x(t); null: not wanted. Lengths are clamped to [0, t], null means
// all t; snippets past a length are not read and get 0.5. Sums are in double, and vectors whose squared norm a double
// cannot hold are scaled first. NaN propagates.
template <typename T>
void bottom_up_attention(const T* x, const T* reference, const int64_t* lengths, int64_t b, int64_t t, int64_t d,
                         T* attention, T* norms, int threads);

}  // namespace cpu

namespace cuda {

// The same on `device`, enqueued on `stream` (a cudaStream_t); every pointer is device memory. Sums are in float for
// float and half precision, and vectors whose squared norm a float cannot hold are scaled first.
// Throws std::runtime_error when a launch fails.
template <typename T>
void bottom_up_attention(const T* x, const accumulator_t<T>* reference, const int64_t* lengths, int64_t b, int64_t t,
                         int64_t d, accumulator_t<T>* attention, accumulator_t<T>* norms, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
