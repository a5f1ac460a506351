// Runs every TEST, or those that are named, each in a process of its own: the thread sanitizer gets slower with every
// thread that it has known. (It would see nothing in them if this process had threads.) The exit status is 1 when a
// CHECK failed or a sanitizer reported something. deliberate_fault runs where it is named: it must be reported.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "check.h"

// To the address sanitizer an index past the end, to the thread sanitizer a race.
TEST(deliberate_fault) {
  std::vector<int> numbers(1);
  volatile size_t end = numbers.size();
  int* const data = numbers.data();
  CHECK(data[end] == data[end]);
  std::thread other([data] { ++data[0]; });
  ++data[0];
  other.join();
}

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
    const bool named = std::find(argv + 1, argv + argc, test.name) != argv + argc;
    if (argc > 1 ? !named : test.name == "deliberate_fault") continue;
    const bool passed = passes(test);
    if (!passed) std::fprintf(stderr, "FAILED: %s\n", test.name.c_str());
    failed += passed ? 0 : 1;
    ++run;
  }
  std::printf("%zu tests, %zu failures\n", run, failed);
  return run == 0 || failed > 0;
}
