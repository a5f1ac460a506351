// The whole loss, forward and backward: every setting, on tests/simt against the CPU, and for any order of blocks.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "check.h"
#include "cuda/common/device.h"
#include "loss.h"

namespace {

using d2net::Loss;
using d2net::LossSettings;

// One batch, with room for everything that a call may write. Packed where there are offsets.
template <typename X>
struct Batch {
  using A = d2net::accumulator_t<X>;
  int64_t b, t, c, d;
  std::vector<int64_t> offsets;
  int64_t rows;
  std::vector<A> tcam, labels, x_ref, weights;
  std::vector<X> embeddings;
  std::vector<int64_t> lengths, partner, source;
  std::vector<float> keys;

  Batch(int64_t b_, int64_t t_, int64_t c_, int64_t d_, std::vector<int64_t> offsets_ = {}, int64_t n = 0)
      : b(b_),
        t(t_),
        c(c_),
        d(d_),
        offsets(std::move(offsets_)),
        rows(offsets.empty() ? b * t : n),
        tcam(check::uniform<A>(rows * c, 1)),
        labels(check::uniform<A>(b * c, 2, -1)),
        x_ref(check::uniform<A>(d, 3, -1)),
        weights(check::uniform<A>(2 * b * (d + c) + rows + 4, 4, -1)),
        lengths(b),
        partner(3 * b),
        source(b),
        keys(check::uniform<float>(3 * b, 5)) {
    for (A& y : tcam) y = y * y;
    for (float x : check::uniform<float>(rows * d, 6, -1)) embeddings.push_back(d2net::cuda::from_float<X>(x));
    for (int64_t i = 0; i < b; ++i) lengths[i] = i % 3 == 1 ? t / 2 : t + 1 - i % 2, source[i] = (i * 5 + 1) % b;
    if (b > 2) lengths[2] = 0;
    for (int64_t i = 0; i < 3 * b; ++i) partner[i] = i * 7 % (b + 3) - 1;  // also out of range on both sides
  }

  // What no recording holds.
  void fill_gaps(double value) {
    std::vector<bool> inside(rows);
    for (int64_t i = 0; i < b; ++i) {
      const int64_t room = std::min(t, offsets[i + 1] - offsets[i]),
                    length = std::min(std::max<int64_t>(lengths[i], 0), room);
      std::fill_n(inside.begin() + offsets[i], length, true);
    }
    for (int64_t row = 0; row < rows; ++row) {
      if (inside[row]) continue;
      std::fill_n(tcam.begin() + row * c, c, A(value));
      std::fill_n(embeddings.begin() + row * d, d, d2net::cuda::from_float<X>(value));
      weights[4 + row] = A(value);  // the gradient with respect to attention
    }
  }
};

template <typename X>
struct Results {
  using A = d2net::accumulator_t<X>;
  std::vector<A> scalars, attention, pooled, x, scores, x_ref, grad_tcam;
  std::vector<X> grad_embeddings;
  std::vector<int64_t> counted;
  std::unique_ptr<bool[]> valid;

  template <typename F, typename G>
  Results(const Batch<X>& in, const LossSettings& with, bool keys, F&& forward, G&& backward, int64_t scratch_bytes)
      : scalars(4),
        attention(in.rows),
        pooled(in.b * in.c),
        x(2 * in.b * in.d),
        scores(in.rows),
        x_ref(in.d),
        grad_tcam(in.rows * in.c),
        grad_embeddings(in.rows * in.d),
        counted(in.b),
        valid(new bool[2 * in.b]()) {
    std::vector<char> workspace(20 * in.rows + in.b * (20 * in.c + 300) + 16 * in.c + 2000), scratch(scratch_bytes);
    Loss<X> l = {};
    l.with = with;
    l.b = in.b, l.t = in.t, l.c = in.c, l.d = in.d;
    l.tcam = in.tcam.data(), l.embeddings = in.embeddings.data(), l.lengths = in.lengths.data();
    if (!in.offsets.empty()) l.rows = {in.offsets.data(), in.rows};
    l.labels = in.labels.data(), l.x_ref = in.x_ref.data();
    l.keys = keys ? in.keys.data() : nullptr, l.partner = keys ? nullptr : in.partner.data();
    l.source = keys ? nullptr : in.source.data();
    l.total = &scalars[0], l.discriminative = &scalars[1], l.snippet = &scalars[2], l.video = &scalars[3];
    l.attention = attention.data(), l.pooled = pooled.data(), l.x = x.data(), l.counted = counted.data();
    l.scores = scores.data(), l.valid = valid.get(), l.new_x_ref = x_ref.data();
    l.workspace = workspace.data(), l.workspace_bytes = int64_t(workspace.size());
    l.scratch = scratch.data(), l.scratch_bytes = scratch_bytes;
    forward(l);
    const A* w = in.weights.data();
    l.grad_total = w, l.grad_discriminative = w + 1, l.grad_snippet = w + 2, l.grad_video = w + 3;
    l.grad_attention = w + 4, l.grad_pooled = l.grad_attention + in.rows, l.grad_x = l.grad_pooled + in.b * in.c;
    l.grad_tcam = grad_tcam.data();
    l.grad_embeddings = with.separate != 0 ? grad_embeddings.data() : nullptr;
    backward(l);
  }
};

template <typename T, typename U>
void check_close(const std::vector<T>& found, const std::vector<U>& expected, double tolerance) {
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK(check::close(double(d2net::cuda::to_float(found[i])), double(d2net::cuda::to_float(expected[i])), tolerance,
                       tolerance));
  }
}

