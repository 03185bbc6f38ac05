// tanh and sigmoid of the gates.

#include <doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "ops.h"

namespace pmod::test {
namespace {

// The largest error, in units in the last place of the result.
//
// An error of the exponential within 2 units is a relative one of 2^-22 at most. Sigmoid,
// 1 / (1 + e^-v), may take all of it over, which is up to 4 units of the result; its sum and its
// quotient add a unit at most each, so 6 is what can be derived. tanh takes the exponential to
// 2 / (e^2v + 1) <= 0.45 and subtracts that from 1, which leaves half of the error; below 0.625 it
// is a polynomial times v. What is asserted is less: the largest error over all floats
// (PMOD_SWEEP_STRIDE=1), rounded up. It is 1.331 at 0.628309548 and 2.481 at -16.635704.
double most_ulps(Activation activation) { return activation == Activation::kTanh ? 1.34 : 2.49; }

double exact(double v, Activation activation) {
  return activation == Activation::kTanh ? std::tanh(v) : 1 / (1 + std::exp(-v));
}

std::vector<float> activated(cpu::Isa isa, const std::vector<float>& in, Activation activation) {
  std::vector<float> out(in.size() + 1, -7.0F);
  loops_of<float>(isa).activate(in.data(), out.data(), static_cast<int64_t>(in.size()), activation);
  CHECK(out.back() == -7.0F);
  out.pop_back();
  return out;
}

// Up to 2^7, one float in `stride`, both signs; a part at a time.
template <typename F>
void sweep(uint64_t stride, const F& f) {
  std::vector<float> part;
  for (uint64_t bits = 0; bits < 0x43000000U; bits += stride) {
    part.push_back(of_bits<float>(bits));
    part.push_back(of_bits<float>(bits | 0x80000000U));
    if (part.size() < 1U << 20 && bits + stride < 0x43000000U) continue;
    f(part);
    part.clear();
  }
}

struct Worst {
  double ulps = 0, at = 0;
};

Worst worst_error(const std::vector<float>& in, const std::vector<float>& out,
                  Activation activation) {
  Worst worst;
  for (size_t i = 0; i < in.size(); ++i) {
    const double expected = exact(in[i], activation);
    // below the normal numbers sigmoid stops getting smaller; see the next test
    const bool tiny = expected < std::numeric_limits<float>::min();
    if (activation == Activation::kSigmoid && tiny) continue;
    const double error = std::abs(out[i] - expected);
    const double ulps = std::ldexp(error, -exponent_of_ulp<float>(expected));
    if (!(ulps <= worst.ulps)) worst = {ulps, in[i]};
  }
  return worst;
}

TEST_CASE("tanh and sigmoid are as exact as a float exponential allows") {
  for (const Activation activation : {Activation::kTanh, Activation::kSigmoid}) {
    Worst worst;
    sweep(PMOD_SWEEP_STRIDE, [&](const std::vector<float>& in) {
      const std::vector<float> out = activated(cpu::Isa::kBase, in, activation);
      const Worst here = worst_error(in, out, activation);
      if (!(here.ulps <= worst.ulps)) worst = here;
      for (const cpu::Isa isa : cpu::available_isas()) {
        INFO(cpu::isa_name(isa));
        CHECK(activated(isa, in, activation) == out);
      }
    });
    const std::string name = activation == Activation::kTanh ? "tanh" : "sigmoid";
    MESSAGE(name, ": within ", worst.ulps, " ulp of exact, the most at ", worst.at);
    CHECK(worst.ulps <= most_ulps(activation));
  }
}

TEST_CASE("large arguments, infinities and NaN are activated") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const cpu::Isa isa : cpu::available_isas()) {
    INFO(cpu::isa_name(isa));
    for (const float large : {10.0F, 88.0F, 89.0F, 1e4F, 3e38F, infinity}) {
      INFO(large);
      const std::vector<float> in = {large, -large};
      CHECK(activated(isa, in, Activation::kTanh) == std::vector<float>{1, -1});
      CHECK(activated(isa, in, Activation::kNone) == in);
      const std::vector<float> sigmoid = activated(isa, in, Activation::kSigmoid);
      CHECK(std::abs(sigmoid[0] - exact(large, Activation::kSigmoid)) <= 0x1p-24);
      const double error = std::abs(sigmoid[1] - exact(-large, Activation::kSigmoid));
      CHECK(error <= std::max(double{std::numeric_limits<float>::min()}, sigmoid[1] * 0x1p-22));
      CHECK(sigmoid[1] >= 0);
    }
    const std::vector<float> zeros = activated(isa, {0.0F, -0.0F}, Activation::kTanh);
    CHECK(bits_of(zeros[0]) == 0);
    CHECK(bits_of(zeros[1]) == 0x80000000U);
    CHECK(activated(isa, {0.0F, -0.0F}, Activation::kSigmoid) == std::vector<float>{0.5F, 0.5F});
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (const auto activation : {Activation::kNone, Activation::kTanh, Activation::kSigmoid}) {
      const std::vector<float> out = activated(isa, {1.0F, nan, -nan, 1.0F}, activation);
      CHECK_FALSE(std::isnan(out[0]));
      CHECK(std::isnan(out[1]));
      CHECK(std::isnan(out[2]));
      CHECK(out[3] == out[0]);
    }
  }
}

TEST_CASE("where a logit stands in its block does not matter") {
  sweep(1U << 20, [](const std::vector<float>& in) {
    for (const cpu::Isa isa : cpu::available_isas()) {
      for (const Activation activation : {Activation::kTanh, Activation::kSigmoid}) {
        const std::vector<float> together = activated(isa, in, activation);
        for (size_t i = 0; i < in.size(); ++i) {
          REQUIRE(activated(isa, {in[i]}, activation)[0] == together[i]);
        }
      }
    }
  });
}

TEST_CASE("gates of float64 rows are those of the standard library") {
  const std::vector<double> in = {0.0, -0.5, 3.0, -800.0, 800.0};
  for (const cpu::Isa isa : cpu::available_isas()) {
    std::vector<double> out(in.size());
    for (const Activation activation : {Activation::kTanh, Activation::kSigmoid}) {
      loops_of<double>(isa).activate(in.data(), out.data(), 5, activation);
      for (size_t i = 0; i < in.size(); ++i) CHECK(out[i] == exact(in[i], activation));
    }
  }
}

}  // namespace
}  // namespace pmod::test
