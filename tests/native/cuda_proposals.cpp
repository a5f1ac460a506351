#include <algorithm>
#include <limits>
#include <memory>

#include "check.h"
#include "proposals.h"
#include "simt/simt.h"

namespace {

struct Result {
  int64_t wrong = 0;
  std::vector<int64_t> places;
  std::vector<double> scores;

  bool operator==(const Result& other) const {
    return wrong == other.wrong && places == other.places && scores == other.scores;
  }
};

template <typename T>
struct Batch {
  int64_t batch, snippets, width;
  std::vector<T> x;
  std::vector<char> kept;
  std::vector<int64_t> lengths;
  std::vector<T> thresholds;  // rising
  int64_t min_length = 1;
  double inflation = 0.25;
  bool mean_of_sides = false;
  double min_contrast = -std::numeric_limits<double>::infinity();
  double nms_iou = 0.5;

  std::unique_ptr<bool[]> classes() const {
    std::unique_ptr<bool[]> as_bool(new bool[kept.size()]);
    std::copy(kept.begin(), kept.end(), as_bool.get());
    return as_bool;
  }
};

template <typename T>
Result on_cuda(const Batch<T>& s) {
  const int64_t columns = s.batch * s.width;
  std::vector<int32_t> starts(columns * s.snippets), ends(starts.size());
  std::vector<T> scores(starts.size());
  std::vector<int64_t> offsets(columns + 2, -1);
  const int64_t bytes = d2net::cuda::find_proposals_scratch_bytes<T>(s.batch, s.snippets, s.width, 0, nullptr);
  std::vector<double> scratch((bytes + 7) / 8, -1);
  d2net::cuda::find_proposals(s.x.data(), s.batch, s.snippets, s.width, s.snippets * s.width, s.width, int64_t(1),
                              s.classes().get(), s.lengths.data(), s.thresholds.data(), int64_t(s.thresholds.size()),
                              s.min_length, s.inflation, s.mean_of_sides, s.min_contrast, s.nms_iou, starts.data(),
                              ends.data(), scores.data(), offsets.data(), scratch.data(), 0, nullptr);
  Result result;
  result.wrong = offsets[columns + 1];
  if (result.wrong) return result;
  const int64_t count = offsets[columns];
  result.places.resize(4 * count);
  std::vector<T> sorted(count);
  d2net::cuda::copy_proposals(starts.data(), ends.data(), scores.data(), offsets.data(), s.batch, s.snippets, s.width,
                              count, result.places.data(), sorted.data(), 0, nullptr);
  result.scores.assign(sorted.begin(), sorted.end());
  return result;
}

template <typename T>
Result on_cpu(const Batch<T>& s) {
  const std::vector<double> thresholds(s.thresholds.begin(), s.thresholds.end());
  const auto found =
      d2net::cpu::find_proposals(s.x.data(), s.batch, s.snippets, s.width, s.snippets * s.width, s.width, int64_t(1),
                                 s.classes().get(), s.lengths.data(), thresholds.data(), int64_t(thresholds.size()),
                                 s.min_length, s.inflation, s.mean_of_sides, s.min_contrast, s.nms_iou, 1);
  Result result;
  if (found.count < 0) {
    result.wrong = d2net::cuda::kUnusable;
    return result;
  }
  result.places.resize(4 * found.count);
  std::vector<T> scores(found.count);
  d2net::cpu::copy_proposals(found, result.places.data(), scores.data(), 1);
  result.scores.assign(scores.begin(), scores.end());
  return result;
}

// 12 columns on the 32 blocks (8 where they do not fit into shared memory) of the imitated device.
template <typename T>
Batch<T> wander(unsigned seed) {
  Batch<T> s{3, 150, 4, check::uniform<T>(3 * 150 * 4, seed, -0.2, 0.2), {}, {150, 33, 0}, {}};
  for (int64_t i = 4; i < int64_t(s.x.size()); ++i) {
    if (i / 4 % 150 > 0) s.x[i] = std::min(T(1), std::max(T(-0.1), s.x[i] + s.x[i - 4]));
  }
  for (int i = 0; i < 12; ++i) s.kept.push_back(i % 5 != 3);
  for (int i = 1; i <= 20; ++i) s.thresholds.push_back(T(0.025 * i));
  return s;
}

template <typename T>
void equals_the_cpu() {
  auto s = wander<T>(sizeof(T));
  CHECK(on_cpu(s).scores.size() > 20);
  CHECK(on_cuda(s) == on_cpu(s));
  s.nms_iou = 0.2;
  s.mean_of_sides = true;
  s.min_length = 2;
  s.min_contrast = -0.05;
  d2net::simt::set_shared_memory_limit(2048);
  CHECK(on_cuda(s) == on_cpu(s));
  d2net::simt::set_shared_memory_limit(227 * 1024);
}

}  // namespace

TEST(cuda_proposals_equal_the_cpu_float) { equals_the_cpu<float>(); }
TEST(cuda_proposals_equal_the_cpu_double) { equals_the_cpu<double>(); }

// As many components as snippets, each in the next, which all stay or nearly all go.
TEST(cuda_proposals_of_a_staircase) {
  const int64_t n = 100;
  Batch<double> s{1, n, 1, {}, {1}, {n}, {}};
  for (int64_t t = 0; t < n; ++t) {
    s.x.push_back(double(t + 1));
    s.thresholds.push_back(double(t) + 0.5);
  }
  for (double nms_iou : {1.0, 0.4}) {
    s.nms_iou = nms_iou;
    CHECK(on_cuda(s) == on_cpu(s));
    std::reverse(s.x.begin(), s.x.end());
  }
}

TEST(cuda_proposals_of_ugly_input) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const float most = std::numeric_limits<float>::max();
  for (float broken : {nan, inf, -inf, most, -most, -0.0f}) {
    Batch<float> s{1, 40, 2, std::vector<float>(80, 0.25f), {1, 1}, {40}, {-inf, 0.1f, 0.1f, inf}};
    s.inflation = 1e308;
    for (int64_t place : {0, 33, 39}) s.x[2 * place] = broken;
    CHECK(on_cuda(s) == on_cpu(s));
    s.kept[0] = false;  // then it is not read
    CHECK(on_cuda(s).scores.size() == 1);
  }
  const double top = std::numeric_limits<double>::max();
  CHECK(on_cuda(Batch<double>{1, 4, 1, {top, top, -top, -top}, {1}, {4}, {0}}).wrong == d2net::cuda::kUnusable);
  for (int64_t length : {-1, 6, 1 << 30}) {  // clamped, and said
    const Batch<float> s{2, 5, 1, std::vector<float>(10, 1), {1, 0}, {5, length}, {0.5f}};
    CHECK(on_cuda(s).wrong == d2net::cuda::kBadLength);
  }
}

TEST(cuda_proposals_of_nothing) {
  CHECK(on_cuda(Batch<float>{0, 5, 3, {}, {}, {}, {0.5f}}) == Result{});
  CHECK(on_cuda(Batch<float>{2, 0, 1, {}, {1, 1}, {0, 0}, {0.5f}}) == Result{});
  CHECK(on_cuda(Batch<float>{2, 5, 0, {}, {}, {5, 5}, {0.5f}}) == Result{});
}
