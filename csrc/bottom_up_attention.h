// Bottom-up attention lambda'(t) = 0.5 (1 - cos(x(t), x_ref)) (Eq. 8).
#pragma once

#include "math/rows.h"
#include "operator.h"

namespace d2net {

// Sums are in double on a CPU and in accumulator_t on CUDA; vectors whose squared norm is out of range of that type are
// scaled first. NaN propagates.
template <typename T>
struct BottomUpAttention {
  using A = accumulator_t<T>;
  static constexpr int kSettings = 0;
  const T* x;              // (b, t, d)
  const A* x_ref;          // (d)
  const int64_t* lengths;  // (b), clamped to [0, t], later snippets are not read; null: all t
  int64_t b, t, d;
  A* attention;  // (b, t), 0.5 where either vector is zero and past a length
  A* norms;  // (b, t), |x(t)| for the backward, 0 where attention does not depend on x(t); null on a CPU: not computed
  Rows rows = {};  // (b, t, ...) are (n, ...) in a packed batch
};

D2NET_DECLARE(bottom_up_attention, BottomUpAttention)

}  // namespace d2net
