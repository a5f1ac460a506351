#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/common/parallel.h"

using d2net::cpu::parallel_for;

TEST(parallel_for_covers_every_index_once) {
  for (int threads : check::kThreads) {
    for (int64_t n : {0, 1, 2, 7, 1000}) {
      for (int64_t grain : {0, 1, 3, 2000}) {
        std::vector<int> visits(n, 0);  // disjoint ranges: no two threads touch one element
        parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++visits[i];
        });
        for (int v : visits) CHECK(v == 1);
      }
    }
  }
}

TEST(parallel_for_rethrows_and_works_again) {
  for (int round = 0; round < 20; ++round) {
    bool caught = false;
    try {
      parallel_for(100, 1, 4, [](int64_t begin, int64_t) {
        if (begin > 50) throw std::runtime_error("expected");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    CHECK(caught);
  }
}

TEST(parallel_for_called_from_many_threads_and_from_itself) {
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        parallel_for(16, 1, 3, [&](int64_t begin, int64_t end) {
          parallel_for(end - begin, 1, 3, [&](int64_t b, int64_t e) { sum += e - b; });
        });
      }
    });
  }
  for (std::thread& c : callers) c.join();
  CHECK(sum == 4 * 50 * 16);
}
