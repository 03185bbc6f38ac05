// Weights that rows meet, in the type of rows or in float.
#pragma once

#include <type_traits>

#include "cuda/launchers.h"
#include "cuda/row.cuh"

namespace pmod::cuda {

// In place of the type of a weight that is not there.
struct Absent {};
template <typename W>
constexpr bool kPresent = !std::is_same_v<W, Absent>;

// In place of a type that is T or float, which is found out at run time.
template <typename T>
struct Either {};

// kSize entries of a weight as they lie in memory.
template <int kSize, typename W>
__device__ __forceinline__ Packed<W, kSize> load_packed_weight(const W* weight, int v) {
  Packed<W, kSize> out;
  if constexpr (kSize == 1) {
    out.element = weight[v];
  } else {
    constexpr int kLoads = kSize * static_cast<int>(sizeof(W)) / 16;
    const uint4* from = reinterpret_cast<const uint4*>(weight + int64_t{v} * kSize);
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const uint4 words = __ldg(from + n);
      out.word[4 * n] = words.x;
      out.word[4 * n + 1] = words.y;
      out.word[4 * n + 2] = words.z;
      out.word[4 * n + 3] = words.w;
    }
  }
  return out;
}

template <typename S, typename W>
class Weight {
 public:
  using Vector = Packed<W, S::kSize>;

  __device__ __forceinline__ explicit Weight(const Parameter& weight)
      : data_(static_cast<const W*>(weight.data)) {}

  // Vector v.
  [[nodiscard]] __device__ __forceinline__ Values<S::kSize> at(int v) const {
    return load_weight<S::kSize>(data_, v);
  }
  [[nodiscard]] __device__ __forceinline__ Vector packed(int v) const {
    return load_packed_weight<S::kSize>(data_, v);
  }

 private:
  const W* data_;
};

template <typename S, typename T>
class Weight<S, Either<T>> {
 public:
  static_assert(S::kSize == 1);
  using Vector = Packed<float, 1>;

  __device__ __forceinline__ explicit Weight(const Parameter& weight)
      : data_(weight.data), wide_(weight.type == RowType::kFloat) {}

  [[nodiscard]] __device__ __forceinline__ Values<1> at(int v) const {
    return {wide_ ? static_cast<const float*>(data_)[v] : widen(static_cast<const T*>(data_)[v])};
  }
  [[nodiscard]] __device__ __forceinline__ Vector packed(int v) const { return {at(v).v[0]}; }

 private:
  const void* data_;
  bool wide_;
};

// In the type of rows or in float; 0 if absent.
template <typename T>
__device__ __forceinline__ float number_of(const Number& number) {
  if (number.data == nullptr) return 0.0F;
  return number.type == RowType::kFloat ? *static_cast<const float*>(number.data)
                                        : widen(*static_cast<const T*>(number.data));
}

}  // namespace pmod::cuda
