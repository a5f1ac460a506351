#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "nms.h"

namespace {

template <typename T>
struct Case {
  std::vector<T> segments, scores;
  std::vector<int64_t> groups;
  int64_t n() const { return int64_t(scores.size()); }
};

template <typename T>
Case<T> random_case(int64_t n, double span) {
  Case<T> c{check::uniform<T>(2 * n, 1, 0, span), check::uniform<T>(n, 2, 0, 100), std::vector<int64_t>(n)};
  for (int64_t i = 0; i < n; ++i) {
    c.segments[2 * i + 1] = c.segments[2 * i] + c.segments[2 * i + 1] / 8;
    c.scores[i] = T(int64_t(c.scores[i]));  // many ties
    c.groups[i] = i % 3 * 1000000007 - 5;
  }
  return c;
}

// Both return the kept, or -1 - the row that was refused.
template <typename T>
std::vector<int64_t> on_cuda(const Case<T>& c, const int64_t* groups, double threshold) {
  const int64_t bytes = d2net::cuda::nms_1d_scratch_bytes<T>(c.n(), 0, nullptr);
  std::vector<int64_t> scratch((bytes + 7) / 8);
  std::vector<int32_t> keep(c.n());
  int64_t result[2];
  d2net::cuda::nms_1d(c.segments.data(), c.scores.data(), groups, c.n(), threshold, scratch.data(), bytes, keep.data(),
                      result, 0, nullptr);
  if (result[1] >= 0) return {-1 - result[1]};
  return std::vector<int64_t>(keep.begin(), keep.begin() + result[0]);
}

template <typename T>
std::vector<int64_t> on_one_block(const Case<T>& c, const int64_t* groups, double threshold) {
  std::vector<int64_t> keep(c.n());
  int64_t result[2];
  d2net::cuda::nms_1d_block(c.segments.data(), c.scores.data(), groups, c.n(), threshold, keep.data(), result, 0,
                            nullptr);
  if (result[1] >= 0) return {-1 - result[1]};
  keep.resize(result[0]);
  return keep;
}

template <typename T>
std::vector<int64_t> on_cpu(const Case<T>& c, const int64_t* groups, double threshold) {
  std::vector<int64_t> keep(c.n());
  const int64_t count =
      groups == nullptr
          ? d2net::cpu::nms_1d(c.segments.data(), c.scores.data(), c.n(), threshold, keep.data(), 1)
          : d2net::cpu::batched_nms_1d(c.segments.data(), c.scores.data(), groups, c.n(), threshold, keep.data(), 1);
  if (count < 0) return {count};
  keep.resize(count);
  return keep;
}

template <typename T>
void compare(const Case<T>& c, double threshold) {
  for (const int64_t* groups : {static_cast<const int64_t*>(nullptr), c.groups.data()}) {
    const std::vector<int64_t> expected = on_cpu(c, groups, threshold);
    CHECK(on_cuda(c, groups, threshold) == expected);
    if (c.n() <= d2net::cuda::kNmsBlockLimit<T>) CHECK(on_one_block(c, groups, threshold) == expected);
  }
}

template <typename T>
void compare_soft(const Case<T>& c, double threshold, double min_score, int64_t expected) {
  const int64_t n = c.n();
  std::vector<T> scratch(4 * n), new_scores(n), cpu_scores(n);
  std::vector<int64_t> keep(n), cpu_keep(n);
  int64_t result[2];
  d2net::cuda::soft_nms_1d(c.segments.data(), c.scores.data(), n, threshold, 0.5, min_score, false, scratch.data(),
                           keep.data(), new_scores.data(), result, 0, nullptr);
  const int64_t count = d2net::cpu::soft_nms_1d(c.segments.data(), c.scores.data(), n, threshold, 0.5, min_score, false,
                                                cpu_keep.data(), cpu_scores.data(), 1);
  CHECK(expected < 0 ? count == expected : count > 0);
  CHECK(count < 0 ? result[1] == -1 - count : result[0] == count && result[1] == -1);
  for (int64_t i = 0; i < count; ++i) CHECK(keep[i] == cpu_keep[i] && new_scores[i] == cpu_scores[i]);
}

}  // namespace

TEST(cuda_nms_equals_the_cpu) {
  for (int64_t n : {1, 33, 300}) {
    for (double threshold : {0.0, 0.3, 1.0}) {
      compare(random_case<float>(n, 40), threshold);
      compare(random_case<double>(n, 40), threshold);
    }
  }
  compare(random_case<float>(1100, 500), 0.4);  // two tiles a warp of one block
  compare(random_case<float>(2300, 900), 0.4);  // more than the first prefix
}

TEST(cuda_nms_with_ugly_values) {
  const float infinity = std::numeric_limits<float>::infinity(), largest = std::numeric_limits<float>::max();
  const float tiny = std::numeric_limits<float>::denorm_min();
  Case<float> c = random_case<float>(64, 10);
  const float values[] = {0.0f, -0.0f, tiny, -tiny, largest, -largest, 1.0f, 1e30f};
  for (int i = 0; i < 128; ++i) c.segments[i] = values[(i * 37 + i / 5) % 8];
  c.scores[5] = infinity;
  c.scores[6] = -infinity;
  for (double threshold : {0.0, 1e-30, 0.5, 1.0}) compare(c, threshold);
  compare_soft(c, 0.2, 0, 0);
  c.segments[77] = infinity;
  c.scores[50] = std::numeric_limits<float>::quiet_NaN();
  compare(c, 0.5);
  compare_soft(c, 0.2, 0, -1 - 38);
}

TEST(cuda_soft_nms_equals_the_cpu) {
  for (int64_t n : {1, 33, 200}) {
    compare_soft(random_case<float>(n, 40), 0.2, 0.5, 0);
    compare_soft(random_case<double>(n, 40), 0.0, 0, 0);
  }
  compare_soft(random_case<float>(1500, 100), 0.1, 5, 0);     // several tiles a warp
  compare_soft(random_case<double>(1500, 1e4), 0.3, 90, 0);   // most are apart: many results a pass
  compare_soft(random_case<float>(33000, 1000), 0.1, 99, 0);  // larger tiles, in scratch memory
}
