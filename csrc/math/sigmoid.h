// The logistic function and its derivative, accurate in both tails. The float version is made of operations that
// vectorise, which a call of the C library's exp is not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/host_device.h"

namespace d2net::math {

// a * b, rounded. nvcc would fuse a product with the sum it goes into, and a kernel would get another number than the
// CPU, or than another kernel.
D2NET_HD inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// exp(-x) for x >= 0 to about 1 ulp, gradually down to 0; NaN propagates.
D2NET_HD inline float exp_of_minus(float x) {
  x = x > 104.0f ? 104.0f : x;  // exp(-104) rounds to 0
  // -x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer, held in the low bits.
  const float shifted = product(x, -1.44269504f) + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts, the first so short that its product with n is exact.
  const float r = (-x - product(n, 0.693359375f)) + product(n, 2.12194440e-4f);
  // Taylor's series: the first term left out is below r^8 / 8! = 5e-9.
  float p = 1.0f / 5040;
  p = product(p, r) + 1.0f / 720;
  p = product(p, r) + 1.0f / 120;
  p = product(p, r) + 1.0f / 24;
  p = product(p, r) + 1.0f / 6;
  p = product(p, r) + 0.5f;
  p = product(product(p, r), r) + r + 1.0f;
  // 2^n in two factors, since 2^-150 is too small for a float.
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t power = bits - 0x4b400000, half = power >> 1;
  const int32_t exponents[2] = {int32_t(uint32_t(half + 127) << 23), int32_t(uint32_t(power - half + 127) << 23)};
  float first, second;
  std::memcpy(&first, &exponents[0], sizeof first);
  std::memcpy(&second, &exponents[1], sizeof second);
  return p * first * second;
}
D2NET_HD inline double exp_of_minus(double x) { return std::exp(-x); }

template <typename T>
D2NET_HD inline T sigmoid(T x) {
  const T e = exp_of_minus(x < 0 ? -x : x);
  return (x < 0 ? e : T(1)) / (1 + e);
}

// sigmoid(x) (1 - sigmoid(x)), without the loss of digits where sigmoid(x) is near 1.
template <typename T>
D2NET_HD inline T sigmoid_slope(T x) {
  const T e = exp_of_minus(x < 0 ? -x : x);
  return e / ((1 + e) * (1 + e));
}

}  // namespace d2net::math
