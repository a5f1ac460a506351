// Half-precision numbers as they lie in memory. Only kernels compute with them (csrc/cuda/common/device.h: to_float,
// from_float); everyone else just passes pointers.
#pragma once

#include <cstdint>

namespace d2net {

struct float16 {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

// What sums of T are kept in: float for half precision, else T.
template <typename T>
struct Accumulator {
  using type = T;
};
template <>
struct Accumulator<float16> {
  using type = float;
};
template <>
struct Accumulator<bfloat16> {
  using type = float;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

}  // namespace d2net
