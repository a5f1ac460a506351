// Runs every TEST; the exit status is 1 when a CHECK failed (a sanitizer's report ends the process with its own).
#include "check.h"

int main() {
  for (const check::Test& test : check::tests()) {
    std::printf("%s\n", test.name.c_str());
    std::fflush(stdout);
    test.run();
  }
  std::printf("%zu tests, %d failures\n", check::tests().size(), check::failures());
  return check::tests().empty() || check::failures() > 0;
}
