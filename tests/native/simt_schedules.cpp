// Kernels whose blocks work together, in other orders than the one in which all tests run.
#include <utility>

#include "check.h"
#include "simt/simt.h"

TEST(simt_schedules) {
  for (const auto& [resident_blocks, seed] : {std::pair(1, 1), std::pair(3, 2)}) {
    d2net::simt::set_schedule(resident_blocks, seed);
    int found = 0;
    for (const check::Test& test : check::tests()) {
      if (test.name != "cuda_nms_with_ugly_values" && test.name != "cuda_proposals_equal_the_cpu_float") continue;
      test.run();
      ++found;
    }
    CHECK(found == 2);
  }
  d2net::simt::set_schedule(d2net::simt::kResidentBlocks, 0);
}
