// Attention-weighted pooling of embeddings over time into one foreground and one background vector (Eq. 2).
//
// Foreground weights are lambda where lambda > threshold, background weights 1 - lambda where
// 1 - lambda > background_threshold, both in the type of attention; a NaN lambda selects nothing. Lengths are clamped
// to [0, t], null means all t. A snippet that is on neither side is not read, whatever its embedding holds.
#pragma once

#include <cstdint>

#include "float16.h"

namespace d2net {

namespace cpu {

// x (b, t, d), attention (b, t) -> x_fg, x_bg (b, d): weighted sums, with `mean` divided by the sum of the weights;
// valid_fg, valid_bg (b): whether that sum is above 0.
template <typename T>
void attention_pool(const T* x, const T* attention, const int64_t* lengths, int64_t b, int64_t t, int64_t d,
                    double threshold, double background_threshold, bool mean, T* x_fg, T* x_bg, bool* valid_fg,
                    bool* valid_bg, int threads);

// Gradients from those of x_fg and x_bg, grad_fg and grad_bg (b, d): grad_x (b, t, d) and grad_attention (b, t), either
// null when not wanted. x and, with `mean`, the results x_fg and x_bg are read only for grad_attention.
template <typename T>
void attention_pool_backward(const T* x, const T* attention, const int64_t* lengths, const T* x_fg, const T* x_bg,
                             const T* grad_fg, const T* grad_bg, int64_t b, int64_t t, int64_t d, double threshold,
                             double background_threshold, bool mean, T* grad_x, T* grad_attention, int threads);

}  // namespace cpu

// The same on `device`, enqueued on `stream` (a cudaStream_t); every pointer is device memory. Attention, the sums
// (which may be larger than the largest float16) and the gradients of both are in the type that sums are kept in.
// Throws std::runtime_error when a launch fails.
namespace cuda {

constexpr int64_t kPoolChunk = 32;  // snippets; d2net/ops/attention_pool.py knows it too

// Scratch: partial (b, chunks, 2, d), where chunks = ceil(t / kPoolChunk), and arrived (b, d / 32 + 1).
template <typename T>
void attention_pool(const T* x, const accumulator_t<T>* attention, const int64_t* lengths, int64_t b, int64_t t,
                    int64_t d, double threshold, double background_threshold, bool mean, accumulator_t<T>* partial,
                    unsigned* arrived, accumulator_t<T>* x_fg, accumulator_t<T>* x_bg, bool* valid_fg, bool* valid_bg,
                    int device, void* stream);

// Scratch: terms (b, 2, 2), used with `mean` only.
template <typename T>
void attention_pool_backward(const T* x, const accumulator_t<T>* attention, const int64_t* lengths,
                             const accumulator_t<T>* x_fg, const accumulator_t<T>* x_bg,
                             const accumulator_t<T>* grad_fg, const accumulator_t<T>* grad_bg, int64_t b, int64_t t,
                             int64_t d, double threshold, double background_threshold, bool mean,
                             accumulator_t<T>* terms, T* grad_x, accumulator_t<T>* grad_attention, int device,
                             void* stream);

}  // namespace cuda

}  // namespace d2net
