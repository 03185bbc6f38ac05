// Widening and rounding of the 16-bit row types, of every pattern and at every midpoint.

#include <doctest.h>

#include <vector>

#include "ops.h"

namespace pmod::test {
namespace {

constexpr int64_t kPatterns = 1 << 16;

// Rounds floats in the loop of gather_rmsnorm: a row of ones has the norm 1, times the weight.
template <typename T>
std::vector<T> rounded(cpu::Isa isa, const std::vector<float>& floats) {
  const auto size = static_cast<int64_t>(floats.size());
  std::vector<float> weight(cpu::padded(size)), blocks(cpu::padded(size));
  std::copy(floats.begin(), floats.end(), weight.begin());
  loops_of<T>(isa).arrange(weight.data(), blocks.data(), cpu::padded(size));
  const std::vector<T> ones(size, nearest<T>(1.0));
  std::vector<T> out(size);
  const int32_t index = 0;
  float rstd = 0;
  const cpu::GatherRmsnorm<T> loop{.x = ones.data(),
                                   .index = &index,
                                   .weight = {.blocks = blocks.data()},
                                   .eps = 0,
                                   .rows = out.data(),
                                   .rstd = &rstd,
                                   .hidden = size,
                                   .streaming = false};
  loops_of<T>(isa).gather_rmsnorm(loop, 0, 1);
  REQUIRE(rstd == 1.0F);
  return out;
}

template <typename T>
bool flushes(cpu::Isa isa) {
  return std::is_same_v<T, Bf16> && isa == cpu::Isa::kAvx512Bf16;
}

template <typename T>
void check_rounding(cpu::Isa isa, const std::vector<float>& floats) {
  const std::vector<T> actual = rounded<T>(isa, floats);
  int64_t wrong = 0, flushed = 0;
  for (size_t i = 0; i < floats.size(); ++i) {
    if (std::isnan(floats[i])) {
      // quiet, that is with the first bit of the fraction set
      const bool quiet = (actual[i].bits >> (Format<T>::kDigits - 2) & 1) != 0;
      wrong += std::isnan(value(actual[i])) && quiet ? 0 : 1;
      continue;
    }
    const bool tiny = std::abs(floats[i]) < std::numeric_limits<float>::min();
    const T expected =
        nearest<T>(tiny && flushes<T>(isa) ? std::copysign(0.0, floats[i]) : double{floats[i]});
    flushed += bits_of(expected) == bits_of(nearest<T>(floats[i])) ? 0 : 1;
    if (bits_of(actual[i]) == bits_of(expected)) continue;
    INFO(floats[i], " to ", actual[i].bits, ", expected ", expected.bits);
    CHECK(++wrong > 1);  // shows the first one
  }
  CHECK(wrong == 0);
  if (!flushes<T>(isa)) CHECK(flushed == 0);
}

TEST_CASE_TEMPLATE("every half widens exactly", T, Bf16, F16) {
  std::vector<T> halves;
  for (int64_t bits = 0; bits < kPatterns; ++bits) halves.push_back(of_bits<T>(bits));
  for (int64_t bits = 17; bits > 0; --bits) halves.push_back(of_bits<T>(bits));  // part of a block
  for (const cpu::Isa isa : cpu::available_isas()) {
    INFO(cpu::isa_name(isa));
    std::vector<float> wide(halves.size() + 1, -1.0F);
    loops_of<T>(isa).widen(halves.data(), wide.data(), static_cast<int64_t>(halves.size()));
    int64_t wrong = 0;
    for (size_t i = 0; i < halves.size(); ++i) {
      wrong += same_number(wide[i], static_cast<float>(value(halves[i]))) ? 0 : 1;
    }
    CHECK(wrong == 0);
    CHECK(wide.back() == -1.0F);
  }
}

TEST_CASE_TEMPLATE("whole numbers widen to themselves", T, float, double) {
  Random random(1);
  for (const cpu::Isa isa : cpu::available_isas()) {
    for (const int64_t size : {1, 63, 64, 65, 1000}) {
      std::vector<T> from, to(size + 1, T(-1));
      for (int64_t i = 0; i < size; ++i) from.push_back(static_cast<T>(random.normal()));
      loops_of<T>(isa).widen(from.data(), to.data(), size);
      CHECK(std::equal(from.begin(), from.end(), to.begin()));
      CHECK(to.back() == T(-1));
    }
  }
}

// The midpoint above every half, and the floats next to it.
TEST_CASE_TEMPLATE("floats round to nearest, ties to even", T, Bf16, F16) {
  std::vector<float> floats;
  const double largest = std::ldexp(1.0, Format<T>::kMost + 1);
  for (int64_t bits = 0; bits < kPatterns; ++bits) {
    const double low = value(of_bits<T>(bits));
    if (!std::isfinite(low)) continue;
    // beyond the largest finite half the next one would be this; then all is infinite
    const double size = std::abs(low);
    const double next = std::abs(value(of_bits<T>((bits & 0x7FFF) + 1)));
    const double high = std::isfinite(next) ? next : largest;
    const auto middle = static_cast<float>(std::copysign((size + high) / 2, low));
    REQUIRE(double{std::abs(middle)} == (size + high) / 2);
    const auto exact = static_cast<float>(low);
    floats.insert(floats.end(), {exact, std::nextafter(middle, 0.0F), middle,
                                 std::nextafter(middle, 2 * middle), std::nextafter(exact, 0.0F)});
  }
  for (const cpu::Isa isa : cpu::available_isas()) {
    INFO(cpu::isa_name(isa));
    check_rounding<T>(isa, floats);
  }
}

TEST_CASE_TEMPLATE("denormals, large numbers, infinities and NaN round", T, Bf16, F16) {
  std::vector<float> floats;
  for (uint64_t sign : {0x00000000U, 0x80000000U}) {
    for (uint64_t bits = 0; bits < 0x7FFFFFFFU; bits += 0x10FFFU) {
      floats.push_back(of_bits<float>(sign | bits));
    }
    for (uint64_t bits : {0x00000000U, 0x00000001U, 0x007FFFFFU, 0x00800000U, 0x7F7FFFFFU,
                          0x7F800000U, 0x7F800001U, 0x7FBFFFFFU, 0x7FC00000U, 0x7FFFFFFFU}) {
      floats.push_back(of_bits<float>(sign | bits));
    }
  }
  for (const cpu::Isa isa : cpu::available_isas()) {
    INFO(cpu::isa_name(isa));
    check_rounding<T>(isa, floats);
  }
}

TEST_CASE("only avx512_bf16 takes bfloat16 denormals for zero") {
  const std::vector<float> tiny = {1e-39F, -1e-39F, 0x1p-133F, -0x1p-127F};
  for (const cpu::Isa isa : cpu::available_isas()) {
    INFO(cpu::isa_name(isa));
    const std::vector<Bf16> out = rounded<Bf16>(isa, tiny);
    for (size_t i = 0; i < tiny.size(); ++i) {
      CHECK((value(out[i]) == 0) == flushes<Bf16>(isa));
      CHECK(std::signbit(value(out[i])) == std::signbit(tiny[i]));
    }
  }
}

}  // namespace
}  // namespace pmod::test
