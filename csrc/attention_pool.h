// Attention-weighted pooling of embeddings over time into one foreground and one background vector (Eq. 2).
//
// Foreground weights are lambda where lambda > threshold, background weights 1 - lambda where
// 1 - lambda > background_threshold, both in T; a NaN lambda selects nothing. Lengths are clamped to [0, t], null
// means all t. A snippet that is on neither side is not read, whatever its embedding holds.
#pragma once

#include <cstdint>

namespace d2net::cpu {

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

}  // namespace d2net::cpu
