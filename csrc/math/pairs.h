// The pairs of embeddings that Eq. 3 compares, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/host_device.h"

namespace d2net {

// Rows of what the forward of Eq. 3 and 4 leaves to its backward, (8, b): the gradient of a recording's term to its
// cosines of w_fb, w_fg and w_bg; those cosines; 1 / |x_fg| and 1 / |x_bg|.
constexpr int kToCosine = 0, kCosine = 3, kInverseNorm = 6, kPairsSaved = 8;

// Rows of x (2, b, d), which holds x_fg and x_bg; x is -1 where there is no pair.
struct Pair {
  int64_t x, other;
};

struct Pairs {
  const int64_t *partner, *source;  // see loss.h; partner null: no pairs
  const bool* valid;                // (2, b)
  int64_t b;

  // Whether the two are foreground embeddings. kind: 0 for w_fb (x_fg with x~_bg), 1 for w_fg, 2 for w_bg.
  static D2NET_HD bool x_is_foreground(int kind) { return kind < 2; }
  static D2NET_HD bool other_is_foreground(int kind) { return kind == 1; }

  D2NET_HD Pair of(int kind, int64_t i) const {
    const int64_t to = partner[kind * b + i], from = kind == 0 && source != nullptr ? source[i] : i;
    if (to < 0 || to >= b || from < 0 || from >= b || (source == nullptr && to == i)) return {-1, -1};
    const Pair rows = {x_is_foreground(kind) ? from : b + from, other_is_foreground(kind) ? to : b + to};
    return valid[rows.x] && valid[rows.other] ? rows : Pair{-1, -1};
  }
};

// 1 / |x| from the sum of x's squares, 0 for a zero vector: its cosines are 0 and have no gradient. The epsilon keeps
// the gradients of very short vectors in range.
D2NET_HD inline double inverse_norm(double squares) { return squares == 0 ? 0 : 1 / std::sqrt(squares + 1e-12); }

// What scale the embedding of recording r is multiplied with in the gradient of a cosine to one of its two vectors.
struct Share {
  double other, own;
};

// Gradient of cos(u, v) to u, given 1 / |u| and 1 / |v|: v / (|u| |v|) - cos u / |u|^2.
D2NET_HD inline Share cosine_gradient(double by, double cosine, double u, double v) {
  return {by * u * v, -by * cosine * u * u};
}

}  // namespace d2net
