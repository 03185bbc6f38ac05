// Parameter gradients over the rows of a block: a fixed number of blocks, each of which owns a
// range of rows, goes through it in order, and writes one partial sum per parameter. See
// launch_sum_partials.
#pragma once

#include <type_traits>

#include "cuda/weight.cuh"

namespace pmod::cuda {

// The rows of this block, of `rows` in all.
struct Chunk {
  int begin, end;

  __device__ __forceinline__ explicit Chunk(int64_t rows)
      : begin(static_cast<int>(rows * blockIdx.x / gridDim.x)),
        end(static_cast<int>(rows * (blockIdx.x + 1) / gridDim.x)) {}
};

// One parameter's sum: in registers, or, where rows are long, in the block's partial row, of which
// each thread touches its own vectors only.
template <typename S>
class ParameterSum {
 public:
  // `partials`: [gridDim.x, hidden]
  __device__ __forceinline__ ParameterSum(float* partials, int hidden)
      : partials_(partials), hidden_(hidden) {
    if constexpr (S::kLong) {
      for_vectors<S>(vectors(), [&](int v, auto) { store(v, Values<S::kSize>{}); });
    }
  }

  // Part by part of a vector, then finish_vector().
  template <int kNth>
  __device__ __forceinline__ void add(Nth<kNth>, int part, const Part<S::kSize>& terms) {
    constexpr int kElements = kPart<S::kSize>, kSum = S::kLong ? 0 : kNth;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      float& sum = sum_[kSum].v[part * kElements + j];
      sum = S::kLong ? terms.v[j] : sum + terms.v[j];
    }
  }
  __device__ __forceinline__ void finish_vector(int v) {
    if constexpr (S::kLong) store(v, stored(v) + sum_[0]);
  }

  // After the last row.
  __device__ __forceinline__ void finish() {
    if constexpr (!S::kLong) {
      for_vectors<S>(vectors(), [&](int v, auto nth) { store(v, sum_[decltype(nth)::kIndex]); });
    }
  }

 private:
  static constexpr int kAccess = S::kSize == 1 ? 1 : 4;  // floats in one access
  static constexpr int kAccesses = S::kSize / kAccess;

  [[nodiscard]] __device__ __forceinline__ int vectors() const { return hidden_ / S::kSize; }
  [[nodiscard]] __device__ __forceinline__ float* partial() const {
    return row_of<float>(partials_, blockIdx.x, hidden_);
  }

  [[nodiscard]] __device__ __forceinline__ Values<S::kSize> stored(int v) const {
    Values<S::kSize> out;
#pragma unroll
    for (int part = 0; part < kAccesses; ++part) {
      const Values<kAccess> some = widen(read<kAccess>(partial(), int64_t{v} * kAccesses + part));
#pragma unroll
      for (int j = 0; j < kAccess; ++j) out.v[part * kAccess + j] = some.v[j];
    }
    return out;
  }

  __device__ __forceinline__ void store(int v, const Values<S::kSize>& values) {
#pragma unroll
    for (int part = 0; part < kAccesses; ++part) {
      Values<kAccess> some;
#pragma unroll
      for (int j = 0; j < kAccess; ++j) some.v[j] = values.v[part * kAccess + j];
      write<kAccess>(partial(), int64_t{v} * kAccesses + part, round_to<float>(some));
    }
  }

  float* partials_;
  int hidden_;
  // Of all vectors, or the terms of one.
  Values<S::kSize> sum_[S::kLong ? 1 : S::kVectors] = {};
};

// In place of a sum that is not asked for.
struct NoSum {
  __device__ __forceinline__ void finish_vector(int /*v*/) {}
  __device__ __forceinline__ NoSum(float* /*partials*/, int /*hidden*/) {}
  __device__ __forceinline__ void finish() {}
};
template <typename S, typename W>
using SumFor = std::conditional_t<kPresent<W>, ParameterSum<S>, NoSum>;

}  // namespace pmod::cuda
