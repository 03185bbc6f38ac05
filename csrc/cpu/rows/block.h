// A row in blocks of kLanes elements, in registers; the last block of a row may be partial.
//
// Sums keep one partial sum per element of a block and add them in one order, and nothing is
// contracted to fused multiply-adds: a sum has the same bits at every instruction set and for every
// number of threads.
#pragma once

#include <cstdint>

#include "cpu/rows/codec.h"
#include "cpu/rows/traffic.h"

namespace pmod::cpu::PMOD_ISA {

// How many lanes of a block belong to the row.
struct All {};
struct First {
  int64_t count;
};

// Calls f(first element, lanes) for every block of a row.
template <typename F>
PMOD_INLINE void for_blocks(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, All{});
  if (i < size) f(i, First{size - i});
}

template <typename T>
PMOD_INLINE Packed<T> load_packed(const T* from) {
  Packed<T> out;
  for (int j = 0; j < kVectors<T>; ++j) {
    out.v[j] = load_vector<decltype(out.v[0] + out.v[0])>(from + j * kWidth<T>);
  }
  return out;
}

template <typename T>
PMOD_INLINE Packed<T> read(const T* from, All /*lanes*/) {
  PMOD_READ(from, kLanes * sizeof(T));
  return load_packed(from);
}

// Lanes beyond the row are zero.
template <typename T>
PMOD_INLINE Packed<T> read(const T* from, First lanes) {
  PMOD_READ(from, lanes.count * sizeof(T));
  Packed<T> out{};
  __builtin_memcpy(&out, from, lanes.count * sizeof(T));
  return out;
}

template <typename T>
PMOD_INLINE void write(T* to, const Packed<T>& block, All /*lanes*/) {
  PMOD_WRITTEN(to, kLanes * sizeof(T));
  for (int j = 0; j < kVectors<T>; ++j) store_vector(to + j * kWidth<T>, block.v[j]);
}

template <typename T>
PMOD_INLINE void write(T* to, const Packed<T>& block, First lanes) {
  PMOD_WRITTEN(to, lanes.count * sizeof(T));
  __builtin_memcpy(to, &block, lanes.count * sizeof(T));
}

// Past the cache if `streaming`; then the row is aligned to a cache line and made of whole blocks.
template <typename T>
PMOD_INLINE void write(T* to, const Packed<T>& block, All lanes, bool streaming) {
  if (!streaming) return write(to, block, lanes);
  PMOD_WRITTEN(to, kLanes * sizeof(T));
  for (int j = 0; j < kVectors<T>; ++j) stream_vector(to + j * kWidth<T>, block.v[j]);
}

template <typename T>
PMOD_INLINE void write(T* to, const Packed<T>& block, First lanes, bool /*streaming*/) {
  write(to, block, lanes);
}

// The block with zeros beyond the row, where arithmetic may have made NaN of zeros.
template <typename T>
PMOD_INLINE Packed<T> only(const Packed<T>& block, All /*lanes*/) {
  return block;
}

template <typename T>
PMOD_INLINE Packed<T> only(const Packed<T>& block, First lanes) {
  Packed<T> out{};
  __builtin_memcpy(&out, &block, lanes.count * sizeof(T));
  return out;
}

template <typename T>
PMOD_INLINE Block<Acc<T>> widen(const Packed<T>& block) {
  return Codec<T>::widen(block);
}

// To nearest, ties to even.
template <typename T>
PMOD_INLINE Packed<T> round_to(const Block<Acc<T>>& block) {
  return Codec<T>::round(block);
}

template <typename T, typename Lanes>
PMOD_INLINE Block<Acc<T>> load(const T* from, Lanes lanes) {
  return widen(read(from, lanes));
}

// Sums, and weights in their type: always whole blocks, in block order.
template <typename A>
PMOD_INLINE Block<A> load_block(const A* from) {
  Block<A> out;
  for (int j = 0; j < kVectors<A>; ++j) {
    out.v[j] = load_vector<Vector<A>>(from + j * kWidth<A>);
  }
  return out;
}

