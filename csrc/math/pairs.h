// The pairs of embeddings that Eq. 3 compares, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/host_device.h"

namespace d2net {

// The pairs whose cosines give w_fb, w_fg and w_bg, in the order in which arrays have them.
constexpr int kFb = 0;  // x_fg with another's x_bg
constexpr int kFg = 1;  // x_fg with another's x_fg
constexpr int kBg = 2;  // x_bg with another's x_bg
constexpr int kPairs = 3;

// Rows of what the forward of Eq. 3 and 4 saves for its backward, (8, b): per pair the gradient of a recording's term
// with respect to the cosine; per pair the cosine; 1 / |x_fg| and 1 / |x_bg|.
constexpr int kGradCosine = 0, kCosine = 3, kInverseNormFg = 6, kInverseNormBg = 7, kPairsSaved = 8;

// Rows of x (2, b, d), which holds x_fg and x_bg; x is -1 where there is no pair.
struct Pair {
  int64_t x, other;
};

struct Pairs {
  const int64_t *partner, *source;  // see loss.h; partner null: no pairs
  const bool* valid;                // (2, b)
  int64_t b;

  static D2NET_HD bool x_is_foreground(int pair) { return pair != kBg; }
  static D2NET_HD bool other_is_foreground(int pair) { return pair == kFg; }

  D2NET_HD Pair of(int pair, int64_t i) const {
    const int64_t to = partner[pair * b + i], from = pair == kFb && source != nullptr ? source[i] : i;
    if (to < 0 || to >= b || from < 0 || from >= b || (source == nullptr && to == i)) return {-1, -1};
    const Pair rows = {x_is_foreground(pair) ? from : b + from, other_is_foreground(pair) ? to : b + to};
    return valid[rows.x] && valid[rows.other] ? rows : Pair{-1, -1};
  }
};

// 1 / |x| from the sum of x's squares, 0 for a zero vector: its cosines are 0 and have no gradient. The epsilon keeps
// the gradients of very short vectors in range.
D2NET_HD inline double inverse_norm(double squares) { return squares == 0 ? 0 : 1 / std::sqrt(squares + 1e-12); }

// The gradient of a cosine with respect to one of its vectors: `other` times the other vector plus `own` times itself.
struct CosineGradient {
  double other, own;
};

// grad times the gradient of cos(u, v) with respect to u, which is v / (|u| |v|) - cos u / |u|^2.
D2NET_HD inline CosineGradient cosine_gradient(double grad, double cosine, double inverse_u, double inverse_v) {
  return {grad * inverse_u * inverse_v, -grad * cosine * inverse_u * inverse_u};
}

}  // namespace d2net
