// Snippet-level pDMI of every recording: log condition number of U_1 = P_1 Y_1 (Eq. 7 and 9).
#pragma once

#include "operator.h"

namespace d2net {

template <typename T>
struct SnippetPdmi {
  static constexpr int kSettings = 4;
  // A snippet is pseudo-foreground with scores > fg_threshold and pseudo-background with scores < bg_threshold, and may
  // be both. Entries of U_1 are at least entry_floor; singular values up to rank_tol are zero.
  double fg_threshold, bg_threshold, entry_floor, rank_tol;
  int64_t per_class;            // whether columns of U_1 are divided by the number of their snippets, or of both
  const T *attention, *scores;  // (b, t)
  const int64_t* lengths;       // (b), clamped to [0, t], later snippets are not read; null: all t
  int64_t b, t;

  T* loss;      // (b), 0 where not valid
  bool* valid;  // (b): there are snippets on both sides
  T* weights;   // (b, 2): gradient of loss with respect to the attention of any snippet of each side, 0 where not valid

  // Backward: gradient (b, t) = grad[i] weights[i], where they apply; a snippet on both sides has the sum.
  const T* grad = nullptr;  // (b)
  T* gradient = nullptr;
};

D2NET_DECLARE(snippet_pdmi, SnippetPdmi)
D2NET_DECLARE(snippet_pdmi_backward, SnippetPdmi)

}  // namespace d2net
