// Runs every TEST, or those that are named, each in a process of its own: the thread sanitizer gets slower with every
// thread that it has known. The exit status is 1 when a CHECK failed or a sanitizer reported something.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "check.h"

// Read by the thread sanitizer: it would wait a second for other threads, which have ended.
extern "C" const char* __tsan_default_options() { return "atexit_sleep_ms=0"; }

namespace {

bool passes(const check::Test& test) {
  std::printf("%s\n", test.name.c_str());
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    test.run();
    std::exit(check::failures() > 0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status == 0;
}

}  // namespace

int main(int argc, char** argv) {
  size_t run = 0, failed = 0;
  for (const check::Test& test : check::tests()) {
    if (argc > 1 && std::find(argv + 1, argv + argc, test.name) == argv + argc) continue;
    const bool passed = passes(test);
    if (!passed) std::fprintf(stderr, "FAILED: %s\n", test.name.c_str());
    failed += passed ? 0 : 1;
    ++run;
  }
  std::printf("%zu tests, %zu failures\n", run, failed);
  return run == 0 || failed > 0;
}
