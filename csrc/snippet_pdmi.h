// Snippet-level pDMI of every recording: log condition number of U_1 = P_1 Y_1 (Eq. 7 and 9).
#pragma once

#include "math/rows.h"
#include "operator.h"

namespace d2net {

template <typename T>
struct SnippetPdmi {
  static constexpr int kSettings = 4;
  // A snippet is pseudo-foreground with scores > fg_threshold and pseudo-background with scores < bg_threshold, and may
  // be both. Entries of U_1 are clamped to at least entry_floor; singular values up to rank_tol count as zero.
  double fg_threshold, bg_threshold, entry_floor, rank_tol;
  int64_t per_class;  // columns of U_1 are divided by 1: the number of their own snippets, 0: that of both columns
  const T *attention, *scores;  // (b, t)
  const int64_t* lengths;       // (b), clamped to [0, t], later snippets are not read; null: all t
  int64_t b, t;

  T* loss;      // (b), 0 where not valid
  bool* valid;  // (b): whether there is a pseudo-foreground and a pseudo-background snippet
  // (b, 2): d loss / d attention of any pseudo-foreground and of any pseudo-background snippet, 0 where not valid.
  T* side_grad;

  // Backward: grad_loss times side_grad for every snippet; the sum of both for one that is both.
  const T* grad_loss = nullptr;  // (b)
  T* grad_attention = nullptr;   // (b, t)

  Rows rows = {};  // (b, t) are (n) in a packed batch
};

D2NET_DECLARE(snippet_pdmi, SnippetPdmi)
D2NET_DECLARE(snippet_pdmi_backward, SnippetPdmi)

}  // namespace d2net
