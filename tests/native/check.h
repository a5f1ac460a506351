// A test framework of forty lines: TEST(name) { CHECK(condition); } in any file, run by main.cpp.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace check {

struct Test {
  std::string name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool add(const char* name, void (*run)()) {
  tests().push_back({name, run});
  return true;
}

template <typename T>
bool close(T a, T b, double relative, double absolute) {
  return a == b || std::abs(double(a) - double(b)) <= absolute + relative * std::abs(double(b));
}

// n values in [low, high), the same in every run.
template <typename T>
std::vector<T> uniform(int64_t n, unsigned seed, double low = 0, double high = 1) {
  std::mt19937 generator(seed);
  std::vector<T> values(n);
  for (T& v : values) v = T(low + (high - low) * (generator() / 4294967296.0));
  return values;
}

// Numbers of threads that every operator is tried with: none beside the caller, as many as here, far too many.
inline const std::vector<int> kThreads = {1, 2, 13};

}  // namespace check

#define TEST(name)                                                                  \
  static void test_##name();                                                        \
  static const bool added_##name [[maybe_unused]] = check::add(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      ++check::failures();                                                           \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                                \
  } while (false)