template <typename T>
PMOD_INLINE Block<Acc<T>> load_weight(const Weight<T>& weight, int64_t i) {
  return weight.packed != nullptr ? widen(load_packed(weight.packed + i))
                                  : load_block(weight.blocks + i);
}

template <typename A>
PMOD_INLINE void store_block(A* to, const Block<A>& block) {
  for (int j = 0; j < kVectors<A>; ++j) store_vector(to + j * kWidth<A>, block.v[j]);
}

template <typename A>
PMOD_INLINE Block<A> operator+(const Block<A>& a, const Block<A>& b) {
  Block<A> out;
  for (int j = 0; j < kVectors<A>; ++j) out.v[j] = a.v[j] + b.v[j];
  return out;
}

template <typename A>
PMOD_INLINE Block<A> operator-(const Block<A>& a, const Block<A>& b) {
  Block<A> out;
  for (int j = 0; j < kVectors<A>; ++j) out.v[j] = a.v[j] - b.v[j];
  return out;
}

template <typename A>
PMOD_INLINE Block<A> operator*(const Block<A>& a, const Block<A>& b) {
  Block<A> out;
  for (int j = 0; j < kVectors<A>; ++j) out.v[j] = a.v[j] * b.v[j];
  return out;
}

template <typename A>
PMOD_INLINE Block<A> operator*(A a, const Block<A>& b) {
  Block<A> out;
  for (int j = 0; j < kVectors<A>; ++j) out.v[j] = a * b.v[j];
  return out;
}

// The lanes added in halves, 0 + n / 2, 1 + n / 2 + 1, ...
template <typename A, int Bytes>
PMOD_INLINE A sum_lanes(typename VectorOf<A, Bytes>::Type v) {
  if constexpr (Bytes == 2 * sizeof(A)) {
    return v[0] + v[1];
  } else {
    typename VectorOf<A, Bytes / 2>::Type half[2];
    __builtin_memcpy(half, &v, Bytes);
    return sum_lanes<A, Bytes / 2>(half[0] + half[1]);
  }
}

// The elements of a block of T added as e + 32, e + 16, ..., 1; where pairs are split, the two of a
// pair after e + 32. The order is the same for every width of a vector.
template <typename T>
PMOD_INLINE Acc<T> sum(Block<Acc<T>> block) {
  int vectors = kVectors<Acc<T>>;
  for (int step = 0; vectors > 1; ++step) {
    vectors /= 2;
    const bool pairs = step == 1 && !Codec<T>::kInOrder;
    for (int j = 0; j < vectors; ++j) {
      block.v[j] = pairs ? block.v[2 * j] + block.v[2 * j + 1] : block.v[j] + block.v[j + vectors];
    }
  }
  return sum_lanes<Acc<T>, kVectorBytes>(block.v[0]);
}

// Asks for the memory of one block; any address will do.
template <typename T>
PMOD_INLINE void prefetch(const T* block) {
  const char* line = reinterpret_cast<const char*>(block);
  for (int64_t at = 0; at < kLanes * int64_t{sizeof(T)}; at += kCacheLine) {
    __builtin_prefetch(line + at);
  }
}

template <typename T>
PMOD_INLINE void copy_row(const T* from, T* to, int64_t size, bool streaming, const T* next) {
  for_blocks(size, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
    prefetch(next + i);
    write(to + i, read(from + i, lanes), lanes, streaming);
  });
}

template <typename T>
PMOD_INLINE void zero_row(T* to, int64_t size, bool streaming) {
  for_blocks(size, [&](int64_t i, auto lanes)
                       PMOD_INLINE_LAMBDA { write(to + i, Packed<T>{}, lanes, streaming); });
}

}  // namespace pmod::cpu::PMOD_ISA
