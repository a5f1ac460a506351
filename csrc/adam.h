// One step of Adam on all weights of a network that computes in bfloat16, which gets its copies of them on the way.
#pragma once

#include "operator.h"

namespace d2net {

constexpr int kMostWeights = 12;

// T: of the weights. Arrays have `count` members that are used; the moments and gradients lie as their weight does.
template <typename T>
struct AdamStep {
  static constexpr int kSettings = 5;
  double lr, beta_1, beta_2, epsilon, weight_decay;
  int64_t count;
  const T* step;  // (1): steps taken, this one included

  // A weight is (size / (k * width), k, width).
  int64_t size[kMostWeights], k[kMostWeights], width[kMostWeights];
  T* weight[kMostWeights];
  const T* grad[kMostWeights];
  T *average[kMostWeights], *square[kMostWeights];
  bfloat16* copy[kMostWeights];    // as the weight; null: none
  bfloat16* turned[kMostWeights];  // (k, size / (k * width), width), k from the last one down; null: none
};

namespace cuda {

template <typename T>
void adam_step(const AdamStep<T>&, int device, void* stream);

}  // namespace cuda
}  // namespace d2net
