// Gathered rows plus attention, and the RMSNorm of the sum: reference.gather_add_rmsnorm and its
// backward.
//
// Forward: one block per slot; the sum is normalised as rounded. Reads 2K rows and writes 2K.
// Backward: a fixed number of blocks, each with a range of slots, for the gradient of the weight.
// The gradient through the norm and those that reached the residual are rounded once. Reads 3K rows
// (one of them rows of grad_out, in place) and writes K, and K or 2K more into a grad_x.
#pragma once

#include "cuda/launchers.h"
#include "cuda/norm.cuh"
#include "cuda/partial_sum.cuh"

namespace pmod::cuda {

template <typename S, typename W>
__global__ void __launch_bounds__(kMostThreads)
    gather_add_rmsnorm_kernel(GatherAddRmsnorm a, int hidden) {
  using T = typename S::T;
  constexpr int kSize = S::kSize;
  PMOD_SHARED(float, scratch, kWarp);
  const int vectors = hidden / kSize;
  const int32_t index = a.index[blockIdx.x];
  T* residual = row_of<T>(a.residual, blockIdx.x, hidden);
  T* to = row_of<T>(a.out, blockIdx.x, hidden);
  if (!leads_to_one_of(a.rows, index)) {
    write_zeros<S>(residual, vectors);
    write_zeros<S>(to, vectors);
    if (threadIdx.x == 0) a.rstd[blockIdx.x] = 0.0F;
    return;
  }
  Row<S> row, attn;
  row.load(row_of<T>(a.x, index, hidden), vectors);
  attn.load(row_of<T>(a.attn_out, blockIdx.x, hidden), vectors);
  float squares = 0.0F;
  for_vectors<S>(vectors, [&](int v, auto nth) {
    const Packed<T, kSize> sum = round_to<T>(row.values(v, nth) + attn.values(v, nth));
    write<kSize>(residual, v, sum);
    row.replace(nth, sum);
    squares = add_products(widen(sum), widen(sum), squares);
  });
  row.move_to(residual);
  const float rstd = reciprocal_rms(block_sum(squares, scratch), hidden, a.eps);
  const Weight<S, W> weight(a.weight);
  for_vectors<S>(vectors, [&](int v, auto nth) {
    write<kSize>(to, v, normalise<T>(row.values(v, nth), rstd, weight.at(v)));
  });
  if (threadIdx.x == 0) a.rstd[blockIdx.x] = rstd;
}

// The gradients of one residual row that did not come through the norm, and where the sum goes.
template <typename S>
class ResidualGradient {
 public:
  using T = typename S::T;

  __device__ __forceinline__ ResidualGradient(const GatherAddRmsnormBackward& a, int64_t slot,
                                              int64_t row, int hidden)
      : a_(a),
        to_(row_of<T>(a.grad_attn_out, slot, hidden)),
        grad_x_(row_of<T>(a.grad_x, row, hidden)) {
    const int vectors = hidden / S::kSize;
    if (a.grad_residual) residual_.load(row_of<T>(a.grad_residual, slot, hidden), vectors);
    if (a.grad_out) out_.load(row_of<T>(a.grad_out, row, hidden), vectors);
    if (adds_to_x()) x_.load(grad_x_, vectors);
  }

  // Adds gradient(part), for every part of a vector.
  template <typename N, typename F>
  __device__ __forceinline__ void finish(int v, N nth, const F& gradient) const {
    using V = Packed<T, S::kSize>;
    V residual = {}, out = {}, x = {}, sum = {}, sum_of_x = {};
    if (a_.grad_residual) residual = residual_.packed(v, nth);
    if (a_.grad_out) out = out_.packed(v, nth);
    if (adds_to_x()) x = x_.packed(v, nth);
#pragma unroll
    for (int part = 0; part < S::kSize / kPart<S::kSize>; ++part) {
      Part<S::kSize> grad = gradient(part);
      if (a_.grad_residual) grad = grad + part_of(residual, part);
      if (a_.grad_out) grad = grad + part_of(out, part);
      set_part(sum, part, grad);
      if (adds_to_x()) set_part(sum_of_x, part, grad + part_of(x, part));
    }
    write<S::kSize>(to_, v, sum);
    if (adds_to_x()) {
      write<S::kSize>(grad_x_, v, sum_of_x);
    } else if (a_.grad_x) {
      write<S::kSize>(grad_x_, v, sum);
    }
  }

 private:
  [[nodiscard]] __device__ __forceinline__ bool adds_to_x() const {
    return a_.grad_x && a_.accumulate;
  }

  const GatherAddRmsnormBackward& a_;
  T* to_;
  T* grad_x_;
  Row<S> residual_, out_, x_;
};

template <typename S, typename W>
__global__ void __launch_bounds__(S::kBlock, 1)
    gather_add_rmsnorm_backward_kernel(GatherAddRmsnormBackward a, int hidden) {
  using T = typename S::T;
  PMOD_SHARED(float, scratch, kWarp);
  const int vectors = hidden / S::kSize;
  ParameterSum<S> of_weight(a.partials, hidden);
  const Chunk slots(a.slots);
#pragma unroll 1
  for (int slot = slots.begin; slot < slots.end; ++slot) {
    const int32_t row = a.index[slot];
    if (!leads_to_one_of(a.rows, row)) {
      write_zeros<S>(row_of<T>(a.grad_attn_out, slot, hidden), vectors);
      continue;
    }
    const ResidualGradient<S> others(a, slot, row, hidden);
    if (!a.grad_rows) {
      for_vectors<S>(vectors, [&](int v, auto nth) {
        others.finish(v, nth, [](int) { return Part<S::kSize>{}; });
      });
      continue;
    }
    Row<S> grad, residual;
    grad.load(row_of<T>(a.grad_rows, slot, hidden), vectors);
    residual.load(row_of<T>(a.residual, slot, hidden), vectors);
    const NormBackward<S, W> norm(grad, residual, a.weight, a.rstd[slot], hidden, scratch);
    for_vectors<S>(vectors, [&](int v, auto nth) {
      const auto vector = norm.at(v, nth);
      others.finish(v, nth, [&](int part) { return norm.gradient(vector, part, nth, of_weight); });
      of_weight.finish_vector(v);
    });
  }
  of_weight.finish();
}

}  // namespace pmod::cuda
