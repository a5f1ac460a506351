// The backward of attention_pool row by row, for the loss, which has more to do with each.
#pragma once

#include <cstdint>
#include <vector>

namespace d2net::cpu {

// What one side of one recording hands to the gradients: with `mean`, pooled = scale * (weighted sum), and the quotient
// rule takes shift = pooled . grad off every x . grad.
template <typename T>
struct PoolSide {
  const T* grad;
  T scale, shift;
};

// Arguments as of attention_pool_backward; x null: gradients of attention are not wanted.
template <typename T>
class AttentionPoolGradient {
 public:
  AttentionPoolGradient(const T* x, const T* attention, const int64_t* lengths, const T* x_fg, const T* x_bg,
                        const T* grad_fg, const T* grad_bg, int64_t b, int64_t t, int64_t d, double threshold,
                        double background_threshold, bool mean);

  // Writes the gradient of x(t), `row` counting through all recordings, unless `to` is null; returns that of its
  // attention.
  T row(int64_t row, T* to) const;

 private:
  const T *x_, *attention_;
  const int64_t* lengths_;
  const int64_t t_, d_;
  const T over_, background_over_;
  std::vector<PoolSide<T>> fg_, bg_;
};

}  // namespace d2net::cpu
