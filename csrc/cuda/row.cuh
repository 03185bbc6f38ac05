// A row spread over the threads of a block: each owns every blockDim.x-th vector of kSize elements.
// What a thread needs twice it keeps in registers, up to a number of vectors; of longer rows the
// rest is read again.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace pmod::cuda {

constexpr int kMostThreads = 1024;

// How rows of Element are spread over at most kThreads: kVectors stay in the registers of a thread.
// It may own more of them if kLong.
template <typename Element, bool kAligned, int kVectorsPerThread, bool kLongRows, int kThreads>
struct Share {
  using T = Element;
  static constexpr int kSize = Access<T, kAligned>::kSize;
  static constexpr int kVectors = kVectorsPerThread;
  static constexpr bool kLong = kLongRows;
  static constexpr int kBlock = kThreads;
  static constexpr int kMostElements = kBlock * kVectors * kSize;  // of a row, unless kLong
};

// For kernels that stream rows: enough bytes on their way, few enough registers for full occupancy.
template <typename T, bool kAligned>
using Streamed = Share<T, kAligned, kAligned ? 2 : 4, true, kMostThreads>;

// For kernels that sum parameter gradients, with a register per element and sum: blocks so large
// that none is spilled.
template <typename T, bool kLong>
constexpr int kSummingThreads = kLong            ? 512
                                : sizeof(T) == 4 ? 1024
                                                 : 896;
template <typename T, bool kAligned, bool kLong>
using Summed = Share<T, kAligned, kAligned ? 1 : 4, kLong, kSummingThreads<T, kLong>>;

// Which of a thread's vectors: one that it has in registers, or not (kIndex < 0).
template <int kNth>
struct Nth {
  static constexpr int kIndex = kNth;
};
using Rest = Nth<-1>;

// Calls f(number of the vector in the row, Nth) for the vectors that this thread has in registers.
template <typename S, int kNth = 0, typename F>
__device__ __forceinline__ void for_cached_vectors(int vectors, const F& f) {
  if constexpr (kNth < S::kVectors) {
    const int v = static_cast<int>(threadIdx.x + kNth * blockDim.x);
    if (v < vectors) f(v, Nth<kNth>{});
    for_cached_vectors<S, kNth + 1>(vectors, f);
  }
}

template <typename S, typename F>
__device__ __forceinline__ void for_other_vectors(int vectors, const F& f) {
  if constexpr (S::kLong) {
    const int step = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int v = static_cast<int>(threadIdx.x) + S::kVectors * step; v < vectors; v += step) {
      f(v, Rest{});
    }
  }
}

template <typename S, typename F>
__device__ __forceinline__ void for_vectors(int vectors, const F& f) {
  for_cached_vectors<S>(vectors, f);
  for_other_vectors<S>(vectors, f);
}

// A row that is read. Without load() it holds nothing and must not be asked.
template <typename S>
class Row {
 public:
  using T = typename S::T;

  __device__ __forceinline__ void load(const T* row, int vectors) {
    row_ = row;
    for_cached_vectors<S>(vectors, [&](int v, auto nth) {
      cached_[decltype(nth)::kIndex] = read<S::kSize>(row_, v);
    });
  }

  template <int kNth>
  [[nodiscard]] __device__ __forceinline__ Packed<T, S::kSize> packed(int v, Nth<kNth>) const {
    if constexpr (kNth >= 0) {
      return cached_[kNth];
    } else {
      return read<S::kSize>(row_, v);
    }
  }

  // Puts another row in its place, vector by vector; where it is in memory by then.
  template <int kNth>
  __device__ __forceinline__ void replace(Nth<kNth>, const Packed<T, S::kSize>& packed) {
    if constexpr (kNth >= 0) cached_[kNth] = packed;
  }
  __device__ __forceinline__ void move_to(const T* row) { row_ = row; }

  template <typename N>
  [[nodiscard]] __device__ __forceinline__ Values<S::kSize> values(int v, N nth) const {
    return widen(packed(v, nth));
  }

