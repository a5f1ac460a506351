// What surrounds the products of the network (Fig. 2), one pass each way: bias, gap rows, leaky ReLU, residual and
// dropout after a convolution; class logits and TCAM after the products of the classifier.
#pragma once

#include "operator.h"

namespace d2net {

constexpr int64_t kBitsOf = 8;      // elements of a row that one byte of signs, or of kept, tells of
constexpr int64_t kBlockRows = 16;  // rows of one partial sum of the bias' gradient

// Rows n, some of them gaps between recordings, which are 0.
template <typename T>
struct StreamLayer {
  using A = accumulator_t<T>;
  static constexpr int kSettings = 3;
  double slope, dropout;  // of negative numbers; share of dropped ones
  double share;           // of x in the mean over streams: 1 or 1/2
  int64_t n, d, stream;
  int64_t mean_of_dropped;  // whether the mean is of what passed the dropout
  const bool* mask;         // (n): whether a row belongs to a recording
  const A* bias;            // (d)
  const T* y;               // (n, d): the convolution; rows of gaps are not read
  const T* residual;        // (n, d); null: none
  const int64_t* seed;      // (1): of the dropout, to which `stream` is added; null: none
  const int64_t* numbers;   // (n): of the rows for the dropout, any; null: 0 ... n - 1
  T* x;                     // (n, d), may be y: residual + leaky ReLU of y + bias
  T* dropped;               // (n, d): x after the dropout; null without
  const T* other;           // (n, d): of the other stream; null: no mean
  T* mean;                  // (n, d)
  uint8_t *signs, *kept;    // (n, ceil(d / 8)): bits of y + bias > 0, and of what passed; kept: null without dropout

  // Backward.
  const T* grad_dropped = nullptr;  // (n, d): of dropped, or of x without dropout; gap rows are not read
  const T* grad_mean = nullptr;     // (n, d); null: none
  T* grad_y = nullptr;              // (n, d), may be grad_dropped
  T* grad_residual = nullptr;       // (n, d); null: not computed
  A* partial = nullptr;             // (ceil(n / kBlockRows), width): sums of grad_y over as many rows
  int64_t width = 0;                // at least d
};

// k taps, `dilation` rows apart: logits[r] = bias + sum over j of products[r + (j - k / 2) dilation, :, j].
template <typename T>
struct ClassHead {
  using A = accumulator_t<T>;
  static constexpr int kSettings = 0;
  int64_t n, c, k, dilation;
  int64_t streams;                // 1 or 2
  int64_t row;                    // numbers of a row of products: c k, and some that are 0, so that rows are aligned
  const bool* mask;               // (n)
  const T* products;              // (streams, n, row), of which (c, k) are used
  const A* bias_a;                // (c)
  const A* bias_b;                // (c)
  A *logits_a, *logits_b, *tcam;  // (n, c): of the streams; the mean of their sigmoids

  // Backward.
  const A *grad_tcam = nullptr, *grad_logits_a = nullptr, *grad_logits_b = nullptr;  // (n, c); null: none
  T* grad_products = nullptr;                                                        // (streams, n, row)
  A* partial = nullptr;  // of stream s from partial + s partial_stride on (ceil(n / kBlockRows), width): the bias'
  int64_t partial_stride = 0, width = 0;
};

// The gradients of all biases from their sums over blocks of rows: partial (streams, 3, blocks, width) -> sums
// (streams, 3, width). Of the third of three, the class head's, c columns are there, of the others d.
template <typename T>
struct BiasSums {
  static constexpr int kSettings = 0;
  int64_t streams, blocks, width, d, c;
  const T* partial;
  T* sums;
};

D2NET_DECLARE(stream_layer, StreamLayer)
D2NET_DECLARE(stream_layer_backward, StreamLayer)
D2NET_DECLARE(class_head, ClassHead)
D2NET_DECLARE(class_head_backward, ClassHead)
D2NET_DECLARE(bias_sums, BiasSums)

}  // namespace d2net
