// Scores, and the sums that end a parameter's gradient, against scalar references.

#include <doctest.h>

#include <cmath>
#include <vector>

#include "device.h"
#include "select_problem.h"

namespace pmod::test {
namespace {

enum class Bias : uint8_t { kNone, kOfRows, kFloat };

template <typename T>
std::vector<float> scores(const Device<T>& d, Bias bias, uint64_t seed) {
  const simt::ScopedOptions options({.os_threads = 1, .seed = seed});
  const Problem<T>& p = d.p;
  const T narrow = nearest<T>(0.25);
  const float wide = 0.3F;
  std::vector<float> logits = d.numbers(p.rows);
  Allowed memory;
  cuda::Score score{.x = memory.read(p.x, "x"),
                    .weight = d.router_weight(memory),
                    .kind = p.kind.data(),
                    .logits = logits.data(),
                    .rows = p.rows};
  if (bias == Bias::kOfRows) score.bias = {&narrow, kTypeOf<T>};
  if (bias == Bias::kFloat) score.bias = {&wide, cuda::RowType::kFloat};
  REQUIRE(cuda::launch_score(d.rows(), score) == cuda::kSuccess);
  return logits;
}

TEST_CASE_TEMPLATE("routable rows are scored, others are not read", T, float, Bf16, F16) {
  using B = Bounded<float>;
  for (const int64_t hidden : {1, 3, 8, 31, 200, 256, 1000, 4096, 4099, 16392, 40000}) {
    for (const int64_t offset : {0, 1}) {
      const Problem<T> p(hidden > 4100 ? 5 : 21, hidden, offset);
      int64_t routable = 0;
      for (int64_t r = 0; r < p.rows; ++r) routable += p.routable(r) ? 1 : 0;
      for (const bool wide : {false, true}) {
        const Device<T> device(p, wide);
        for (const Bias bias : {Bias::kNone, Bias::kOfRows, Bias::kFloat}) {
          INFO(Format<T>::name, " hidden ", hidden, " offset ", offset, " float weight ", wide);
          simt::reset_traffic();
          const std::vector<float> out = scores(device, bias, 0);
          REQUIRE(simt::traffic("x").read == routable * hidden * int64_t{sizeof(T)});
          REQUIRE(same_bits(scores(device, bias, 5), out));
          const double added = bias == Bias::kNone ? 0 : bias == Bias::kFloat ? 0.3F : 0.25;
          for (int64_t r = 0; r < p.rows; ++r) {
            if (!p.routable(r)) {
              REQUIRE(bits_of(out[r]) == 0);
              continue;
            }
            const T* row = p.row(p.x, r);
            const B expected =
                device_dot_product(hidden,
                                   [&](int64_t i) { return B(value(row[i])) * p.router[i]; }) +
                B(added);
            REQUIRE(std::abs(out[r] - expected.value) <= expected.error);
          }
        }
      }
    }
  }
}

TEST_CASE("no rows are scored") {
  CHECK(cuda::launch_score({cuda::RowType::kBf16, 64, nullptr}, {}) == cuda::kSuccess);
  CHECK(cuda::launch_logit_gradient({1.0F, 0.0F, Activation::kSoftmax}, {}, nullptr) ==
        cuda::kSuccess);
}

TEST_CASE("partial sums are added in double") {
  Random random(30);
  for (const int64_t count : {0, 1, 2, 15, 16, 17, 100, 256}) {
    for (const int64_t hidden : {1, 31, 32, 100}) {
      Buffer<float> partials(count * hidden, 1), out(hidden, 1);
      for (int64_t i = 0; i < partials.size(); ++i) {
        partials[i] = static_cast<float>(random.normal());
      }
      for (const uint64_t seed : {0, 4}) {
        const simt::ScopedOptions options({.os_threads = 1, .seed = seed});
        REQUIRE(cuda::launch_sum_partials(partials.data(), count, hidden, out.data(), nullptr) ==
                cuda::kSuccess);
        for (int64_t i = 0; i < hidden; ++i) {
          double sum = 0, size = 0;
          for (int64_t p = 0; p < count; ++p) {
            sum += partials[p * hidden + i];
            size += std::abs(partials[p * hidden + i]);
          }
          // two sums in double, in different orders, and one rounding
          const double bound = 0x1p-24 * std::abs(sum) + 2 * 256 * 0x1p-53 * size;
          REQUIRE(std::abs(out[i] - sum) <= bound);
        }
      }
    }
  }
  CHECK(cuda::launch_sum_partials(nullptr, 4, 0, nullptr, nullptr) == cuda::kSuccess);
}

TEST_CASE("values are added in double") {
  Random random(31);
  for (const int64_t rows : {0, 1, 31, 1000, 1024, 20000}) {
    std::vector<float> values(rows);
    double sum = 0, size = 0;
    for (float& v : values) {
      v = static_cast<float>(random.normal());
      sum += v;
      size += std::abs(v);
    }
    for (const uint64_t seed : {0, 4}) {
      const simt::ScopedOptions options({.os_threads = 1, .seed = seed});
      Buffer<float> out(1, 1);
      REQUIRE(cuda::launch_sum(values.data(), rows, out.data(), nullptr) == cuda::kSuccess);
      CHECK(std::abs(out[0] - sum) <= 0x1p-24 * std::abs(sum) + 2 * 20000 * 0x1p-53 * size);
    }
  }
}

TEST_CASE("there are as many partial sums as rows can use") {
  CHECK(cuda::parameter_partials(0) == 0);
  CHECK(cuda::parameter_partials(1) == 1);
  int64_t before = 0;
  for (int64_t rows = 0; rows < 5000; ++rows) {
    const int64_t partials = cuda::parameter_partials(rows);
    CHECK(partials >= before);
    CHECK(partials <= rows);
    before = partials;
  }
  CHECK(cuda::parameter_partials(int64_t{1} << 40) == before);
}

}  // namespace
}  // namespace pmod::test
