// Householder reflectors, as the SVDs of both backends make them.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace d2net {

// Smaller numbers are treated as zero, so that no quotient overflows.
constexpr double kNegligible = 1e-280;

// Householder reflector H = I - tau v v^T with v_0 = 1 that maps x to (beta, 0, ..., 0).
struct Reflector {
  double beta, tau;
  double scale;  // v_i = scale * x_i for i > 0
};

// From x_0 and the sum of the squares of the other x_i. These are treated as zeros where the sum is negligible: a
// reflector made of denormal numbers would not be orthogonal. Without branches, so that loops over it vectorise.
[[gnu::always_inline]] D2NET_HD inline Reflector reflector(double x0, double squares) {
  const bool none = !(squares > kNegligible);
  const double length = std::sqrt(x0 * x0 + squares), beta = x0 > 0 ? -length : length;
  return {none ? x0 : beta, none ? 0 : (beta - x0) / beta, none ? 0 : 1 / (x0 - beta)};
}

}  // namespace d2net
