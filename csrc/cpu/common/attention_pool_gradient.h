// The backward of attention_pool row by row, for the loss, which has more to do with each.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_pool.h"

namespace d2net::cpu {

// What one side of one recording hands to the gradients: with `mean`, pooled = scale * (weighted sum), and the quotient
// rule takes shift = pooled . grad off every x . grad.
template <typename T>
struct PoolSide {
  const T* grad;
  T scale, shift;
};

template <typename T>
class AttentionPoolGradient {
 public:
  // Of inputs, results and gradients that come in; x.x null: gradients of attention are not wanted.
  explicit AttentionPoolGradient(const AttentionPool<T>& x);

  // Writes the gradient of x(t), `row` counting through all recordings, unless `to` is null; returns that of its
  // attention.
  T row(int64_t row, T* to) const;

 private:
  const AttentionPool<T> x_;
  const T over_, background_over_;
  std::vector<PoolSide<T>> fg_, bg_;
};

}  // namespace d2net::cpu
