// The least a test program needs: checks that say where, in which test and by how much.

#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace testing {

struct Test {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline const char*& current_test() {
  static const char* name = "";
  return name;
}

struct Registration {
  Registration(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

constexpr int kMaxReports = 20;

template <typename... Args>
void fail(const char* file, int line, const char* condition, const char* format, Args... args) {
  if (++failures() > kMaxReports) return;
  std::fprintf(stderr, "%s:%d: %s: %s is false: ", file, line, current_test(), condition);
  std::fprintf(stderr, format, args...);
  std::fprintf(stderr, "\n");
}

}  // namespace testing

#define TEST(name)                                                            \
  static void test_##name();                                                  \
  static const testing::Registration registration_##name(#name, test_##name); \
  static void test_##name()

// CHECK(condition, format, numbers...): goes on after a failure; the program then exits with 1.
#define CHECK(condition, ...)                                                     \
  do {                                                                            \
    if (!(condition)) testing::fail(__FILE__, __LINE__, #condition, __VA_ARGS__); \
  } while (false)

// An exception of the given type whose message begins with `prefix`.
#define CHECK_THROWS(statement, exception, prefix)                                                      \
  do {                                                                                                  \
    std::string message = "nothing thrown";                                                             \
    try {                                                                                               \
      statement;                                                                                        \
    } catch (const exception& error) {                                                                  \
      message = error.what();                                                                           \
    }                                                                                                   \
    CHECK(message.rfind(prefix, 0) == 0, "expected \"%s...\", got \"%s\"", std::string(prefix).c_str(), \
          message.c_str());                                                                             \
  } while (false)
