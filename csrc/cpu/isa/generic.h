// What an instruction set may do better, in plain vector arithmetic: rounding to bfloat16 and
// float16, and stores that bypass the cache.
#pragma once

#include "cpu/rows/simd.h"

namespace pmod::cpu::PMOD_ISA::generic {

// To nearest, ties to even; the upper half of a word is the result. A NaN becomes quiet.
PMOD_INLINE Words round_upper_half(Floats v) {
  const Words bits = (Words)v;
  return choose(is_nan(v), bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1));
}

// Pairs of bfloat16: `even` goes to the lower halves of the words.
PMOD_INLINE Words round_to_bf16(Floats even, Floats odd) {
  return (round_upper_half(even) >> 16) | (round_upper_half(odd) & 0xFFFF0000);
}

PMOD_INLINE Floats widen_f16(Halves half) {
  const Words bits = __builtin_convertvector(half, Words);
  const Words exponent = bits & 0x7C00;
  const Words moved =
      ((bits & 0x7FFF) << 13) + (112U << 23);  // the exponents' biases differ by 112
  const Words infinite = moved + (112U << 23);
  // a denormal: let the subtraction of 2^-14 normalise it
  const Words one = moved + (1U << 23);
  const Floats denormal = (Floats)one - (Floats)(Words{} + (113U << 23));
  const Words finite = choose((Words)(exponent == 0), (Words)denormal, moved);
  const Words value = choose((Words)(exponent == 0x7C00), infinite, finite);
  return (Floats)(value | ((bits & 0x8000) << 16));
}

// To nearest, ties to even; what is too large becomes infinite.
PMOD_INLINE Halves round_to_f16(Floats v) {
  const Words sign = ((Words)v & 0x80000000U);
  const Words bits = (Words)v ^ sign;
  const Words normal = (bits + ((0U - 112U) << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
  // adding 1/2 makes the addition itself round at the last bit of a denormal
  const Words half = Words{} + (126U << 23);
  const Words denormal = (Words)((Floats)bits + (Floats)half) - half;
  const Words finite = choose((Words)(bits < (113U << 23)), denormal, normal);
  const Words huge = choose(is_nan(v), Words{} + 0x7E00, Words{} + 0x7C00);
  const Words value = choose((Words)(bits >= (143U << 23)), huge, finite);
  return __builtin_convertvector(value | (sign >> 16), Halves);
}

}  // namespace pmod::cpu::PMOD_ISA::generic

#if !defined(__x86_64__)
namespace pmod::cpu::PMOD_ISA {

PMOD_INLINE Words round_to_bf16(Floats even, Floats odd) {
  return generic::round_to_bf16(even, odd);
}
PMOD_INLINE Floats widen_f16(Halves half) { return generic::widen_f16(half); }
PMOD_INLINE Halves round_to_f16(Floats v) { return generic::round_to_f16(v); }

template <typename V>
PMOD_INLINE void stream_vector(void* to, V v) {
  store_vector(to, v);
}
PMOD_INLINE void finish_streams() {}

}  // namespace pmod::cpu::PMOD_ISA
#endif
