#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <tuple>
#include <utility>

#include "check.h"
#include "proposals.h"

namespace {

struct Batch {
  int64_t batch, snippets, width;
  std::vector<double> thresholds;
  int64_t min_length = 1;
  double inflation = 0.25;
  bool mean_of_sides = false;
  double min_contrast = -std::numeric_limits<double>::infinity();
  double nms_iou = 0.5;
};

using Row = std::tuple<int64_t, int64_t, int64_t, int64_t, double>;  // recording, label, start, end, score

template <typename T>
std::vector<Row> extract(const std::vector<T>& x, const Batch& s, const std::vector<char>& classes,
                         const int64_t* lengths, int threads) {
  const std::unique_ptr<bool[]> kept(new bool[classes.size()]);
  std::copy(classes.begin(), classes.end(), kept.get());
  const auto found =
      d2net::cpu::find_proposals(x.data(), s.batch, s.snippets, s.width, s.snippets * s.width, s.width, int64_t(1),
                                 kept.get(), lengths, s.thresholds.data(), int64_t(s.thresholds.size()), s.min_length,
                                 s.inflation, s.mean_of_sides, s.min_contrast, s.nms_iou, threads);
  if (found.count < 0) return {Row{-1, -1, -1, -1, 0}};
  std::vector<int64_t> places(4 * found.count);
  std::vector<T> scores(found.count);
  d2net::cpu::copy_proposals(found, places.data(), scores.data(), threads);
  std::vector<Row> rows;
  for (int64_t i = 0; i < found.count; ++i) {
    const int64_t* p = places.data() + i;
    rows.emplace_back(p[0], p[found.count], p[2 * found.count], p[3 * found.count], scores[i]);
  }
  return rows;
}

template <typename T>
std::vector<Row> naive(const std::vector<T>& x, const Batch& s, const std::vector<char>& classes,
                       const int64_t* lengths) {
  std::vector<Row> rows;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.width; ++c) {
      if (!classes[b * s.width + c]) continue;
      const int64_t n = lengths ? std::clamp<int64_t>(lengths[b], 0, s.snippets) : s.snippets;
      const auto at = [&](int64_t t) { return x[(b * s.snippets + t) * s.width + c]; };
      std::set<std::pair<int64_t, int64_t>> segments;
      for (double threshold : s.thresholds) {
        for (int64_t start = 0, t; start < n; start = t + 1) {
          for (t = start; t < n && at(t) > T(threshold);) ++t;
          if (t > start && t - start >= s.min_length) segments.emplace(start, t);
        }
      }
      const auto sum = [&](int64_t from, int64_t to) {
        double total = 0;
        for (int64_t t = from; t < to; ++t) total += double(at(t));
        return total;
      };
      std::vector<std::tuple<double, int64_t, int64_t>> ranked;  // minus the score, start, end
      for (const auto& [start, end] : segments) {
        const int64_t reach = std::max<int64_t>(1, int64_t(s.inflation * double(end - start)));
        const int64_t left = std::max<int64_t>(0, start - reach), right = std::min(n, end + reach);
        const double before = sum(left, start), after = sum(end, right);
        const int64_t n_before = start - left, n_after = right - end;
        double outer = 0;
        if (!s.mean_of_sides && n_before + n_after > 0) outer = (before + after) / double(n_before + n_after);
        if (s.mean_of_sides && n_before > 0) outer += before / double(n_before) / (n_after > 0 ? 2 : 1);
        if (s.mean_of_sides && n_after > 0) outer += after / double(n_after) / (n_before > 0 ? 2 : 1);
        const double score = double(T(sum(start, end) / double(end - start) - outer));
        if (score >= s.min_contrast) ranked.emplace_back(-score, start, end);
      }
      std::sort(ranked.begin(), ranked.end());
      std::vector<std::pair<int64_t, int64_t>> kept;
      for (const auto& [minus, start, end] : ranked) {
        bool stays = true;
        for (const auto& [from, to] : kept) {
          const int64_t overlap = std::max<int64_t>(0, std::min(end, to) - std::max(start, from));
          stays &= !(double(overlap) / double(end - start + to - from - overlap) >= s.nms_iou);
        }
        if (!stays) continue;
        kept.emplace_back(start, end);
        rows.emplace_back(b, c, start, end, -minus);
      }
    }
  }
  return rows;
}

