// The pairs of embeddings that Eq. 3 compares, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/host_device.h"

namespace d2net {

// Recordings of x and x~; x is -1 where there is no pair.
struct Pair {
  int64_t x, other;
};

// kind: 0 for w_fb (x_fg with x~_bg), 1 for w_fg, 2 for w_bg.
D2NET_HD inline Pair pair_of(const int64_t* partner, const int64_t* source, int64_t b, int kind, int64_t i) {
  const int64_t other = partner[kind * b + i], x = kind == 0 && source != nullptr ? source[i] : i;
  const bool exists = other >= 0 && other < b && x >= 0 && x < b;
  return {exists ? x : -1, other};
}

// Whether the two are foreground embeddings.
D2NET_HD inline bool x_is_foreground(int kind) { return kind < 2; }
D2NET_HD inline bool other_is_foreground(int kind) { return kind == 1; }

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
