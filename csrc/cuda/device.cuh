// Rows in registers: 16 bytes at a time where they are aligned, element by element where not.
// Sums are in float, in an order that depends on the block size alone.
#pragma once

#include "common/gate.h"
#include "common/row_types.h"
#include "cuda/platform.h"

namespace pmod::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// How a row of T is read and written: kSize elements at once.
template <typename T, bool kAligned>
struct Access {
  static constexpr int kSize = kAligned ? 16 / static_cast<int>(sizeof(T)) : 1;
};

// kSize values in the type of sums.
template <int kSize>
struct Values {
  float v[kSize];
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Bf16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(F16 value) { return unpack_f16(value.bits).x; }

// To nearest, ties to even.
template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Bf16 round_to<Bf16>(float value) {
  return {static_cast<uint16_t>(pack_bf16(value, 0.0F))};
}
template <>
__device__ __forceinline__ F16 round_to<F16>(float value) {
  return {static_cast<uint16_t>(pack_f16(value, 0.0F))};
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<Bf16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000U));
}
template <>
__device__ __forceinline__ float2 unpack<F16>(uint32_t pair) {
  return unpack_f16(pair);
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  return pack_bf16(low, high);
}
template <>
__device__ __forceinline__ uint32_t pack<F16>(float low, float high) {
  return pack_f16(low, high);
}

// kSize elements as they lie in memory.
template <typename T, int kSize>
struct Packed {
  uint32_t word[kSize * sizeof(T) / 4];
};
template <typename T>
struct Packed<T, 1> {
  T element;
};

// Elements kSize * i and following of a row.
template <int kSize, typename T>
__device__ __forceinline__ Packed<T, kSize> read(const T* row, int64_t i) {
  const T* from = row + i * kSize;
  count_read(from, kSize * sizeof(T));
  Packed<T, kSize> out;
  if constexpr (kSize == 1) {
    out.element = *from;
  } else {
    static_assert(kSize * sizeof(T) == 16);
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    out.word[0] = words.x;
    out.word[1] = words.y;
    out.word[2] = words.z;
    out.word[3] = words.w;
  }
  return out;
}

template <int kSize, typename T>
__device__ __forceinline__ void write(T* row, int64_t i, const Packed<T, kSize>& packed) {
  T* to = row + i * kSize;
  count_write(to, kSize * sizeof(T));
  if constexpr (kSize == 1) {
    *to = packed.element;
  } else {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(packed.word[0], packed.word[1], packed.word[2], packed.word[3]);
  }
}

template <typename T, int kSize>
__device__ __forceinline__ Values<kSize> widen(const Packed<T, kSize>& packed) {
  Values<kSize> out;
  if constexpr (kSize == 1) {
    out.v[0] = widen(packed.element);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) out.v[j] = __uint_as_float(packed.word[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kSize / 2; ++j) {
      const float2 pair = unpack<T>(packed.word[j]);
      out.v[2 * j] = pair.x;
      out.v[2 * j + 1] = pair.y;
    }
  }
  return out;
}

template <typename T, int kSize>
__device__ __forceinline__ Packed<T, kSize> round_to(const Values<kSize>& values) {
  Packed<T, kSize> out;
  if constexpr (kSize == 1) {
    out.element = round_to<T>(values.v[0]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) out.word[j] = __float_as_uint(values.v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kSize / 2; ++j) {
      out.word[j] = pack<T>(values.v[2 * j], values.v[2 * j + 1]);
    }
  }
  return out;
}

// A weight that rows meet: kSize entries of its own type W, which may be wider than the rows'. Read
// often, so it is not counted as rows are. `weight` has the alignment that kSize needs.
template <int kSize, typename W>
__device__ __forceinline__ Values<kSize> load_weight(const W* weight, int64_t i) {
  Values<kSize> out;
  constexpr int kPart = kSize == 1 ? 1 : 16 / static_cast<int>(sizeof(W));
#pragma unroll
  for (int part = 0; part < kSize / kPart; ++part) {
    Packed<W, kPart> packed;
    const W* from = weight + i * kSize + part * kPart;
    if constexpr (kPart == 1) {
      packed.element = *from;
    } else {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
      packed.word[0] = words.x;
      packed.word[1] = words.y;
      packed.word[2] = words.z;
      packed.word[3] = words.w;
    }
    const Values<kPart> values = widen(packed);
#pragma unroll
    for (int j = 0; j < kPart; ++j) out.v[part * kPart + j] = values.v[j];
  }
  return out;
}

// The same bits in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// The same bits in every thread: warps are added in order. Every thread of the block calls it, and
// the block has whole warps. `scratch`: kWarp shared floats, free again when the next call begins
// after a barrier of the caller's or this one's second.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  if (blockDim.x == kWarp) return value;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0F;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

}  // namespace pmod::cuda
