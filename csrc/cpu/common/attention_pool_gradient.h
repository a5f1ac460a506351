// The backward of attention_pool, row by row, so that the loss can do more with each row.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_pool.h"

namespace d2net::cpu {

// One side of one recording in the backward. With `mean`, pooled = scale * (weighted sum), and the quotient rule
// subtracts shift = pooled . grad from every x . grad.
template <typename T>
struct PoolSide {
  const T* grad;
  T scale, shift;
};

template <typename T>
class AttentionPoolGradient {
 public:
  // x: inputs, results and the gradients of results; x.x null: gradients of attention are not computed.
  explicit AttentionPoolGradient(const AttentionPool<T>& x);

  // Writes grad_x (d) of one row within the length of recording i, unless it is null, and returns the gradient with
  // respect to its attention.
  T row(int64_t i, int64_t row, T* grad_x) const;

 private:
  const AttentionPool<T> x_;
  const T threshold_, background_threshold_;
  std::vector<PoolSide<T>> fg_, bg_;
};

}  // namespace d2net::cpu
