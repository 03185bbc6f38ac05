// The few places where x86 has an instruction that plain vector arithmetic does not reach.
#pragma once

#include <immintrin.h>

#include "cpu/isa/generic.h"

namespace pmod::cpu::PMOD_ISA {

#if defined(__AVX512BF16__)
// It takes denormal numbers for zero, unlike the other levels.
PMOD_INLINE Words round_to_bf16(Floats even, Floats odd) {
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // evens, then odds
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(interleave, halves);
}
#else
PMOD_INLINE Words round_to_bf16(Floats even, Floats odd) {
  return generic::round_to_bf16(even, odd);
}
#endif

#if defined(__AVX512F__)
// For the masked forms: GCC 12 warns of its own undefined operand in the others.
constexpr __mmask16 kAllLanes = 0xFFFF;

PMOD_INLINE Floats widen_f16(Halves half) {
  return (Floats)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)half);
}
PMOD_INLINE Halves round_to_f16(Floats v) {
  return (Halves)_mm512_maskz_cvtps_ph(kAllLanes, (__m512)v,
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
PMOD_INLINE Floats widen_f16(Halves half) { return (Floats)_mm256_cvtph_ps((__m128i)half); }
PMOD_INLINE Halves round_to_f16(Floats v) {
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
PMOD_INLINE Floats widen_f16(Halves half) { return generic::widen_f16(half); }
PMOD_INLINE Halves round_to_f16(Floats v) { return generic::round_to_f16(v); }
#endif

// A store that bypasses the cache: the line is not read first, and nothing useful is evicted. `to`
// must be aligned to the vector.
template <typename V>
PMOD_INLINE void stream_vector(void* to, V v) {
  static_assert(sizeof(V) == kVectorBytes);
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
#else
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
#endif
}

// Orders streaming stores before whatever tells another thread that the rows are there.
PMOD_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace pmod::cpu::PMOD_ISA
