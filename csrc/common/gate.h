// What a routing plan says of a row, and the activations of a gate. Tensor-free.
#pragma once

#include <cstdint>

namespace pmod {

enum class Activation : uint8_t { kNone = 0, kTanh = 1, kSigmoid = 2, kSoftmax = 3 };

// Row kinds of a routing plan.
constexpr uint8_t kPadding = 0;
constexpr uint8_t kRoutable = 1;
constexpr uint8_t kAlways = 2;

}  // namespace pmod
