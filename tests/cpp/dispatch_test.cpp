// The choice of an instruction set, each in a process of its own: it is made once.

#include <doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace pmod::test {
namespace {

template <typename T>
bool uses(cpu::Isa isa) {
  return &cpu::row_loops<T>() == &loops_of<T>(isa);
}

// The name of the level that is used, or the error.
std::string choice() {
  try {
    const cpu::Isa isa = cpu::active_isa();
    const bool used = uses<float>(isa) && uses<double>(isa) && uses<Bf16>(isa) && uses<F16>(isa);
    return used ? cpu::isa_name(isa) : "a table of another level";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

std::string chosen_with(const char* environment) {
  std::cout.flush();  // else the child may print it again
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    if (environment == nullptr) {
      unsetenv("PMOD_CPU_ISA");
    } else {
      setenv("PMOD_CPU_ISA", environment, 1);
    }
    const std::string text = choice();
    const bool written = write(ends[1], text.data(), text.size()) >= 0;
    _exit(written ? 0 : 1);
  }
  close(ends[1]);
  std::string text;
  char buffer[256];
  for (ssize_t n = 0; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, n);
  close(ends[0]);
  int status = 1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
  return text;
}

TEST_CASE("the best level is used, or the one that PMOD_CPU_ISA names") {
  const std::string best = cpu::isa_name(cpu::available_isas().back());
  CHECK(chosen_with(nullptr) == best);
  CHECK(chosen_with("") == best);
  std::string names;
  for (const cpu::Isa isa : cpu::available_isas()) {
    const std::string name = cpu::isa_name(isa);
    CHECK(chosen_with(name.c_str()) == name);
    names += (names.empty() ? "" : ", ") + name;
  }
  MESSAGE("levels: ", names);
  for (const char* other : {"sse9", "AVX2", "base,avx2"}) {
    CHECK(chosen_with(other) ==
          "pmod_ops: PMOD_CPU_ISA: expected one of " + names + " on this CPU, got " + other);
  }
}

TEST_CASE("the levels are those of the processor, the lowest first") {
  const auto& levels = cpu::available_isas();
  CHECK(levels.front() == cpu::Isa::kBase);
  CHECK(std::is_sorted(levels.begin(), levels.end()));
#if !defined(__x86_64__)
  CHECK(levels.size() == 1);
#endif
}

}  // namespace
}  // namespace pmod::test