// A wandering sequence for each class, on a grid of 1/64 so that sums are exact and scores often tie.
template <typename T>
std::vector<T> wander(const Batch& s, unsigned seed) {
  std::vector<T> x = check::uniform<T>(s.batch * s.snippets * s.width, seed, -6, 7);
  for (int64_t i = 0; i < int64_t(x.size()); ++i) {
    const double before = i % (s.snippets * s.width) < s.width ? 32 : double(x[i - s.width]) * 64;
    x[i] = T(std::clamp(before + std::floor(double(x[i])), -8.0, 64.0) / 64);
  }
  return x;
}

template <typename T>
void equals_the_naive_version() {
  Batch s{3, 700, 11, {}};
  for (int i = 20; i > 0; --i) s.thresholds.push_back(0.025 * i);
  const std::vector<char> classes = [&] {
    std::vector<char> kept;
    for (double v : check::uniform<double>(s.batch * s.width, 3)) kept.push_back(v > 0.3);
    return kept;
  }();
  const std::vector<int64_t> lengths = {700, 90, 1000};
  for (unsigned seed : {1, 2}) {
    const auto x = wander<T>(s, seed);
    for (double nms_iou : {0.3, 0.5, 1.0}) {
      s.nms_iou = nms_iou;
      s.mean_of_sides = seed == 2;
      s.min_length = seed;
      s.min_contrast = seed == 1 ? -std::numeric_limits<double>::infinity() : -0.05;
      const auto expected = naive(x, s, classes, lengths.data());
      CHECK(expected.size() > 100);
      for (int threads : check::kThreads) CHECK(extract(x, s, classes, lengths.data(), threads) == expected);
    }
  }
}

}  // namespace

TEST(proposals_equal_the_naive_version_float) { equals_the_naive_version<float>(); }
TEST(proposals_equal_the_naive_version_double) { equals_the_naive_version<double>(); }

// As many components as snippets fill every buffer to its end.
TEST(proposals_of_a_staircase) {
  const int64_t n = 200;
  Batch s{1, n, 1, {}};
  s.nms_iou = 1;
  std::vector<double> x(n);
  for (int64_t t = 0; t < n; ++t) {
    x[t] = double(t + 1);
    s.thresholds.push_back(double(t) + 0.5);
  }
  CHECK(int64_t(extract(x, s, {1}, nullptr, 1).size()) == n);
  std::reverse(x.begin(), x.end());
  CHECK(extract(x, s, {1}, nullptr, 1) == naive(x, s, {1}, nullptr));
}

TEST(proposals_of_nothing) {
  const Batch sizes[] = {{0, 5, 3, {0.5}}, {2, 0, 3, {0.5}}, {2, 5, 0, {0.5}}};
  for (const Batch& s : sizes) {
    const std::vector<float> x(s.batch * s.snippets * s.width);
    CHECK(extract(x, s, std::vector<char>(s.batch * s.width, 1), nullptr, 2).empty());
  }
  const int64_t lengths[] = {-3, 0};
  CHECK(extract(std::vector<float>(10, 1), {2, 5, 1, {0.5}}, {1, 1}, lengths, 2).empty());
}

TEST(proposals_of_ugly_values) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<Row> refused = {Row{-1, -1, -1, -1, 0}};
  for (float broken : {nan, -nan, inf, -inf}) {
    for (int64_t place : {0, 3, 6}) {
      std::vector<float> x(14, 0.25f);
      x[2 * place] = broken;
      CHECK(extract(x, {1, 7, 2, {0.5, 0.1}}, {1, 1}, nullptr, 2) == refused);
      CHECK(extract(x, {1, 7, 2, {0.5, 0.1}}, {0, 1}, nullptr, 2).size() == 1);
    }
  }
  const double top = std::numeric_limits<double>::max();
  CHECK(extract(std::vector<double>{top, top, -top, -top}, {1, 4, 1, {0}}, {1}, nullptr, 1) == refused);
  // Finite, but the scores are not in float.
  const float most = std::numeric_limits<float>::max();
  std::vector<float> x;
  for (int i = 0; i < 300; ++i) x.push_back(i % 3 ? most : -most);
  Batch s{1, 300, 1, {0, 1e300, -1e300}};
  s.inflation = 1e308;
  CHECK(!extract(x, s, {1}, nullptr, 1).empty());
  const float least = std::numeric_limits<float>::denorm_min();
  for (float& v : x) v = v > 0 ? least : -0.0f;
  s.inflation = 0.25;
  CHECK(extract(x, s, {1}, nullptr, 1) == naive(x, s, {1}, nullptr));
}