LossSettings paper() {
  LossSettings with = {};
  with.topk_divisor = 8, with.min_snippets = 1, with.classify = with.separate = 1, with.beta = 2, with.gamma = 0.3;
  with.probability_floor = 1e-6, with.embed = 1, with.threshold = 0.5, with.background_threshold = 0.5;
  with.update = 1, with.momentum = 0.9, with.score = with.snippet = 1, with.alpha_snippet = 0.2;
  with.fg_threshold = with.bg_threshold = 0.5, with.rank_tol = 1e-5, with.video = 1, with.alpha_video = 0.3;
  with.peak_share = -1;
  return with;
}

LossSettings release() {
  LossSettings with = paper();
  with.topk_divisor = 4, with.min_snippets = 3, with.skip_unlabelled = 1, with.mean_over_classes = with.balanced = 1;
  with.threshold = 0.3, with.background_threshold = 0.6, with.mean_embeddings = 1, with.lowest_attention = 1;
  with.fg_threshold = 0.55, with.bg_threshold = 0.45, with.own_classes = 1, with.snippet_per_class = 1;
  with.entry_floor = 0.01, with.peak_share = 0.3, with.video_per_class = 1;
  return with;
}

template <typename X>
Results<X> on_cuda(const Batch<X>& in, const LossSettings& with, bool keys) {
  return Results<X>(
      in, with, keys, [](const Loss<X>& l) { d2net::cuda::loss(l, 0, nullptr); },
      [](const Loss<X>& l) { d2net::cuda::loss_backward(l, 0, nullptr); },
      d2net::cuda::loss_scratch_bytes<X>(in.b, in.t, in.c, in.d, 0, nullptr));
}

template <typename X>
void equals_the_cpu(const Batch<X>& in, const LossSettings& with) {
  for (bool keys : {true, false}) {
    const Results<X> found = on_cuda(in, with, keys);
    const Results<X> expected(
        in, with, keys, [](const Loss<X>& l) { d2net::cpu::loss(l, 2); },
        [](const Loss<X>& l) { d2net::cpu::loss_backward(l, 2); }, 0);
    const double tolerance = sizeof(X) == 4 ? 1e-3 : 1e-9;
    check_close(found.scalars, expected.scalars, tolerance);
    check_close(found.attention, expected.attention, tolerance);
    check_close(found.pooled, expected.pooled, tolerance);
    check_close(found.x, expected.x, tolerance);
    check_close(found.scores, expected.scores, tolerance);
    check_close(found.x_ref, expected.x_ref, tolerance);
    check_close(found.grad_tcam, expected.grad_tcam, tolerance);
    check_close(found.grad_embeddings, expected.grad_embeddings, tolerance);
    CHECK(found.counted == expected.counted);
    for (int64_t i = 0; i < 2 * in.b; ++i) CHECK(found.valid[i] == expected.valid[i]);
  }
}

}  // namespace

TEST(cuda_loss_equals_the_cpu) {
  for (const LossSettings& with : {paper(), release()}) {
    equals_the_cpu(Batch<double>(5, 70, 7, 33), with);
    equals_the_cpu(Batch<double>(3, 40, 20, 132), with);
    equals_the_cpu(Batch<float>(4, 35, 6, 8), with);
  }
  LossSettings focal = paper();
  focal.separate = focal.update = 0;
  equals_the_cpu(Batch<double>(3, 20, 5, 6), focal);
}

TEST(cuda_loss_of_packed_recordings_equals_the_cpu) {
  for (const LossSettings& with : {paper(), release()}) {
    Batch<double> wide(5, 70, 7, 33, {0, 70, 107, 110, 180, 215}, 230);
    Batch<float> narrow(4, 35, 6, 8, {0, 36, 60, 61, 96}, 96);
    wide.fill_gaps(NAN);
    narrow.fill_gaps(NAN);
    equals_the_cpu(wide, with);
    equals_the_cpu(narrow, with);
  }
}

// Recordings may share rows then, whose results are those of any of them.
TEST(loss_of_any_offsets_stays_within_the_rows) {
  const int64_t large = int64_t(1) << 62;
  const std::vector<std::vector<int64_t>> odd = {{0, 30, 20, 50},           {-7, 10, 20, 61}, {61, 61, 61, 61},
                                                 {large, -large, large, 3}, {50, 40, 30, 20}, {0, 0, 60, large}};
  for (const std::vector<int64_t>& offsets : odd) {
    for (int64_t t : {int64_t(0), int64_t(17), int64_t(60)}) {
      const Batch<float> in(3, t, 5, 36, offsets, 60);
      on_cuda(in, release(), true);
      Results<float>(
          in, release(), true, [](const Loss<float>& l) { d2net::cpu::loss(l, 1); },
          [](const Loss<float>& l) { d2net::cpu::loss_backward(l, 1); }, 0);
    }
  }
}

TEST(cuda_loss_of_half_precision) {
  const Batch<d2net::float16> half(4, 35, 6, 40);
  Batch<float> wide(4, 35, 6, 40);
  for (size_t i = 0; i < half.embeddings.size(); ++i) wide.embeddings[i] = d2net::cuda::to_float(half.embeddings[i]);
  for (const LossSettings& with : {paper(), release()}) {
    const auto found = on_cuda(half, with, true);
    const auto expected = on_cuda(wide, with, true);
    check_close(found.scalars, expected.scalars, 1e-4);
    check_close(found.grad_tcam, expected.grad_tcam, 1e-4);
    check_close(found.grad_embeddings, expected.grad_embeddings, 2e-3);
  }
}
