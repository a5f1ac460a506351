// Half-precision numbers as they lie in memory. Only kernels compute with them (csrc/cuda/device.h: to_float,
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

}  // namespace d2net
