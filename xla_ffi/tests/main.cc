// Runs the tests that check.h registered.

#include <atomic>
#include <cstdio>
#include <vector>

#include "xla_ffi/tests/check.h"

namespace jaxmoe::testing {
namespace {

struct Test {
  const char* name;
  void (*run)();
};

// A function's static, because registration runs before main in an unspecified order of files.
std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}

std::atomic<int> num_failures{0};

}  // namespace

bool Register(const char* name, void (*run)()) {
  Tests().push_back({name, run});
  return true;
}

void Fail(const char* file, int line, const std::string& message) {
  num_failures.fetch_add(1);
  std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", file, line, message.c_str());
}

int NumFailures() { return num_failures.load(); }

}  // namespace jaxmoe::testing

int main() {
  using namespace jaxmoe::testing;
  int num_failed_tests = 0;
  for (const Test& test : Tests()) {
    const int before = num_failures.load();
    test.run();
    const bool failed = num_failures.load() != before;
    num_failed_tests += failed;
    std::printf("%s %s\n", failed ? "FAILED" : "ok    ", test.name);
  }
  std::printf("%zu tests, %d failed\n", Tests().size(), num_failed_tests);
  return num_failed_tests == 0 && !Tests().empty() ? 0 : 1;
}
