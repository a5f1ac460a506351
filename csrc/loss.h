// The loss of D2-Net (Eq. 1 to 11) of one batch: one call forward, one backward, one struct for all devices.
#pragma once

#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "math/pairs.h"
#include "math/rows.h"
#include "operator.h"

namespace d2net {

constexpr double kVideoRankTol = 1e-5;  // singular values of U_2 up to this count as zero

// The recipe's values, and which parts are on. Members and their order as in d2net's LossSettings; flags are 0 or 1.
struct LossSettings {
  double topk_divisor, min_snippets, skip_unlabelled;  // of p; which recordings count
  double classify, separate;                           // Eq. 4; its weights are those of Eq. 3, else 0
  double beta, gamma, probability_floor, mean_over_classes, balanced;
  double embed, threshold, background_threshold, mean_embeddings;  // Eq. 2
  double update, momentum, lowest_attention;                       // x_ref
  double score, snippet, alpha_snippet;                            // Eq. 8; Eq. 9 and its weight
  double fg_threshold, bg_threshold, own_classes, snippet_per_class, entry_floor, rank_tol;
  // Eq. 10 and its weight. peak_share: the fraction of a recording's largest score that P_2 keeps scores above, or
  // below 0 for all.
  double video, alpha_video, peak_share, video_per_class;
};

// X: the type of the embeddings. All other numbers are of the type in which embeddings are summed. A part that is off
// reads and writes nothing of its own. Members as d2net/ops/loss.py packs them: LossInputs, LossResult and gradients.
template <typename X>
struct Loss {
  using A = accumulator_t<X>;
  static constexpr int kSettings = sizeof(LossSettings) / sizeof(double);
  LossSettings with;
  int64_t b, t, c, d;
  const A* tcam;           // (b, t, c)
  const X* embeddings;     // (b, t, d)
  const int64_t* lengths;  // (b), clamped to [0, t]; null: all t
  const A* labels;         // (b, c), above 0 where a recording has the class
  const A* x_ref;          // (d)
  // Whose embedding is x~ of w_fb, w_fg and w_bg in Eq. 3: that of the next recording that has one, in the order of
  // `keys` (3, b), the first after the last; without keys that of `partner` (3, b), none where it is not in [0, b).
  // source (b): whose x_fg stands in w_fb; null: the recording's own, and nothing is paired with itself.
  const float* keys;
  const int64_t *partner, *source;
  Rows rows;  // (b, t, ...) are (n, ...) in a packed batch

  A *total, *discriminative, *snippet, *video;  // scalars, 0 for what is off: Eq. 1, and its terms before their weights
  A *attention, *pooled;                        // (b, t), (b, c)
  A* x;                                         // (2, b, d): x_fg and x_bg of Eq. 2, 0 where not valid
  int64_t* counted;                             // (b): lengths of the recordings that count, 0 of others
  A* scores;                                    // (b, t): lambda' of Eq. 8
  bool* valid;                                  // (2, b): whether there is an x_fg and an x_bg
  A* new_x_ref;                                 // (d)
  void* workspace;                              // what the backward needs
  int64_t workspace_bytes;

  // Backward: gradients with respect to results, null for 0, and to inputs; grad_embeddings may be null.
  const A *grad_total, *grad_discriminative, *grad_snippet, *grad_video, *grad_attention, *grad_pooled, *grad_x;
  A* grad_tcam;
  X* grad_embeddings;

  void* scratch;  // of CUDA: loss_scratch_bytes() for as long as a call lasts
  int64_t scratch_bytes;
};

// The call for a kernel that touches no embeddings: it is compiled once for all types that are summed in the same one.
template <typename X>
Loss<accumulator_t<X>> without_embeddings(const Loss<X>& x) {
  Loss<accumulator_t<X>> y;
  static_assert(sizeof(y) == sizeof(x) && std::is_trivially_copyable_v<Loss<X>>,
                "members differ in nothing but the type of embeddings");
  std::memcpy(static_cast<void*>(&y), &x, sizeof(y));
  y.embeddings = nullptr;
  y.grad_embeddings = nullptr;
  return y;
}

// Divides one block of memory into arrays.
class Pieces {
 public:
  Pieces(void* memory, int64_t bytes) : memory_(static_cast<char*>(memory)), bytes_(bytes) {}

  template <typename T>
  void take(T*& piece, int64_t n) {
    piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += (n * int64_t(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    if (used_ > bytes_) throw std::length_error("the workspace of a loss is too small");
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlign = 64;
  char* memory_;
  int64_t bytes_, used_ = 0;
};

// The length by which a recording counts or not: of a padded one as it is given, which may be above t.
D2NET_HD inline int64_t given_length(const Rows& rows, const int64_t* lengths, int64_t recording, int64_t length) {
  return rows.offsets != nullptr || lengths == nullptr ? length : lengths[recording];
}

// The workspace. How large it must be: workspace_bytes() of d2net/ops/loss.py.
template <typename X, typename A = accumulator_t<X>>
struct LossWorkspace {
  int32_t *argmax, *last;  // (b, t), (b, c) of topk_pool.h, with kth (b, c); of a packed batch (b, t) are (n)
  A* kth;
  int64_t* partner;               // (3, b), as drawn
  A *terms, *grad_terms, *saved;  // (b), (b, c), (kPairsSaved, b): Eq. 4, d terms / d p, and see math/pairs.h
  A *snippet_loss, *side_grad;    // (b), (b, 2): loss and side_grad of snippet_pdmi.h
  bool* snippet_valid;            // (b): whether a recording has a snippet term
  A* own_attention;               // (b, t): with own_classes, the attention in Eq. 9 ...
  int32_t* own_argmax;            // ... and its class, -1 for none
  A *p_left, *p_right;            // (2, c), (2, b) of condition_number.h
  double* weights;                // (2, b): sums of the weights of Eq. 2, of CUDA

  explicit LossWorkspace(const Loss<X>& x) {
    Pieces pieces(x.workspace, x.workspace_bytes);
    const int64_t b = x.b, c = x.c, rows = x.rows.count(b, x.t), own = x.with.own_classes != 0 ? rows : 0;
    pieces.take(argmax, rows);
    pieces.take(last, b * c);
    pieces.take(kth, b * c);
    pieces.take(partner, 3 * b);
    pieces.take(terms, b);
    pieces.take(grad_terms, b * c);
    pieces.take(saved, kPairsSaved * b);
    pieces.take(snippet_loss, b);
    pieces.take(side_grad, 2 * b);
    pieces.take(snippet_valid, b);
    pieces.take(own_attention, own);
    pieces.take(own_argmax, own);
    pieces.take(p_left, 2 * c);
    pieces.take(p_right, 2 * b);
    pieces.take(weights, 2 * b);
  }

  // Who is paired with whom.
  Pairs pairs(const Loss<X>& x) const {
    if (x.with.separate == 0) return {nullptr, nullptr, nullptr, x.b};
    return {x.keys != nullptr ? partner : x.partner, x.source, x.valid, x.b};
  }
};

D2NET_DECLARE(loss, Loss)
D2NET_DECLARE(loss_backward, Loss)

namespace cuda {

template <typename X>
int64_t loss_scratch_bytes(int64_t b, int64_t t, int64_t c, int64_t d, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
