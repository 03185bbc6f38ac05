// The gate: weight = scale * act(logit) + bias, and the derivative of act. Tensor-free.
#pragma once

#include <cmath>
#include <cstdint>

namespace pmod {

enum class Activation : uint8_t { kNone = 0, kTanh = 1, kSigmoid = 2, kSoftmax = 3 };

// Row kinds of a routing plan.
constexpr uint8_t kPadding = 0;
constexpr uint8_t kRoutable = 1;
constexpr uint8_t kAlways = 2;

// Activations of one logit; softmax needs the sequence and is not handled here.
template <typename A>
inline A activate(A logit, Activation activation) {
  switch (activation) {
    case Activation::kTanh:
      return std::tanh(logit);
    case Activation::kSigmoid:
      return A(1) / (A(1) + std::exp(-logit));
    default:
      return logit;
  }
}

// Taken from the logit, not from the gate: (gate - bias) / scale would cancel.
template <typename A>
inline A activate_derivative(A logit, Activation activation) {
  const A value = activate(logit, activation);
  switch (activation) {
    case Activation::kTanh:
      return A(1) - value * value;
    case Activation::kSigmoid:
      return value * (A(1) - value);
    default:
      return A(1);
  }
}

}  // namespace pmod
