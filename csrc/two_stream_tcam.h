// Two streams of logits to the temporal class activation map (TCAM), its maximum over classes and its top-k mean. In
// half precision the maximum and the selection are those of the rounded TCAM.
#pragma once

#include "topk_pool.h"

namespace d2net {

D2NET_DECLARE(tcam_pool, TopkPool)  // its backward is that of topk_pool

template <typename T>
struct TwoStreamTcam {
  static constexpr int kSettings = 0;
  TopkPool<T> pool;                        // of x = tcam; without grad_x
  const T *logits_a, *logits_b;            // (b, t, c)
  T* tcam;                                 // (b, t, c): (sigmoid(logits_a) + sigmoid(logits_b)) / 2, 0 past a length
  T *grad_a = nullptr, *grad_b = nullptr;  // backward: (b, t, c)
};

D2NET_DECLARE(two_stream_tcam, TwoStreamTcam)
D2NET_DECLARE(two_stream_tcam_backward, TwoStreamTcam)

}  // namespace d2net
