// What tools/mutate.py writes into copies of the kernels: every mutant is there, and the
// environment variable PMOD_MUTANT says which one a process runs, so that one build serves them
// all. At its end the process adds the numbers of those that it came by to the file
// PMOD_MUTANTS_REACHED.
#pragma once

#include <array>
#include <cstdlib>
#include <fstream>

namespace mutant {

// The exit code of a mutant whose expression C++ does not have, as the sum of two pointers.
constexpr int kNoCode = 77;

inline const int active = [] {
  const char* number = std::getenv("PMOD_MUTANT");
  return number == nullptr ? -1 : std::atoi(number);
}();

struct Reached {
  std::array<bool, 4096> mutants{};
  ~Reached() {
    const char* path = std::getenv("PMOD_MUTANTS_REACHED");
    if (path == nullptr) return;
    std::ofstream file(path, std::ios::app);
    for (size_t i = 0; i < mutants.size(); ++i) {
      if (mutants[i]) file << i << '\n';
    }
  }
};
inline Reached reached;

template <int kNumber>
[[gnu::always_inline]] inline bool acts() {
  reached.mutants[kNumber] = true;
  return active == kNumber;
}

// How far a subscript or a bound is off.
template <int kNumber>
[[gnu::always_inline]] inline int step() {
  return acts<kNumber>() ? 1 : 0;
}

// `a < Other<7>{} < b` is a < b, or a <= b in mutant 7. So it is with each operator and its
// opposite, at the operator's own place in the order of evaluation.
template <int kNumber>
struct Other {};

template <typename A>
struct Left {
  A a;
  bool other;
};

#define MUTANT_OPERATOR(sign, opposite)                                      \
  template <typename A, int kNumber>                                         \
  [[gnu::always_inline]] inline Left<A> operator sign(A a, Other<kNumber>) { \
    return {a, acts<kNumber>()};                                             \
  }                                                                          \
  template <typename A, typename B>                                          \
  [[gnu::always_inline]] inline auto operator sign(Left<A> left, B b) {      \
    if constexpr (requires { left.a opposite b; }) {                         \
      return left.other ? left.a opposite b : left.a sign b;                 \
    } else {                                                                 \
      if (left.other) std::_Exit(kNoCode);                                   \
      return left.a sign b;                                                  \
    }                                                                        \
  }
MUTANT_OPERATOR(<, <=)
MUTANT_OPERATOR(<=, <)
MUTANT_OPERATOR(>, >=)
MUTANT_OPERATOR(>=, >)
MUTANT_OPERATOR(==, !=)
MUTANT_OPERATOR(!=, ==)
MUTANT_OPERATOR(+, -)
MUTANT_OPERATOR(-, +)
#undef MUTANT_OPERATOR

}  // namespace mutant
