// Mean of the k largest values over time and, for tcam_pool, the maximum over classes; and their backward.
#pragma once

#include "math/rows.h"
#include "operator.h"

namespace d2net {

// Of topk_pool and of tcam_pool, which alone has attention and its gradient.
template <typename T>
struct TopkPool {
  static constexpr int kSettings = 0;
  const T* x;              // (b, t, c) row-major; t and c below 2^31
  const int64_t* lengths;  // (b), clamped to [0, t]; null: all t
  int64_t b, t, c, divisor;

  T* attention;     // (b, t), the maximum over classes (NaN is larger than every number); 0 past a length
  int32_t* argmax;  // (b, t), the lowest class of that value; -1 past a length and without classes
  T* pooled;        // (b, c), mean of the k = max(1, ceil(length / divisor)) largest of a column; 0 for length 0
  // (b, c), for the backward: value and time index of the k-th entry when the column is ordered by falling value (NaN
  // first, -0 equal to +0) and equals by rising time; (0, -1) for length 0.
  accumulator_t<T>* kth;
  int32_t* last;

  // Backward: gradients with respect to attention and pooled, null for 0, and to x.
  const T *grad_attention = nullptr, *grad_pooled = nullptr;
  T* grad_x = nullptr;  // (b, t, c), 0 past a length

  Rows rows = {};  // (b, t, ...) are (n, ...) in a packed batch
};

D2NET_DECLARE(topk_pool, TopkPool)
D2NET_DECLARE(tcam_pool, TopkPool)
D2NET_DECLARE(topk_pool_backward, TopkPool)  // of both

}  // namespace d2net
