// Half precision as the hardware converts it.
#include <math.h>

#include <algorithm>

#include "simt/simt.h"

namespace d2net::simt {

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else {
    magnitude = exponent == 0 ? ldexpf(float(fraction), -24) : ldexpf(float(fraction + 1024), exponent - 25);
  }
  return bits >> 15 ? -magnitude : magnitude;
}

uint16_t float_to_half(float value) {
  const uint16_t sign = uint16_t(bit_cast<uint32_t>(value) >> 16 & 0x8000);
  const float magnitude = fabsf(value);
  if (value != value) return uint16_t(sign | 0x7e00);
  if (magnitude >= 65520) return uint16_t(sign | 0x7c00);
  int exponent = 0;
  frexpf(magnitude, &exponent);                                 // magnitude < 2^exponent
  const int unit = std::max(exponent, -13) - 11;                // the last of 11 bits, or the smallest denormal
  const int steps = int(nearbyintf(ldexpf(magnitude, -unit)));  // to nearest, ties to even
  // Carrying into the exponent is what rounding up to the next power of two means.
  return uint16_t(sign | (steps < 1024 ? steps : steps + ((unit + 24) << 10)));
}

}  // namespace d2net::simt
