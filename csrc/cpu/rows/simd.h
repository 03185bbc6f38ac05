// Vectors of the instruction set that this file is compiled for.
//
// They are those of the GCC and Clang extension, so the same source serves SSE2, NEON, AVX2 and
// AVX-512. Everything lives in a namespace named after the instruction set, and standard templates
// stay out: the linker keeps one copy of an inline function, and that copy must run on every
// machine.
#pragma once

#include <cstdint>

#if !defined(PMOD_ISA)
#error "PMOD_ISA must name the namespace of the instruction set"
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of halves are split as on a little-endian machine"
#endif

#define PMOD_INLINE __attribute__((always_inline)) inline
#define PMOD_INLINE_LAMBDA __attribute__((always_inline))

namespace pmod::cpu::PMOD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename E, int Bytes>
struct VectorOf {
  typedef E Type __attribute__((vector_size(Bytes)));  // NOLINT(modernize-use-using)
};
template <typename E>
using Vector = typename VectorOf<E, kVectorBytes>::Type;

template <typename E>
constexpr int kWidth = kVectorBytes / sizeof(E);

using Floats = Vector<float>;
using Words = Vector<uint32_t>;
using Halves = VectorOf<uint16_t, kVectorBytes / 2>::Type;  // as many as there are Floats

template <typename V>
PMOD_INLINE V load_vector(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
PMOD_INLINE void store_vector(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

// Lanes of `yes` where the mask is all ones, of `no` where it is zero.
PMOD_INLINE Words choose(Words mask, Words yes, Words no) { return (yes & mask) | (no & ~mask); }
PMOD_INLINE Floats choose(Words mask, Floats yes, Floats no) {
  return (Floats)choose(mask, (Words)yes, (Words)no);
}

PMOD_INLINE Words is_nan(Floats v) { return (Words)(v != v); }

}  // namespace pmod::cpu::PMOD_ISA

#if defined(__x86_64__)
#include "cpu/isa/x86.h"
#else
#include "cpu/isa/generic.h"
#endif
