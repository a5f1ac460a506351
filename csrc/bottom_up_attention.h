// Bottom-up attention lambda'(t) = 0.5 (1 - cos(x(t), x_ref)) (Eq. 8).
#pragma once

#include <cstdint>

namespace d2net::cpu {

// x (b, t, d) and reference (d) -> attention (b, t), 0.5 where either vector is zero, and norms (b, t) of the x(t) for
// the backward: 0 where attention does not depend on x(t). Lengths are clamped to [0, t], null means all t; snippets
// past a length are not read and get 0.5. Sums are in double, and vectors whose squared norm a double cannot hold are
// scaled first. NaN propagates.
template <typename T>
void bottom_up_attention(const T* x, const T* reference, const int64_t* lengths, int64_t b, int64_t t, int64_t d,
                         T* attention, T* norms, int threads);

}  // namespace d2net::cpu
