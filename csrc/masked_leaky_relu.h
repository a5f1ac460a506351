// Leaky ReLU within the length of every recording, 0 past it, and its gradient.
#pragma once

#include "operator.h"

namespace d2net {

template <typename T>
struct MaskedLeakyRelu {
  static constexpr int kSettings = 1;
  double slope;  // of negative numbers, not below 0
  int64_t b, t, d;
  int64_t time_last;       // 0: x is (b, t, d); 1: (b, d, t)
  const int64_t* lengths;  // (b), clamped to [0, t]; null: all t
  const T* x;
  T* y;  // x > 0 ? x : slope * x

  // Backward: grad_y and grad_x in the order of y, of which the sign is read.
  const T* grad_y = nullptr;
  T* grad_x = nullptr;
};

D2NET_DECLARE(masked_leaky_relu, MaskedLeakyRelu)
D2NET_DECLARE(masked_leaky_relu_backward, MaskedLeakyRelu)

// Memory as rows that end at one length each: (t, d) of a recording, or (t) of one of its features.
struct MaskedRows {
  int64_t size, of_recording;  // elements of a row, rows of a recording
  int64_t step;                // elements of a row that belong to one snippet

  template <typename T>
  explicit MaskedRows(const MaskedLeakyRelu<T>& x)
      : size(x.time_last != 0 ? x.t : x.t * x.d), of_recording(x.time_last != 0 ? x.d : 1), step(size / x.t) {}
};

}  // namespace d2net
