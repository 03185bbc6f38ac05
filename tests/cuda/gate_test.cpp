// Gates and the gradients of logits, against the same formulas in double.

#include <doctest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "select_problem.h"

namespace pmod::test {
namespace {

constexpr double kUnit = std::numeric_limits<float>::epsilon() / 2;
constexpr Activation kActivations[] = {Activation::kNone, Activation::kTanh, Activation::kSigmoid,
                                       Activation::kSoftmax};

struct Exact {
  std::vector<double> value, slope;  // of the activation; slope not of softmax
  // How far the value may be off in float, as a share of it. tanhf and expf are within 2 units in
  // the last place, which is 4 kUnit. Sigmoid: of the exponential, the sum and the quotient.
  // Softmax: the subtraction moves the argument by kUnit of its size, and so the exponential by as
  // large a share; numerator and denominator, whose terms go through at most rows / 256 + 42
  // additions, and the quotient.
  double share = 0;
};

Exact activations(const SelectProblem& p) {
  Exact out;
  for (const float z : p.logits) {
    const double t = p.gate.activation == Activation::kTanh      ? std::tanh(z)
                     : p.gate.activation == Activation::kSigmoid ? 1 / (1 + std::exp(-double{z}))
                                                                 : z;
    out.value.push_back(t);
    out.slope.push_back(p.gate.activation == Activation::kTanh      ? 1 - t * t
                        : p.gate.activation == Activation::kSigmoid ? t * (1 - t)
                                                                    : 1);
  }
  out.share = p.gate.activation == Activation::kNone ? 0 : 7 * kUnit;
  if (p.gate.activation != Activation::kSoftmax) return out;
  double spread = 0;
  for (int64_t b = 0; b < p.sequences(); ++b) {
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    const auto for_routable = [&](const auto& f) {
      for (int32_t r = p.cu_seqlens[b]; r < p.cu_seqlens[b + 1]; ++r) {
        if (p.routable(r)) f(r);
      }
    };
    for_routable([&](int32_t r) { largest = std::max(largest, double{p.logits[r]}); });
    for_routable([&](int32_t r) {
      spread = std::max(spread, largest - p.logits[r]);
      sum += out.value[r] = std::exp(p.logits[r] - largest);
    });
    for_routable([&](int32_t r) { out.value[r] /= sum; });
  }
  const double additions = static_cast<double>(p.max_length) / 256 + 42;
  out.share = (2 * (4 + spread) + additions + 2) * kUnit;
  return out;
}

SelectProblem batch(const std::vector<int64_t>& lengths, Activation activation, Random& random) {
  SelectProblem p;
  for (const int64_t length : lengths) p.add_sequence(length);
  for (int64_t r = 0; r < p.rows(); ++r) {
    const int64_t die = random.below(8);
    p.kind[r] = die == 0 ? kPadding : die == 1 ? kAlways : kRoutable;
    p.logits[r] = static_cast<float>(4 * random.normal());
  }
  p.k.assign(lengths.size(), 3);
  p.gate = {.scale = 0.3F, .bias = 0.7F, .activation = activation};
  lay_out(p, false);
  return p;
}

TEST_CASE("gates") {
  Random random(20);
  for (const Activation activation : kActivations) {
    for (const std::vector<int64_t>& lengths : std::vector<std::vector<int64_t>>{
             {300}, {0, 1, 700, 33}, {3000}, {9000, 40}, {17000, 0, 90}}) {
      const SelectProblem p = batch(lengths, activation, random);
      const Exact exact = activations(p);
      const Selection out = selected(p);
      for (int64_t r = 0; r < p.rows(); ++r) {
        if (!p.routable(r)) {
          REQUIRE(out.gate[r] == 1.0F);
          continue;
        }
        const double product = p.gate.scale * exact.value[r], gate = product + p.gate.bias;
        const double bound =
            (exact.share + kUnit) * std::abs(product) * (1 + kUnit) + kUnit * std::abs(gate);
        INFO("activation ", static_cast<int>(activation), " row ", r, " logit ", p.logits[r]);
        REQUIRE(std::abs(out.gate[r] - gate) <= bound);
      }
    }
  }
}

// exp(300) is infinite in float, so that a largest logit that is missed, or taken from the sequence
// behind, shows.
TEST_CASE("the largest logit of a softmax is found wherever it is") {
  constexpr int32_t kRows = 600;
  for (const int32_t place : {0, 1, 31, 32, 255, 256, 511, 544, kRows - 1}) {
    SelectProblem p;
    p.add_sequence(kRows);
    p.add_sequence(2);
    p.logits[place] = 300.0F;
    p.logits[kRows] = 900.0F;
    p.k = {0, 0};
    p.gate = {.scale = 1.0F, .bias = 0.0F, .activation = Activation::kSoftmax};
    lay_out(p, false);
    const Selection out = selected(p);
    for (int32_t r = 0; r < kRows + 2; ++r) {
      INFO("place ", place, " row ", r);
      REQUIRE(out.gate[r] == (r == place || r == kRows ? 1.0F : 0.0F));
    }
  }
}

TEST_CASE("infinities and NaN are activated") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  SelectProblem p;
  p.add_sequence(4);
  p.logits = {kInfinity, -kInfinity, 0.0F, kNaN};
  p.k = {0};
  lay_out(p, false);
  const auto gates = [&](Activation activation) {
    p.gate = {.scale = 2.0F, .bias = 1.0F, .activation = activation};
    return selected(p).gate;
  };
  for (const int64_t max_length : {int64_t{4}, cuda::kOneBlockRows + 1}) {
    p.max_length = max_length;
    const std::vector<float> tanh = gates(Activation::kTanh);
    CHECK(std::vector<float>(tanh.begin(), tanh.begin() + 3) == std::vector<float>{3, -1, 1});
    const std::vector<float> sigmoid = gates(Activation::kSigmoid);
    CHECK(std::vector<float>(sigmoid.begin(), sigmoid.begin() + 3) == std::vector<float>{3, 1, 2});
    const std::vector<float> none = gates(Activation::kNone);
    CHECK(std::vector<float>(none.begin(), none.begin() + 3) ==
          std::vector<float>{kInfinity, -kInfinity, 1});
    for (const auto& gate : {tanh, sigmoid, none}) CHECK(std::isnan(gate[3]));
    for (const float gate : gates(Activation::kSoftmax)) CHECK(std::isnan(gate));
    p.kind[0] = p.kind[3] = kAlways;  // -inf beside a number has no weight
    CHECK(gates(Activation::kSoftmax) == std::vector<float>{1, 1, 3, 1});
    p.kind[0] = p.kind[3] = kRoutable;
  }
}

std::vector<float> gradient(const SelectProblem& p, const std::vector<float>& of_logits,
                            const std::vector<float>& of_gate, uint64_t seed) {
  const simt::ScopedOptions options({.os_threads = 1, .seed = seed});
  const auto logits = buffer_of(p.logits), grad_logits = buffer_of(of_logits);
  const auto grad_gate = buffer_of(of_gate);
  const auto kind = buffer_of(p.kind);
  const auto cu_seqlens = buffer_of(p.cu_seqlens);
  Buffer<float> out(p.rows(), 1);
  REQUIRE(
      cuda::launch_logit_gradient(p.gate,
                                  {.grad_logits = of_logits.empty() ? nullptr : grad_logits.data(),
                                   .grad_gate = of_gate.empty() ? nullptr : grad_gate.data(),
                                   .logits = logits.data(),
                                   .kind = kind.data(),
                                   .cu_seqlens = cu_seqlens.data(),
                                   .out = out.data(),
                                   .rows = p.rows(),
                                   .sequences = p.sequences()},
                                  nullptr) == cuda::kSuccess);
  return values_of(out);
}

TEST_CASE("gradients of logits") {
  Random random(21);
  for (const Activation activation : kActivations) {
    const SelectProblem p = batch({500, 0, 1, 2600}, activation, random);
    const bool softmax = activation == Activation::kSoftmax;
    const Exact exact = activations(p);
    std::vector<float> of_logits, of_gate;
    for (int64_t r = 0; r < p.rows(); ++r) {
      of_logits.push_back(static_cast<float>(random.normal()));
      of_gate.push_back(static_cast<float>(random.normal()));
    }
    std::vector<double> mean(p.rows()), mean_size(p.rows());
    for (int64_t b = 0; b < p.sequences() && softmax; ++b) {
      double sum = 0, size = 0;
      for (int32_t r = p.cu_seqlens[b]; r < p.cu_seqlens[b + 1]; ++r) {
        if (p.routable(r)) sum += exact.value[r] * of_gate[r];
        if (p.routable(r)) size += exact.value[r] * std::abs(of_gate[r]);
      }
      std::fill(mean.begin() + p.cu_seqlens[b], mean.begin() + p.cu_seqlens[b + 1], sum);
      std::fill(mean_size.begin() + p.cu_seqlens[b], mean_size.begin() + p.cu_seqlens[b + 1], size);
    }
    const std::vector<float> zeros(p.rows(), 0.0F);
    for (const bool with_logits : {true, false}) {
      for (const bool with_gate : {true, false}) {
        const auto& g_logits = with_logits ? of_logits : std::vector<float>{};
        const auto& g_gate = with_gate ? of_gate : std::vector<float>{};
        const std::vector<float> out = gradient(p, g_logits, g_gate, 0);
        CHECK(same_bits(gradient(p, g_logits, g_gate, 3), out));
        for (int64_t r = 0; r < p.rows(); ++r) {
          if (!p.routable(r)) {
            REQUIRE(bits_of(out[r]) == 0);
            continue;
          }
          const double g = with_gate ? of_gate[r] : 0, first = with_logits ? of_logits[r] : 0;
          const double slope = p.gate.scale * (softmax ? exact.value[r] : exact.slope[r]),
                       diff = g - mean[r];
          const double of = with_gate ? slope * (softmax ? diff : g) : 0;
          // of 1 - v * v and v * (1 - v): the error of v, whose size is at most 1, counts twice,
          // and there are two roundings; then come three products and a sum
          double bound = p.gate.scale * (2 * exact.share + 2 * kUnit) * std::abs(g);
          if (softmax) {
            bound = std::abs(slope) * (exact.share * std::abs(diff) +
                                       2 * exact.share * mean_size[r] + kUnit * std::abs(diff));
          }
          bound = with_gate ? bound + 4 * kUnit * std::abs(of) : 0;
          INFO("activation ", static_cast<int>(activation), " row ", r);
          REQUIRE(std::abs(out[r] - (of + first)) <= bound + kUnit * std::abs(of + first) + 1e-40);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pmod::test
