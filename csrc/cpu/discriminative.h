// L_Dis from pooled scores and embeddings (Eq. 3 and 4), and the pairing of recordings.
#pragma once

#include <cstdint>

#include "loss.h"
#include "math/pairs.h"

namespace d2net::cpu {

// partner (3, b): for w_fb, w_fg and w_bg of Eq. 3 the next recording, in the order of keys (3, b), NaN last, around
// the end, that has the embedding which x~ is (`valid`). A recording may find itself, which is no pair, or none: -1.
void different_partners(const float* keys, const bool* valid, int64_t b, int64_t* partner);

// pooled, labels (b, c), counted (b), x (2, b, d) -> terms (b): Eq. 4 of each recording with counted[i] > 0, 0 for
// others; sum over classes, or their mean; positive ones c times, if balanced. Without pairs all weights are 0, and x
// and saved are not touched. grad_terms (b, c): gradient of terms[i] with respect to pooled[i].
template <typename T>
void discriminative_terms(const T* pooled, const T* labels, const int64_t* counted, const T* x, const Pairs& pairs,
                          int64_t b, int64_t c, int64_t d, const LossSettings& with, T* terms, T* grad_terms, T* saved,
                          int threads);

// grad (b) -> grad_pooled (b, c) and, with pairs, grad_x (2, b, d), both added to what they hold.
template <typename T>
void discriminative_terms_backward(const T* grad, const T* grad_terms, const T* saved, const T* x, const Pairs& pairs,
                                   int64_t b, int64_t c, int64_t d, T* grad_pooled, T* grad_x, int threads);

}  // namespace d2net::cpu
