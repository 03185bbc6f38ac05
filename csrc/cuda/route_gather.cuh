// The backward of what reads x: reference.route, gather_rmsnorm and route_gather. The gradient of
// the gathered row, if it was kept, of its logit, and what came to it another way, go to the
// gradient of x with one rounding.
//
// A fixed number of blocks, each with a range of rows of x (or of slots), for the gradients of the
// router's weight and the norm's. Reads 3K rows (2K without grad_kept; K more where it adds) and
// writes K; of the rows that were not kept, reads 2 and writes 1 where their logit has a gradient.
#pragma once

#include "cuda/launchers.h"
#include "cuda/norm.cuh"
#include "cuda/partial_sum.cuh"

namespace pmod::cuda {

// One row of x, the gradients that it gets, and where they go.
template <typename S, typename RouterW, typename NormW>
class ReaderRow {
 public:
  using T = typename S::T;
  static constexpr int kSize = S::kSize;

  // `slot` < 0: the row was not kept.
  __device__ __forceinline__ ReaderRow(const ReadersBackward& a, int row, int slot)
      : a_(a),
        row_(row),
        slot_(slot),
        gathered_(slot >= 0 && a.grad_rows),
        more_(slot >= 0 && a.grad_kept),
        fresh_(slot >= 0 && a.overwrite) {
    if constexpr (kPresent<RouterW>) z_ = a.grad_logits[row];
  }

  [[nodiscard]] __device__ __forceinline__ bool has_gradient() const {
    return gathered_ || more_ || fresh_ || z_ != 0.0F;
  }

  __device__ __forceinline__ void load(int hidden) {
    const int vectors = hidden / kSize;
    to_ = row_of<T>(a_.grad_x, row_, hidden);
    const bool reads_x = (kPresent<NormW> && gathered_) || z_ != 0.0F;
    if (reads_x) x_.load(row_of<T>(a_.x, row_, hidden), vectors);
    if (gathered_) rows_.load(row_of<T>(a_.grad_rows, slot_, hidden), vectors);
    if (more_) kept_.load(row_of<T>(a_.grad_kept, slot_, hidden), vectors);
    if (!fresh_) before_.load(to_, vectors);
  }

  // Adds up the loaded row. Every thread of the block calls it.
  template <typename RouterSum, typename NormSum>
  __device__ __forceinline__ void add_up(int hidden, float* scratch, RouterSum& of_router,
                                         NormSum& of_norm) const {
    const int vectors = hidden / kSize;
    if constexpr (kPresent<NormW>) {
      if (gathered_) {
        const NormBackward<S, NormW> norm(rows_, x_, a_.norm_weight, a_.rstd[slot_], hidden,
                                          scratch);
        for_vectors<S>(vectors, [&](int v, auto nth) {
          const auto vector = norm.at(v, nth);
          finish(
              v, nth, [&](int part) { return norm.gradient(vector, part, nth, of_norm); },
              of_router);
          of_norm.finish_vector(v);
        });
        return;
      }
    }
    for_vectors<S>(vectors, [&](int v, auto nth) {
      const Packed<T, kSize> grad = gathered_ ? rows_.packed(v, nth) : Packed<T, kSize>{};
      finish(v, nth, [&](int part) { return part_of(grad, part); }, of_router);
    });
  }

 private:
  // Adds what else there is to gradient(part), for every part of a vector.
  template <typename N, typename F, typename RouterSum>
  __device__ __forceinline__ void finish(int v, N nth, const F& gradient,
                                         RouterSum& of_router) const {
    Packed<T, kSize> kept = {}, before = {}, x = {}, sum = {};
    typename Weight<S, RouterW>::Vector weight = {};
    if (more_) kept = kept_.packed(v, nth);
    if (!fresh_) before = before_.packed(v, nth);
    if constexpr (kPresent<RouterW>) {
      if (z_ != 0.0F) {
        x = x_.packed(v, nth);
        weight = Weight<S, RouterW>(a_.router_weight).packed(v);
      }
    }
#pragma unroll
    for (int part = 0; part < kSize / kPart<kSize>; ++part) {
      Part<kSize> grad = gradient(part);
      if (more_) grad = grad + part_of(kept, part);
      if constexpr (kPresent<RouterW>) {
        if (z_ != 0.0F) {
          of_router.add(nth, part, z_ * part_of(x, part));
          grad = grad + z_ * part_of(weight, part);
        }
      }
      if (!fresh_) grad = grad + part_of(before, part);
      set_part(sum, part, grad);
    }
    if (z_ != 0.0F) of_router.finish_vector(v);
    write<kSize>(to_, v, sum);
  }

  const ReadersBackward& a_;
  int row_, slot_;
  bool gathered_, more_, fresh_;
  float z_ = 0.0F;
  T* to_;
  Row<S> x_, rows_, kept_, before_;
};

// Over rows of x if there is an `inverse`, else over slots. The partial sums of the norm follow
// those of the router.
template <typename S, typename RouterW, typename NormW>
__global__ void __launch_bounds__(S::kBlock, 1)
    readers_backward_kernel(ReadersBackward a, int hidden) {
  PMOD_SHARED(float, scratch, kWarp);
  float* norm_partials = a.partials + (kPresent<RouterW> ? int64_t{gridDim.x} * hidden : 0);
  SumFor<S, RouterW> of_router(a.partials, hidden);
  SumFor<S, NormW> of_norm(norm_partials, hidden);
  const Chunk chunk(a.inverse ? a.rows : a.slots);
#pragma unroll 1
  for (int i = chunk.begin; i < chunk.end; ++i) {
    const int row = a.inverse ? i : a.index[i];
    const int slot = a.inverse ? a.inverse[i] : i;
    if (!leads_to_one_of(a.rows, row)) continue;
    ReaderRow<S, RouterW, NormW> reader(a, row, leads_to_one_of(a.slots, slot) ? slot : -1);
    if (!reader.has_gradient()) continue;
    reader.load(hidden);
    reader.add_up(hidden, scratch, of_router, of_norm);
  }
  of_router.finish();
  of_norm.finish();
}

}  // namespace pmod::cuda
