// The gradient of reference.weighted_scatter_add.
//
// One visit per row of the gradient; kept rows go to their slot, others to the gradient of x. With
// a router, whose gate weighted the skipped rows, their gradient goes on to the logit, and from
// there to x and the router; then a fixed number of blocks have a range of rows each, else there is
// one block per row. Reads 2N rows (those of update only where the gate needs them) and writes N,
// and K more each for the gradient of the residual and for zeros in kept rows of grad_x, where
// asked for.
#pragma once

#include "cuda/gate.cuh"
#include "cuda/launchers.h"
#include "cuda/partial_sum.cuh"

namespace pmod::cuda {

template <typename S>
__device__ __forceinline__ void kept_row_backward(const WeightedScatterAddBackward& a, int64_t r,
                                                  int64_t slot, int hidden, float* scratch) {
  using T = typename S::T;
  constexpr int kSize = S::kSize;
  const int vectors = hidden / kSize;
  const bool gated = a.kind[r] == kRoutable && a.gate_mlp;
  Row<S> grad, update;
  grad.load(row_of<T>(a.grad_out, r, hidden), vectors);
  if (gated) update.load(row_of<T>(a.update, slot, hidden), vectors);
  const float gate = gated ? a.gate[r] : 1.0F;
  T* to_update = row_of<T>(a.grad_update, slot, hidden);
  T* to_residual = row_of<T>(a.grad_residual, slot, hidden);
  float of_gate = 0.0F;
  for_vectors<S>(vectors, [&](int v, auto nth) {
    const Packed<T, kSize> packed = grad.packed(v, nth);
    const Values<kSize> wide = widen(packed);
    if (gated) of_gate = add_products(wide, update.values(v, nth), of_gate);
    write<kSize>(to_update, v, round_to<T>(gate * wide));
    if (a.grad_residual != nullptr) write<kSize>(to_residual, v, packed);
  });
  if (a.zero_kept) write_zeros<S>(row_of<T>(a.grad_x, r, hidden), vectors);
  if (gated) of_gate = block_sum(of_gate, scratch);
  if (threadIdx.x == 0) a.grad_gate[r] = of_gate;
}

// Of a row that the gate weighted. Returns the gradient of its logit, if there is a router.
template <typename S, typename W, typename Sum>
__device__ __forceinline__ float skipped_row_backward(const WeightedScatterAddBackward& a,
                                                      int64_t r, int hidden, Sum& of_router,
                                                      float* scratch) {
  using T = typename S::T;
  constexpr int kSize = S::kSize;
  const int vectors = hidden / kSize;
  Row<S> grad, x;
  grad.load(row_of<T>(a.grad_out, r, hidden), vectors);
  x.load(row_of<T>(a.x, r, hidden), vectors);
  const float gate = a.gate[r];
  float slope = 0.0F;
  if constexpr (kPresent<W>) slope = gate_slope(a.router_gate, a.logits[r]);
  T* to = row_of<T>(a.grad_x, r, hidden);
  float product = 0.0F;
  for_vectors<S>(vectors, [&](int v, auto nth) {
    const Values<kSize> wide = grad.values(v, nth);
    product = add_products(wide, x.values(v, nth), product);
    if constexpr (!kPresent<W>) write<kSize>(to, v, round_to<T>(gate * wide));
  });
  const float of_gate = block_sum(product, scratch);
  if (threadIdx.x == 0) a.grad_gate[r] = kPresent<W> ? 0.0F : of_gate;
  if constexpr (kPresent<W>) {
    const Weight<S, W> weight(a.router_weight);
    const float z = slope * of_gate;
    for_vectors<S>(vectors, [&](int v, auto nth) {
      const Packed<T, kSize> of_out = grad.packed(v, nth), row = x.packed(v, nth);
      const auto w = weight.packed(v);
      Packed<T, kSize> of_x = {};
#pragma unroll
      for (int part = 0; part < kSize / kPart<kSize>; ++part) {
        of_router.add(nth, part, z * part_of(row, part));
        set_part(of_x, part, gate * part_of(of_out, part) + z * part_of(w, part));
      }
      of_router.finish_vector(v);
      write<kSize>(to, v, of_x);
    });
    return z;
  }
  return 0.0F;
}

// One row, with what skipped_row_backward returns or 0.
template <typename S, typename W, typename Sum>
__device__ __forceinline__ float row_backward(const WeightedScatterAddBackward& a, int64_t r,
                                              int hidden, Sum& of_router, float* scratch) {
  using T = typename S::T;
  const int32_t slot = a.inverse[r];
  if (leads_to_one_of(a.slots, slot)) {
    kept_row_backward<S>(a, r, slot, hidden, scratch);
    return 0.0F;
  }
  if (a.kind[r] == kRoutable && a.scale_skipped) {
    return skipped_row_backward<S, W>(a, r, hidden, of_router, scratch);
  }
  copy_row<S>(row_of<T>(a.grad_out, r, hidden), row_of<T>(a.grad_x, r, hidden), hidden / S::kSize);
  if (threadIdx.x == 0) a.grad_gate[r] = 0.0F;
  return 0.0F;
}

template <typename S>
__global__ void __launch_bounds__(S::kBlock, 1)
    weighted_scatter_add_backward_kernel(WeightedScatterAddBackward a, int hidden) {
  PMOD_SHARED(float, scratch, kWarp);
  NoSum no_router(nullptr, hidden);
  row_backward<S, Absent>(a, blockIdx.x, hidden, no_router, scratch);
}

template <typename S, typename W>
__global__ void __launch_bounds__(S::kBlock, 1)
    weighted_scatter_add_router_backward_kernel(WeightedScatterAddBackward a, int hidden) {
  PMOD_SHARED(float, scratch, kWarp);
  ParameterSum<S> of_router(a.partials, hidden);
  const Chunk chunk(a.rows);
#pragma unroll 1
  for (int r = chunk.begin; r < chunk.end; ++r) {
    const float z = row_backward<S, W>(a, r, hidden, of_router, scratch);
    if (threadIdx.x == 0) a.grad_logits[r] = z;
  }
  of_router.finish();
}

// Zeros in the gradients of slots that hold no row. One warp per slot: there are few of them.
template <typename S>
__global__ void __launch_bounds__(kMostThreads)
    filler_backward_kernel(WeightedScatterAddBackward a, int hidden) {
  using T = typename S::T;
  constexpr int kSize = S::kSize;
  const int64_t warps = blockDim.x / kWarp;
  const int64_t slot = blockIdx.x * warps + threadIdx.x / kWarp;
  if (slot >= a.slots) return;
  const int32_t row = a.index[slot];
  if (leads_to_one_of(a.rows, row) && a.inverse[row] == slot) return;  // some block has written it
  T* to_update = row_of<T>(a.grad_update, slot, hidden);
  T* to_residual = row_of<T>(a.grad_residual, slot, hidden);
  for (int v = threadIdx.x % kWarp; v < hidden / kSize; v += kWarp) {
    write<kSize>(to_update, v, Packed<T, kSize>{});
    if (a.grad_residual != nullptr) write<kSize>(to_residual, v, Packed<T, kSize>{});
  }
}

}  // namespace pmod::cuda
