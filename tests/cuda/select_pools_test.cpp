// Sequences of several pools, and plans that do not fit.

#include <doctest.h>

#include <limits>
#include <vector>

#include "select_problem.h"

namespace pmod::test {
namespace {

TEST_CASE("every pool keeps its own, and pools may interleave") {
  Random random(9);
  for (int round = 0; round < 12; ++round) {
    SelectProblem p;
    const int64_t sequences = 1 + random.below(3);
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t length = random.below(1 + 600 * (1 + round % 3)), pools = random.below(5);
      p.add_sequence(length);
      const auto first = static_cast<int32_t>(p.k.size());
      for (int64_t r = 0; r < length; ++r) {
        const int64_t image = round % 2 == 0 ? random.below(pools + 1) : r * (pools + 1) / length;
        p.pool_id.push_back(first + static_cast<int32_t>(image));
      }
      for (int64_t i = 0; i <= pools; ++i) {
        p.k.push_back(static_cast<int32_t>(random.below(4) == 0 ? 0 : random.below(300)));
      }
    }
    if (p.rows() == 0) continue;
    set_random_kinds(p, random);
    for (float& logit : p.logits) {
      logit = static_cast<float>(round % 4 < 2 ? random.normal()
                                               : static_cast<double>(random.below(4)));
    }
    check_both_layouts(p);
  }
}

TEST_CASE("a row may be alone in its pool, wherever it is") {
  Random random(12);
  for (const int64_t place : {0, 1, 2, 3, 4, 31, 32, 127, 128, 255, 256, 511, 512, 768, 1023}) {
    SelectProblem p;
    p.add_sequence(1024);
    set_random_logits(p, random);
    p.pool_id.assign(1024, 1);
    p.k = {1, 0, 1};
    for (const int32_t pool : {0, 2}) {
      p.pool_id[place] = pool;
      check_both_layouts(p);
    }
  }
}

TEST_CASE("pools of long sequences") {
  Random random(10);
  SelectProblem p;
  p.add_sequence(100);
  p.add_sequence(20000);
  set_random_kinds(p, random);
  for (float& logit : p.logits) logit = static_cast<float>(random.below(100));
  for (int64_t r = 0; r < p.rows(); ++r) {
    const int64_t image = r < 100 ? 0 : r < 9000 ? 1 + r / 3000 : 5 + random.below(3);
    p.pool_id.push_back(static_cast<int32_t>(image));
  }
  p.k = {7, 3000, 100, 0, 1500, 1, 900, 5000};
  check_both_layouts(p);
}

TEST_CASE("rows of a pool that does not exist are not kept") {
  Random random(11);
  SelectProblem p = one_sequence(500, random);
  const std::vector<int32_t> ids = {
      0, 1, 2, -1, 3, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};
  for (int64_t r = 0; r < p.rows(); ++r) p.pool_id.push_back(ids[random.below(7)]);
  p.k = {10, 500, 30};
  check_both_layouts(p);
  p.k = {};
  check_both_layouts(p);
}

// The kernels cannot refuse it, but stay inside their memory. Two sequences may own one slot then:
// a race, if a harmless one.
TEST_CASE("a plan that does not fit its rows does no harm" *
          doctest::skip(simt::kThreadSanitizer)) {
  Random random(13);
  for (const std::vector<int32_t>& start : std::vector<std::vector<int32_t>>{
           {0, 0}, {-50, 3}, {90, 20}, {std::numeric_limits<int32_t>::max(), 0}, {10, 100000}}) {
    SelectProblem p = one_sequence(200, random);
    p.add_sequence(100);
    p.k = {150, 90};
    p.slot_start = start;
    p.slots = 100;
    for (const bool long_way : {false, true}) {
      if (long_way) p.max_length = cuda::kOneBlockRows + 1;
      const Selection out = selected(p, 1);
      for (int64_t r = 0; r < p.rows(); ++r) {
        REQUIRE(out.inverse[r] >= -1);
        REQUIRE(out.inverse[r] < p.slots);
      }
    }
  }
}

}  // namespace
}  // namespace pmod::test
