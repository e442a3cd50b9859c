// The C++ test harness: TEST(name) { ... } registers a test, the CHECKs record a failure and
// go on, main.cc runs every test and returns non-zero when a check failed or no test was
// registered. Of our own, so that CMake and Bazel need nothing installed.

#ifndef JAXMOE_XLA_FFI_TESTS_CHECK_H_
#define JAXMOE_XLA_FFI_TESTS_CHECK_H_

#include <cstddef>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

namespace jaxmoe::testing {

// Adds a test to those that main runs, in order of registration. Returns true.
bool Register(const char* name, void (*run)());

// Records a failed check of the running test. Any thread may call it.
void Fail(const char* file, int line, const std::string& message);

// Failed checks of this process so far: what a forked process has to report.
int NumFailures();

template <typename T>
void Print(std::ostream& out, const T& value) {
  out << value;
}

template <typename T>
void Print(std::ostream& out, const std::vector<T>& values) {
  out << "{";
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) out << ", ";
    Print(out, values[i]);
  }
  out << "}";
}

template <typename A, typename B>
void CheckEq(const A& got, const B& want, const char* expression, const char* file, int line) {
  if (got == want) return;
  std::ostringstream message;
  message << expression << ": got ";
  Print(message, got);
  message << ", want ";
  Print(message, want);
  Fail(file, line, message.str());
}

inline void CheckContains(const std::string& text, const std::string& part, const char* file,
                          int line) {
  if (text.find(part) != std::string::npos) return;
  Fail(file, line, "\"" + part + "\" is not in \"" + text + "\"");
}

}  // namespace jaxmoe::testing

#define TEST(name)                                                                               \
  static void name();                                                                            \
  [[maybe_unused]] static const bool name##_registered = jaxmoe::testing::Register(#name, name); \
  static void name()

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) jaxmoe::testing::Fail(__FILE__, __LINE__, #condition); \
  } while (false)

// Equality of two printable values, or vectors of them; both are printed when they differ.
#define CHECK_EQ(got, want) \
  jaxmoe::testing::CheckEq((got), (want), #got " == " #want, __FILE__, __LINE__)

// The text has the part in it.
#define CHECK_CONTAINS(text, part) \
  jaxmoe::testing::CheckContains((text), (part), __FILE__, __LINE__)

#endif  // JAXMOE_XLA_FFI_TESTS_CHECK_H_
