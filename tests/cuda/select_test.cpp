// Sequences that are one pool each, of every length that a kernel is made for.

#include <doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "select_problem.h"

namespace pmod::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

TEST_CASE("one sequence of any length is selected from") {
  Random random(1);
  // the ends of the range of each variant of the kernel, and those of the longer way
  for (const int64_t rows : {1, 2, 31, 32, 33, 255, 1023, 1024, 1025, 2048, 2049, 4096, 4097}) {
    SelectProblem p = one_sequence(rows, random);
    for (const int64_t k : {int64_t{1}, rows / 3, rows / 2}) {
      p.k = {static_cast<int32_t>(k)};
      check_both_layouts(p);
    }
  }
}

TEST_CASE("no rows, all rows and more than all are kept") {
  Random random(2);
  for (const int64_t rows : {1, 40, 1500}) {
    SelectProblem p = one_sequence(rows, random);
    const auto n = static_cast<int32_t>(std::count(p.kind.begin(), p.kind.end(), kRoutable));
    for (const int32_t k : {-1, 0, n - 1, n, n + 1, std::numeric_limits<int32_t>::max()}) {
      p.k = {k};
      check_both_layouts(p);
    }
  }
}

TEST_CASE("the longest sequence of one block is selected from") {
  Random random(3);
  SelectProblem p = one_sequence(16384, random);
  p.k = {5000};
  check_both_layouts(p);
}

TEST_CASE("long sequences are selected from, and short ones among them") {
  Random random(4);
  for (const std::vector<int64_t>& lengths : std::vector<std::vector<int64_t>>{
           {16385}, {70000}, {0, 700, 20000, 0, 2048, 1, 33000, 5, 0}}) {
    SelectProblem p;
    for (const int64_t length : lengths) p.add_sequence(length);
    set_random_kinds(p, random);
    set_random_logits(p, random);
    for (const int64_t length : lengths) p.k.push_back(static_cast<int32_t>(length * 2 / 5));
    check_both_layouts(p);
  }
}

TEST_CASE("a sequence has more parts than one block adds up at once") {
  Random random(14);
  SelectProblem p = one_sequence(600001, random);
  p.k = {250000};
  lay_out(p, false);
  const Selection expected = expected_selection(p), out = selected(p, 1);
  CHECK(out.index == expected.index);
  CHECK(out.inverse == expected.inverse);
}

TEST_CASE("of equal logits the first rows are kept") {
  Random random(5);
  for (const int64_t rows : {5, 1024, 1500, 5000, 40000}) {
    SelectProblem p = one_sequence(rows, random);
    for (const int64_t values : {1, 2, 5}) {
      for (float& logit : p.logits) logit = static_cast<float>(random.below(values)) - 1;
      for (const int64_t k : {int64_t{1}, rows / 4, rows / 2}) {
        p.k = {static_cast<int32_t>(k)};
        lay_out(p, false);
        check_selection(p);
      }
    }
  }
}

TEST_CASE("special numbers rank as in a stable sort") {
  Random random(6);
  const std::vector<float> special = {kInfinity, -kInfinity, kNaN,   -kNaN,
                                      0.0F,      -0.0F,      1e-45F, -1e-45F,
                                      1e38F,     1.0F,       -1e38F, of_bits<float>(~0U)};
  for (const int64_t rows : {12, 100, 1100}) {
    SelectProblem p = one_sequence(rows, random);
    for (float& logit : p.logits) {
      logit = special[random.below(static_cast<int64_t>(special.size()))];
    }
    for (int64_t k = 0; k <= rows; k += std::max<int64_t>(1, rows / 11)) {
      p.k = {static_cast<int32_t>(k)};
      lay_out(p, false);
      check_selection(p);
    }
  }
}

TEST_CASE("numbers that differ in any bit are told apart") {
  Random random(7);
  SelectProblem p = one_sequence(900, random);
  for (int bit = 0; bit < 32; bit += 3) {
    for (float& logit : p.logits) {
      logit = of_bits<float>(0x3F800000U ^ (random.below(2) == 0 ? 0U : 1U << bit));
    }
    p.k = {300};
    lay_out(p, false);
    check_selection(p);
  }
}

TEST_CASE("sequences of a batch do not mix") {
  Random random(8);
  for (int round = 0; round < 12; ++round) {
    SelectProblem p;
    const int64_t sequences = 1 + random.below(7);
    for (int64_t b = 0; b < sequences; ++b) {
      p.add_sequence(random.below(4) == 0 ? 0 : random.below(300));
      p.k.push_back(static_cast<int32_t>(random.below(5) == 0 ? 0 : random.below(200)));
    }
    set_random_kinds(p, random);
    set_random_logits(p, random);
    // a sequence that keeps nothing although it has rows
    if (p.k[0] == 0)
      std::replace(p.kind.begin(), p.kind.begin() + p.cu_seqlens[1], kAlways, kPadding);
    check_both_layouts(p);
  }
}

TEST_CASE("rows that are never kept: padding, no routable rows, an empty batch") {
  Random random(12);
  for (const uint8_t kind : {kPadding, kAlways}) {
    SelectProblem p = one_sequence(70, random);
    std::fill(p.kind.begin(), p.kind.end(), kind);
    p.k = {5};
    check_both_layouts(p);
  }
  SelectProblem empty;
  check_both_layouts(empty);
  empty.slots = 9;
  check_selection(empty);
  for (int b = 0; b < 3; ++b) empty.add_sequence(0);
  empty.k = {0, 4, 0};
  empty.slot_start = {1, 5, 5};
  empty.slots = 12;
  check_selection(empty);
}

}  // namespace
}  // namespace pmod::test
