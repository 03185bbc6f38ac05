// The k-th largest logit against a stable sort.

#include <doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "buffer.h"
#include "common/radix_select.h"

namespace pmod::test {
namespace {

// NaN is largest; -0 equals +0.
template <typename A>
bool ranks_above(A a, A b) {
  return std::isnan(a) ? !std::isnan(b) : a > b;
}

template <typename A>
std::vector<A> special_numbers() {
  using Limits = std::numeric_limits<A>;
  return {A(0),
          A(-0.0),
          A(1),
          A(-1),
          Limits::min(),
          -Limits::min(),
          Limits::max(),
          Limits::lowest(),
          Limits::denorm_min(),
          -Limits::denorm_min(),
          Limits::infinity(),
          -Limits::infinity(),
          Limits::quiet_NaN(),
          -Limits::quiet_NaN(),
          Limits::signaling_NaN()};
}

// Takes the k first of a stable sort, for every k in `ks`, and those above the threshold.
template <typename A>
void check_selection(const std::vector<A>& logits, const std::vector<int64_t>& ks) {
  const auto n = static_cast<int64_t>(logits.size());
  std::vector<SortKey<A>> keys;
  for (const A logit : logits) keys.push_back(sort_key(logit));
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return ranks_above(logits[a], logits[b]); });
  for (const int64_t k : ks) {
    INFO("n ", n, " k ", k);
    auto [key, ties] = kth_largest(keys.data(), n, k);
    std::vector<int64_t> kept;
    for (int64_t i = 0; i < n; ++i) {
      if (keys[i] > key || (keys[i] == key && ties-- > 0)) kept.push_back(i);
    }
    std::vector<int64_t> expected(order.begin(), order.begin() + k);
    std::sort(expected.begin(), expected.end());
    CHECK(kept == expected);
  }
}

std::vector<int64_t> from_1_to(int64_t n) {
  std::vector<int64_t> ks;
  for (int64_t k = 1; k <= n; ++k) ks.push_back(k);
  return ks;
}

TEST_CASE_TEMPLATE("keys sort like logits", A, float, double) {
  std::vector<A> numbers = special_numbers<A>();
  Random random(2);
  for (int i = 0; i < 300; ++i) numbers.push_back(of_bits<A>(random.bits()));
  for (const A a : numbers) {
    for (const A b : numbers) {
      REQUIRE((sort_key(a) > sort_key(b)) == ranks_above(a, b));
      REQUIRE((sort_key(a) == sort_key(b)) == (!ranks_above(a, b) && !ranks_above(b, a)));
    }
  }
}

TEST_CASE_TEMPLATE("special numbers are selected like a stable sort does", A, float, double) {
  Random random(3);
  const std::vector<A> special = special_numbers<A>();
  for (const int64_t n : {1, 2, 3, 15, 64, 200}) {
    std::vector<A> logits;
    for (int64_t i = 0; i < n; ++i) {
      logits.push_back(special[random.below(static_cast<int64_t>(special.size()))]);
    }
    check_selection(logits, from_1_to(n));
  }
}

TEST_CASE_TEMPLATE("numbers of every size are selected", A, float, double) {
  Random random(4);
  for (const int64_t n : {1, 7, 100, 333}) {
    std::vector<A> any, normal, few;
    for (int64_t i = 0; i < n; ++i) {
      any.push_back(of_bits<A>(random.bits()));
      normal.push_back(static_cast<A>(random.normal()));
      few.push_back(static_cast<A>(random.below(5)) - 2);
    }
    for (const auto& logits : {any, normal, few}) check_selection(logits, from_1_to(n));
  }
}

TEST_CASE_TEMPLATE("many numbers are selected", A, float, double) {
  Random random(5);
  for (const int64_t n : {2049, 100000}) {
    std::vector<A> normal, few, same(n, A(-3));
    for (int64_t i = 0; i < n; ++i) {
      normal.push_back(static_cast<A>(random.normal()));
      few.push_back(static_cast<A>(random.below(9)) / 8);
    }
    std::vector<int64_t> ks = {1, 2, n / 2, n - 1, n};
    for (int i = 0; i < 5; ++i) ks.push_back(1 + random.below(n));
    for (const auto& logits : {normal, few, same}) check_selection(logits, ks);
  }
}

}  // namespace
}  // namespace pmod::test
