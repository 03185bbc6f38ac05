// Numbers with a bound on how far a loop may be from them: the references are computed with these.
//
// A reference works in the next wider type; beside each value it keeps the largest error that the
// loop's own roundings can have made. With u half the distance between 1 and the next number of the
// accumulate type, as in Higham, Accuracy and Stability of Numerical Algorithms, 2.2 and 4.2:
// * one operation: the errors of its operands carry over, and u |result| is added;
// * a sum of n products: each goes through d = n / kLanes + log2(kLanes) additions at most, so
//   d u / (1 - d u) times the sum of the sizes of all products is added;
// * rounding to a row type: half a unit in the last place of that type.
// The roundings of the wider type are counted too, so a check compares with nothing on top.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/rows/loops.h"
#include "values.h"

namespace pmod::test {

template <typename A>
struct Bounded {
  using Wide = std::conditional_t<std::is_same_v<A, double>, long double, double>;
  static constexpr double kOwnUnit = static_cast<double>(std::numeric_limits<Wide>::epsilon()) / 2;
  static constexpr double kUnit = std::numeric_limits<A>::epsilon() / 2 + kOwnUnit;

  Wide value = 0;
  double error = 0;

  Bounded() = default;
  Bounded(double exact) : value(exact) {}  // NOLINT: numbers are meant to convert
  Bounded(Wide v, double e) : value(v), error(e) {}

  double size() const { return static_cast<double>(std::abs(value)) + error; }

  // After one operation; the last part is for a result below the normal numbers.
  static Bounded rounded(Wide v, double carried) {
    const double size = static_cast<double>(std::abs(v)) + carried;
    return {v, carried + kUnit * size + std::numeric_limits<A>::denorm_min()};
  }

  friend Bounded operator+(const Bounded& a, const Bounded& b) {
    return rounded(a.value + b.value, a.error + b.error);
  }
  friend Bounded operator-(const Bounded& a, const Bounded& b) {
    return rounded(a.value - b.value, a.error + b.error);
  }
  friend Bounded operator*(const Bounded& a, const Bounded& b) {
    return rounded(a.value * b.value, a.size() * b.error + a.error * b.size());
  }
  friend Bounded operator/(const Bounded& a, const Bounded& b) {
    const Wide q = a.value / b.value;
    const double least = static_cast<double>(std::abs(b.value)) - b.error;
    return rounded(q, (a.error + static_cast<double>(std::abs(q)) * b.error) / least);
  }
};

template <typename A>
Bounded<A> square_root(const Bounded<A>& a) {
  // sqrt(a + e) - sqrt(a) is largest below a
  const double least = std::max(0.0, static_cast<double>(a.value) - a.error);
  const auto root = std::sqrt(a.value);
  return Bounded<A>::rounded(
      root, a.error == 0 ? 0 : a.error / (static_cast<double>(root) + std::sqrt(least)));
}

// The sum of `count` terms, none of which goes through more than `depth` additions.
template <typename F>
auto bounded_sum(int64_t count, int64_t depth, const F& term) {
  using B = decltype(term(int64_t{0}));
  const auto gamma = [](int64_t n, double unit) {
    const double product = static_cast<double>(n) * unit;
    return product / (1 - product);
  };
  B out;
  double sizes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const B next = term(i);
    out.value += next.value;
    out.error += next.error;
    sizes += next.size();
  }
  out.error += (gamma(depth, B::kUnit) + gamma(count, B::kOwnUnit)) * sizes;
  return out;
}

// Of a row, as the loops form it: kLanes partial sums, then the sum of those.
template <typename F>
auto dot_product(int64_t hidden, const F& term) {
  constexpr int kHalvings = std::bit_width(unsigned{cpu::kLanes - 1});
  return bounded_sum(hidden, cpu::padded(hidden) / cpu::kLanes + kHalvings, term);
}

// As a row of T holds it. avx512_bf16 takes what is below the normal numbers for zero.
template <typename T, typename A>
Bounded<A> round_to(Bounded<A> v) {
  if constexpr (kIsHalf<T>) v.error += half_ulp<T>(v.size());
  if constexpr (std::is_same_v<T, Bf16>) v.error += std::numeric_limits<float>::min();
  return v;
}

// What a product of two known numbers is after both roundings: exactly, not within a bound.
template <typename T>
double rounded_product(Acc<T> a, Acc<T> b) {
  const Acc<T> product = a * b;
  return value(nearest<T>(product));
}

}  // namespace pmod::test
