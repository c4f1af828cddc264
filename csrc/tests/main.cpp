// Runs every test, or those whose names contain the first argument; exits with 1 if a check failed or none ran.

#include <cstdio>
#include <string>

#include "check.h"

int main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";
  int ran = 0;
  for (const testing::Test& test : testing::tests()) {
    if (std::string(test.name).find(filter) == std::string::npos) continue;
    testing::current_test() = test.name;
    const int before = testing::failures();
    test.body();
    std::printf("%s %s\n", testing::failures() == before ? "pass" : "FAIL", test.name);
    ++ran;
  }
  std::printf("%d tests, %d failed checks\n", ran, testing::failures());
  return ran == 0 || testing::failures() != 0;
}
