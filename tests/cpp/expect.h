// Compares what an op wrote with what it should have written; one doctest check per op, however
// many elements there are.
#pragma once

#include <doctest.h>

#include <cstdint>
#include <sstream>
#include <string>

#include "bounded.h"
#include "ops.h"

namespace pmod::test {

// The largest error seen so far, as a share of its bound.
inline double largest_share = 0;

template <typename T>
class Expect {
 public:
  using B = Bounded<Acc<T>>;

  Expect(const Problem<T>& problem, const Outputs<T>& outputs) : p_(problem), out_(outputs) {}
  Expect(const Expect&) = delete;
  Expect& operator=(const Expect&) = delete;
  ~Expect() { CHECK_MESSAGE(wrong_ == 0, wrong_, " wrong entries; the first: ", first_); }

  // expected(i) is rounded to the row type here.
  template <typename F>
  void row(const char* name, int64_t r, const F& expected) {
    const T* actual = out_.rows.at(name).data() + r * p_.hidden;
    for (int64_t i = 0; i < p_.hidden; ++i) {
      near(name, r, i, value(actual[i]), round_to<T>(B(expected(i))));
    }
  }

  void copy(const char* name, int64_t r, const T* from) {
    exact(name, r, [&](int64_t i) { return bits_of(from[i]); });
  }
  void zeros(const char* name, int64_t r) {
    exact(name, r, [&](int64_t) { return Bits<T>(0); });
  }
  void untouched(const char* name, int64_t r) {
    exact(name, r, [&](int64_t) { return static_cast<Bits<T>>(~uint64_t{0}); });
  }

  void number(const char* name, int64_t i, const B& expected) {
    near(name, i, 0, out_.values.at(name)[i], expected);
  }

 private:
  void near(const char* name, int64_t r, int64_t i, double actual, const B& expected) {
    const auto distance = static_cast<double>(std::abs(actual - expected.value));
    if (distance <= expected.error) {
      if (expected.error > 0) largest_share = std::max(largest_share, distance / expected.error);
      return;
    }
    std::ostringstream text;
    text.precision(17);
    text << actual << ", expected " << static_cast<double>(expected.value) << " within "
         << expected.error;
    note(name, r, i, text.str());
  }

  template <typename F>
  void exact(const char* name, int64_t r, const F& expected) {
    const T* actual = out_.rows.at(name).data() + r * p_.hidden;
    for (int64_t i = 0; i < p_.hidden; ++i) {
      if (bits_of(actual[i]) == expected(i)) continue;
      std::ostringstream text;
      text << std::hex << "bits " << bits_of(actual[i]) << ", expected " << expected(i);
      note(name, r, i, text.str());
    }
  }

  void note(const char* name, int64_t r, int64_t i, const std::string& text) {
    if (wrong_++ > 0) return;
    first_ = std::string(name) + "[" + std::to_string(r) + ", " + std::to_string(i) + "]: " + text;
  }

  const Problem<T>& p_;
  const Outputs<T>& out_;
  int wrong_ = 0;
  std::string first_;
};

}  // namespace pmod::test
