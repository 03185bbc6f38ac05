// RMSNorm of a row that a block has in registers, and its gradient. Rounds before and after the
// multiplication by the weight, as a Llama does.
#pragma once

#include "cuda/weight.cuh"

namespace pmod::cuda {

__device__ __forceinline__ float reciprocal_rms(float squares, int hidden, float eps) {
  return 1.0F / sqrtf(squares / static_cast<float>(hidden) + eps);
}

// round(round(x * rstd) * weight)
template <typename T, int kSize>
__device__ __forceinline__ Packed<T, kSize> normalise(const Values<kSize>& x, float rstd,
                                                      const Values<kSize>& weight) {
  return round_to<T>(widen(round_to<T>(rstd * x)) * weight);
}

// The gradient of one row of RMSNorm: rstd * (g - n * mean(g * n)) with n = x * rstd and
// g = grad * weight. That of the weight gets grad * round(n).
template <typename S, typename W>
class NormBackward {
 public:
  using T = typename S::T;
  using P = Part<S::kSize>;
  static constexpr int kParts = S::kSize / kPart<S::kSize>;

  // Every thread of the block calls it. `grad` and `x` are loaded.
  __device__ __forceinline__ NormBackward(const Row<S>& grad, const Row<S>& x,
                                          const Parameter& weight, float rstd, int hidden,
                                          float* scratch)
      : grad_(grad), x_(x), weight_(weight), rstd_(rstd) {
    float projection = 0.0F;
    for_vectors<S>(hidden / S::kSize, [&](int v, auto nth) {
      const auto vector = at(v, nth);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const P g = part_of(vector.grad, part) * part_of(vector.weight, part);
        projection = add_products(g, rstd_ * part_of(vector.x, part), projection);
      }
    });
    mean_ = block_sum(projection, scratch) / static_cast<float>(hidden);
  }

  // What is known of a vector.
  struct Vector {
    Packed<T, S::kSize> grad, x;
    typename Weight<S, W>::Vector weight;
  };
  template <typename N>
  [[nodiscard]] __device__ __forceinline__ Vector at(int v, N nth) const {
    return {grad_.packed(v, nth), x_.packed(v, nth), weight_.packed(v)};
  }

  // `of_weight`: a ParameterSum.
  template <typename N, typename Sum>
  [[nodiscard]] __device__ __forceinline__ P gradient(const Vector& vector, int part, N nth,
                                                      Sum& of_weight) const {
    const P normed = rstd_ * part_of(vector.x, part);
    const P grad = part_of(vector.grad, part);
    of_weight.add(nth, part, grad * rounded<T>(normed));
    return rstd_ * (grad * part_of(vector.weight, part) + (-mean_) * normed);
  }

 private:
  const Row<S>& grad_;
  const Row<S>& x_;
  Weight<S, W> weight_;
  float rstd_, mean_;
};

}  // namespace pmod::cuda
