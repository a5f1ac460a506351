// Condition number of a 2x2 matrix in closed form, without an SVD.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace d2net {

struct Condition2x2 {
  double excess;          // sigma_1 / sigma_2 - 1; its log1p is the log condition number
  double da, db, dc, dd;  // gradient of log(sigma_1 / sigma_2)
};

// [a b; c d] is half a rotation and scaling (e, h) and half a reflection and scaling (f, g); with q = |(e, h)| and
// r = |(f, g)| its singular values are q + r and |q - r|. For nearly singular matrices q - r would cancel, so the
// smaller one comes from the determinant, whose two products are exact for entries that were float32. For nearly
// orthogonal ones sigma_1 / sigma_2 would round to 1, so the excess is computed: sigma_1 - sigma_2 = 2 min(q, r).
//
// All zero unless both singular values are above rank_tol; NaN if an entry is NaN or infinite. Where the singular
// values are equal the gradient is 0, the minimum's. Without branches, so that loops over it vectorise. Squares of the
// entries must neither overflow nor underflow.
[[gnu::always_inline]] D2NET_HD inline Condition2x2 condition_2x2_unscaled(double a, double b, double c, double d,
                                                                           double rank_tol) {
  const double e = 0.5 * (a + d), h = 0.5 * (c - b), f = 0.5 * (a - d), g = 0.5 * (b + c);
  const double q = std::sqrt(e * e + h * h), r = std::sqrt(f * f + g * g);
  const double determinant = a * d - b * c;
  const double first = q + r;
  const double second = std::fabs(determinant) / (first > 0 ? first : 1);
  const bool proper = first > rank_tol && second > rank_tol;
  const double nan_or_0 = (a - a) + (b - b) + (c - c) + (d - d);  // NaN where an entry is not finite
  // d log(sigma_1 / sigma_2) = 2 sign(determinant) (q dr - r dq) / (sigma_1 sigma_2)
  const double inverse = proper ? 1 / determinant : 0;
  const double alpha = (proper && r > 0 ? q / r * inverse : 0) + nan_or_0;
  const double beta = (proper && q > 0 ? r / q * inverse : 0) + nan_or_0;
  const double smaller = q < r ? q : r;
  return {(proper ? 2 * smaller / second : 0) + nan_or_0, alpha * f - beta * e, alpha * g + beta * h,
          alpha * g - beta * h, -alpha * f - beta * e};
}

[[gnu::always_inline]] D2NET_HD inline Condition2x2 condition_2x2(float a, float b, float c, float d, double rank_tol) {
  return condition_2x2_unscaled(a, b, c, d, rank_tol);
}

// Scaled by a power of two: the squares of the largest and smallest doubles are out of range.
[[gnu::always_inline]] D2NET_HD inline Condition2x2 condition_2x2(double a, double b, double c, double d,
                                                                  double rank_tol) {
  int exponent;
  std::frexp(std::fmax(std::fmax(std::fabs(a), std::fabs(b)), std::fmax(std::fabs(c), std::fabs(d))), &exponent);
  const auto scaled = [exponent](double x) { return std::ldexp(x, -exponent); };
  const Condition2x2 x = condition_2x2_unscaled(scaled(a), scaled(b), scaled(c), scaled(d), scaled(rank_tol));
  return {x.excess, scaled(x.da), scaled(x.db), scaled(x.dc), scaled(x.dd)};
}

// With entries clamped to at least eps, if eps > 0; clamped ones have no gradient.
D2NET_HD inline Condition2x2 clamped_condition_2x2(double a, double b, double c, double d, double eps,
                                                   double rank_tol) {
  if (!(eps > 0)) return condition_2x2(a, b, c, d, rank_tol);
  const auto clamped = [eps](double x) { return x < eps ? eps : x; };
  Condition2x2 x = condition_2x2(clamped(a), clamped(b), clamped(c), clamped(d), rank_tol);
  if (a < eps) x.da = 0;
  if (b < eps) x.db = 0;
  if (c < eps) x.dc = 0;
  if (d < eps) x.dd = 0;
  return x;
}

}  // namespace d2net