 private:
  const T* row_ = nullptr;
  Packed<T, S::kSize> cached_[S::kVectors] = {};
};

// Elements of a vector that are widened and worked on together, where registers are scarce.
template <int kSize>
constexpr int kPart = kSize == 1 ? 1 : 2;
template <int kSize>
using Part = Values<kPart<kSize>>;

template <typename T, int kSize>
__device__ __forceinline__ Part<kSize> part_of(const Packed<T, kSize>& packed, int part) {
  if constexpr (kSize == 1) {
    return widen(packed);
  } else if constexpr (sizeof(T) == 4) {
    return {__uint_as_float(packed.word[2 * part]), __uint_as_float(packed.word[2 * part + 1])};
  } else {
    const float2 pair = unpack<T>(packed.word[part]);
    return {pair.x, pair.y};
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void set_part(Packed<T, kSize>& packed, int part,
                                         const Part<kSize>& values) {
  if constexpr (kSize == 1) {
    packed = round_to<T>(values);
  } else if constexpr (sizeof(T) == 4) {
    packed.word[2 * part] = __float_as_uint(values.v[0]);
    packed.word[2 * part + 1] = __float_as_uint(values.v[1]);
  } else {
    packed.word[part] = pack<T>(values.v[0], values.v[1]);
  }
}

// As a row of T holds them.
template <typename T>
__device__ __forceinline__ Values<1> rounded(const Values<1>& values) {
  return {widen(round_to<T>(values.v[0]))};
}
template <typename T>
__device__ __forceinline__ Values<2> rounded(const Values<2>& values) {
  if constexpr (sizeof(T) == 4) {
    return values;
  } else {
    const float2 pair = unpack<T>(pack<T>(values.v[0], values.v[1]));
    return {pair.x, pair.y};
  }
}

template <typename S>
__device__ __forceinline__ void write_zeros(typename S::T* row, int vectors) {
  for_vectors<S>(vectors,
                 [&](int v, auto) { write<S::kSize>(row, v, Packed<typename S::T, S::kSize>{}); });
}

template <typename S>
__device__ __forceinline__ void copy_row(const typename S::T* from, typename S::T* to,
                                         int vectors) {
  Row<S> row;
  row.load(from, vectors);
  for_vectors<S>(vectors, [&](int v, auto nth) { write<S::kSize>(to, v, row.packed(v, nth)); });
}

// Row `row` of a matrix of rows of T.
template <typename T>
__device__ __forceinline__ const T* row_of(const void* matrix, int64_t row, int64_t hidden) {
  return static_cast<const T*>(matrix) + row * hidden;
}
template <typename T>
__device__ __forceinline__ T* row_of(void* matrix, int64_t row, int64_t hidden) {
  return static_cast<T*>(matrix) + row * hidden;
}

// An index that is -1, or no index at all, leads nowhere.
__device__ __forceinline__ bool leads_to_one_of(int64_t count, int64_t index) {
  return index >= 0 && index < count;
}

template <int kSize>
__device__ __forceinline__ Values<kSize> operator+(const Values<kSize>& a, const Values<kSize>& b) {
  Values<kSize> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j) out.v[j] = a.v[j] + b.v[j];
  return out;
}

template <int kSize>
__device__ __forceinline__ Values<kSize> operator*(float a, const Values<kSize>& b) {
  Values<kSize> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j) out.v[j] = a * b.v[j];
  return out;
}

template <int kSize>
__device__ __forceinline__ Values<kSize> operator*(const Values<kSize>& a, const Values<kSize>& b) {
  Values<kSize> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j) out.v[j] = a.v[j] * b.v[j];
  return out;
}

// sum + a . b, element by element. Fused, so that a sum has the same bits in every kernel.
template <int kSize>
__device__ __forceinline__ float add_products(const Values<kSize>& a, const Values<kSize>& b,
                                              float sum) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum = fmaf(a.v[j], b.v[j], sum);
  return sum;
}

}  // namespace pmod::cuda
