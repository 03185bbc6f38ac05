// What a row element can be, as storage: bit patterns that the row loops widen and round.
// Tensor-free.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pmod {

// Types of their own, so that overloads and templates tell them from integers.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// The type of logits, gates and sums: double for double rows, else float.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace pmod
