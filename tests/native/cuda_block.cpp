// What kernels are written with, against plain loops.
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "block_kernels.h"
#include "check.h"

using namespace d2net;

TEST(block_reductions_and_scans) {
  for (int64_t threads : {32, 64, 192}) {
    const int64_t blocks = 3, n = blocks * threads;
    std::vector<int64_t> x(n), sum(blocks), max(blocks), before(n);
    for (int64_t i = 0; i < n; ++i) x[i] = (i * 7919) % 1000 - 500;
    cuda::block_results(x.data(), blocks, threads, sum.data(), max.data(), before.data());
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t total = 0, most = x[b * threads];
      for (int64_t i = b * threads; i < (b + 1) * threads; ++i) {
        CHECK(before[i] == total);
        total += x[i];
        most = std::max(most, x[i]);
      }
      CHECK(sum[b] == total);
      CHECK(max[b] == most);
    }
  }
}

TEST(warp_votes_and_shuffles) {
  const int n = 96;
  for (int by : {0, 1, 5, 31}) {
    std::vector<int> x(n), below(n), any(n), all(n);
    std::vector<unsigned> ballot(n);
    for (int i = 0; i < n; ++i) x[i] = i / 32 == 2 ? 1 : (i * 37) % 5 - 3 + i / 32;
    cuda::warp_results(x.data(), n, by, ballot.data(), below.data(), any.data(), all.data());
    for (int i = 0; i < n; ++i) {
      const int warp = i / 32 * 32;
      unsigned bits = 0;
      for (int l = 0; l < 32; ++l) bits |= unsigned(x[warp + l] > 0) << l;
      CHECK(ballot[i] == bits);
      CHECK(below[i] == x[i - warp >= by ? i - by : i]);
      CHECK(any[i] == (i - warp >= 16 ? int(bits >> 16 != 0) : x[i ^ 1]));
      CHECK(all[i] == (i - warp >= 16 ? int(bits >> 16 == 0xffff) : 0));
    }
  }
}

TEST(atomics_and_dynamic_shared_memory) {
  const int n = 300, bins = 37;
  std::vector<int> x(n);
  std::vector<unsigned> expected(bins), counts(bins, 99);
  int expected_odd = 0, odd = 99;
  for (int i = 0; i < n; ++i) {
    x[i] = (i * i) % bins;
    ++expected[x[i]];
    expected_odd += x[i] % 2;
  }
  cuda::histogram(x.data(), n, bins, counts.data(), &odd);
  CHECK(counts == expected);
  CHECK(odd == expected_odd);
}

TEST(half_precision) {
  std::vector<float16> half(65536), half_back(65536);
  std::vector<bfloat16> brain(65536), brain_back(65536);
  std::vector<float> y(65536), z(65536);
  for (int i = 0; i < 65536; ++i) half[i].bits = brain[i].bits = uint16_t(i);
  cuda::convert(half.data(), 65536, y.data(), half_back.data());
  cuda::convert(brain.data(), 65536, z.data(), brain_back.data());
  for (int i = 0; i < 65536; ++i) {
    CHECK(y[i] != y[i] || half_back[i].bits == i);
    CHECK(z[i] != z[i] || brain_back[i].bits == i);
    CHECK((y[i] != y[i]) == ((i & 0x7fff) > 0x7c00));
  }
  CHECK(y[0x3c00] == 1 && y[0xc000] == -2 && y[0x7bff] == 65504 && y[1] == std::ldexp(1.0f, -24));
  CHECK(z[0x3f80] == 1 && z[0xc000] == -2);
  // Between two neighbours: to the nearer, in the middle to the even one; past the largest: to infinity.
  const std::vector<float> x = {2049, 2051, 65519, 65520, -1e30f, 0.75f * std::ldexp(1.0f, -24), std::ldexp(1.0f, -25)};
  const std::vector<uint16_t> expected = {0x6800, 0x6802, 0x7bff, 0x7c00, 0xfc00, 1, 0};
  std::vector<float16> rounded(x.size());
  cuda::round_to_half(x.data(), int64_t(x.size()), rounded.data());
  for (size_t i = 0; i < x.size(); ++i) CHECK(rounded[i].bits == expected[i]);
}

TEST(device_algorithms) {
  for (int64_t n : {1, 2, 1000}) {
    std::vector<uint64_t> keys(n), sorted(n);
    std::vector<int64_t> values(n), sorted_values(n), selected(n), sums(n);
    std::vector<uint8_t> keep(n);
    for (int64_t i = 0; i < n; ++i) keys[i] = uint64_t(i * 7919 % 13) << 60, values[i] = i, keep[i] = i % 3 == 0;
    int64_t count = -1;
    std::vector<char> scratch(cuda::algorithms_scratch_bytes(n));
    cuda::algorithms(keys.data(), values.data(), keep.data(), n, sorted.data(), sorted_values.data(), selected.data(),
                     &count, sums.data(), scratch.data(), int64_t(scratch.size()));
    CHECK(count == (n + 2) / 3);
    for (int64_t i = 0; i < count; ++i) CHECK(selected[i] == 3 * i);
    for (int64_t i = 0; i < n; ++i) {
      CHECK(sums[i] == i * (i - 1) / 2);
      CHECK(sorted[i] == keys[sorted_values[i]]);
      if (i > 0)
        CHECK(sorted[i - 1] < sorted[i] || (sorted[i - 1] == sorted[i] && sorted_values[i - 1] < sorted_values[i]));
    }
  }
}

static std::string refusal(int64_t grid_x, int64_t grid_y, int64_t block, int64_t shared_bytes) {
  try {
    cuda::launch_nothing(grid_x, grid_y, block, shared_bytes);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST(launches_beyond_the_hardware_are_refused) {
  CHECK(refusal(2, 1, 1024, 227 * 1024).empty());
  CHECK(refusal(0, 1, 32, 0).empty());
  CHECK(refusal(1, 65536, 32, 0).find("nothing on CUDA device 0: grid 1x65536x1, block 32x1x1") == 0);
  CHECK(refusal(int64_t(1) << 31, 1, 32, 0).find("grid must be") != std::string::npos);
  CHECK(refusal(1, 1, 1025, 0).find("1 to 1024 threads") != std::string::npos);
  CHECK(refusal(1, 1, 0, 0).find("1 to 1024 threads") != std::string::npos);
  CHECK(refusal(1, 1, 32, 227 * 1024 + 1).find("at most 232448 bytes") != std::string::npos);
}
