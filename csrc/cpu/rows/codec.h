// How a row type is held in whole vectors, and widened to the type of sums.
//
// Widening may reorder the elements of a block: bfloat16 pairs are split by a shift and a mask,
// which gives the even elements, then the odd ones, where a conversion in order would take a
// shuffle for each vector. Values that meet a row, weights and sums, are kept in the same order
// ("block order", see `arrange` and `restore`).
#pragma once

#include <cstdint>

#include "common/row_types.h"
#include "cpu/rows/loops.h"
#include "cpu/rows/simd.h"

namespace pmod::cpu::PMOD_ISA {

template <typename A>
constexpr int kVectors = kLanes / kWidth<A>;

// kLanes values of the type of sums, in block order.
template <typename A>
struct Block {
  Vector<A> v[kVectors<A>];
};

// kLanes values as a row holds them.
template <typename T>
struct Packed {
  Vector<T> v[kVectors<T>];
};
template <>
struct Packed<Bf16> {
  Words v[kVectors<uint16_t>];
};
template <>
struct Packed<F16> {
  Words v[kVectors<uint16_t>];
};

template <typename T>
struct Codec {
  static constexpr bool kInOrder = true;
  PMOD_INLINE static Block<T> widen(const Packed<T>& packed) {
    Block<T> out;
    for (int j = 0; j < kVectors<T>; ++j) out.v[j] = packed.v[j];
    return out;
  }
  PMOD_INLINE static Packed<T> round(const Block<T>& block) {
    Packed<T> out;
    for (int j = 0; j < kVectors<T>; ++j) out.v[j] = block.v[j];
    return out;
  }
};

template <>
struct Codec<Bf16> {
  static constexpr bool kInOrder = false;
  PMOD_INLINE static Block<float> widen(const Packed<Bf16>& packed) {
    Block<float> out;
    for (int64_t j = 0; j < kVectors<uint16_t>; ++j) {
      out.v[2 * j] = (Floats)(packed.v[j] << 16);
      out.v[2 * j + 1] = (Floats)(packed.v[j] & 0xFFFF0000);
    }
    return out;
  }
  PMOD_INLINE static Packed<Bf16> round(const Block<float>& block) {
    Packed<Bf16> out;
    for (int64_t j = 0; j < kVectors<uint16_t>; ++j) {
      out.v[j] = round_to_bf16(block.v[2 * j], block.v[2 * j + 1]);
    }
    return out;
  }
};

template <>
struct Codec<F16> {
  static constexpr bool kInOrder = true;
  PMOD_INLINE static Block<float> widen(const Packed<F16>& packed) {
    Block<float> out;
    for (int64_t j = 0; j < kVectors<uint16_t>; ++j) {
      Halves half[2];
      __builtin_memcpy(&half, &packed.v[j], kVectorBytes);
      out.v[2 * j] = widen_f16(half[0]);
      out.v[2 * j + 1] = widen_f16(half[1]);
    }
    return out;
  }
  PMOD_INLINE static Packed<F16> round(const Block<float>& block) {
    Packed<F16> out;
    for (int64_t j = 0; j < kVectors<uint16_t>; ++j) {
      const Halves half[2] = {round_to_f16(block.v[2 * j]), round_to_f16(block.v[2 * j + 1])};
      __builtin_memcpy(&out.v[j], &half, kVectorBytes);
    }
    return out;
  }
};

// One block from element order to the block order of T, and back.
template <typename T>
PMOD_INLINE void arrange_block(const Acc<T>* elements, Acc<T>* block) {
  constexpr int kHalf = kWidth<Acc<T>>;
  for (int i = 0; i < kLanes; ++i) {
    const int from = i / (2 * kHalf) * (2 * kHalf) + i % kHalf * 2 + i / kHalf % 2;
    block[i] = elements[Codec<T>::kInOrder ? i : from];
  }
}
template <typename T>
PMOD_INLINE void restore_block(const Acc<T>* block, Acc<T>* elements) {
  constexpr int kHalf = kWidth<Acc<T>>;
  for (int i = 0; i < kLanes; ++i) {
    const int to = i / (2 * kHalf) * (2 * kHalf) + i % kHalf * 2 + i / kHalf % 2;
    elements[Codec<T>::kInOrder ? i : to] = block[i];
  }
}

}  // namespace pmod::cpu::PMOD_ISA
