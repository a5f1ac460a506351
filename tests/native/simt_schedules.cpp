// Kernels whose blocks work together, in other orders than the one in which all tests run.
#include <set>
#include <utility>

#include "check.h"
#include "simt/simt.h"

TEST(simt_schedules) {
  const std::set<std::string> chosen = {"cuda_nms_with_ugly_values", "cuda_proposals_equal_the_cpu_float",
                                        "cuda_loss_of_half_precision"};
  for (const auto& [resident_blocks, seed] : {std::pair(1, 1), std::pair(3, 2)}) {
    d2net::simt::set_schedule(resident_blocks, seed);
    size_t found = 0;
    for (const check::Test& test : check::tests()) {
      if (chosen.count(test.name) == 0) continue;
      test.run();
      ++found;
    }
    CHECK(found == chosen.size());
  }
  d2net::simt::set_schedule(d2net::simt::kResidentBlocks, 0);
}
