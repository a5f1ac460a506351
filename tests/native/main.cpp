// Runs every TEST, or those that are named; the exit status is 1 when a CHECK failed (a sanitizer's report ends the
// process with its own).
#include <algorithm>

#include "check.h"

int main(int argc, char** argv) {
  size_t run = 0;
  for (const check::Test& test : check::tests()) {
    if (argc > 1 && std::find(argv + 1, argv + argc, test.name) == argv + argc) continue;
    std::printf("%s\n", test.name.c_str());
    std::fflush(stdout);
    test.run();
    ++run;
  }
  std::printf("%zu tests, %d failures\n", run, check::failures());
  return run == 0 || check::failures() > 0;
}
