// Attention-weighted pooling of embeddings over time into one foreground and one background vector (Eq. 2).
//
// Foreground weights are lambda where lambda > threshold, background weights 1 - lambda where
// 1 - lambda > background_threshold, both in the type of attention; a NaN lambda selects nothing. The embedding of a
// snippet on neither side is not read. Sums of half precision are accumulator_t, as they may exceed the largest
// float16.
#pragma once

#include "math/rows.h"
#include "operator.h"

namespace d2net {

template <typename T>
struct AttentionPool {
  using A = accumulator_t<T>;
  static constexpr int kSettings = 2;
  double threshold, background_threshold;
  int64_t mean;            // whether sums are divided by the sum of their weights
  const T* x;              // (b, t, d)
  const A* attention;      // (b, t), lambda
  const int64_t* lengths;  // (b), clamped to [0, t]; null: all t
  int64_t b, t, d;

  A *x_fg, *x_bg;               // (b, d)
  bool *valid_fg, *valid_bg;    // (b): whether the sum of the weights is above 0
  A* partial = nullptr;         // CUDA: scratch (b, ceil(t / kPoolChunk), 2, d) ...
  unsigned* arrived = nullptr;  // ... and (b, d / 32 + 1)

  // Backward: grad_x or grad_attention may be null. x and, with `mean`, x_fg and x_bg are read for grad_attention only.
  const A *grad_fg = nullptr, *grad_bg = nullptr;  // (b, d)
  T* grad_x = nullptr;                             // (b, t, d)
  A* grad_attention = nullptr;                     // (b, t)
  A* terms = nullptr;                              // CUDA, with `mean`: scratch (b, 2, 2)

  Rows rows = {};  // (b, t, ...) are (n, ...) in a packed batch
};

D2NET_DECLARE(attention_pool, AttentionPool)
D2NET_DECLARE(attention_pool_backward, AttentionPool)

namespace cuda {

constexpr int64_t kPoolChunk = 32;  // snippets; d2net/ops/attention_pool.py knows it too

}  // namespace cuda

}  // namespace d2net
