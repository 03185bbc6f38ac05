// The output of a routed layer: reference.weighted_scatter_add.
//
// One block per row, which comes from its slot if it was kept, else from x. The next layer's logit
// is taken from the row as rounded, while it is in registers. Reads N + K rows (K rows of x are not
// read) and writes N; in place, a row that stays as it is is not written, and not read unless it is
// examined.
#pragma once

#include "cuda/launchers.h"
#include "cuda/weight.cuh"

namespace pmod::cuda {

// What is asked about a row that is written: its product with a weight W, and whether it is finite.
template <typename S, typename W>
struct Examined {
  Weight<S, W> weight;
  bool scored, checked;
  float logit = 0.0F;
  float nan = 0.0F;  // 0 unless an element is infinite or NaN

  __device__ __forceinline__ void add(int v, const Packed<typename S::T, S::kSize>& packed) {
    const Values<S::kSize> row = widen(packed);
    if constexpr (kPresent<W>) {
      if (scored) logit = add_products(row, weight.at(v), logit);
    }
    if (!checked) return;
#pragma unroll
    for (int j = 0; j < S::kSize; ++j) nan += row.v[j] - row.v[j];
  }
};

template <typename S, typename W>
__device__ __forceinline__ void write_kept_row(const WeightedScatterAdd& a, int64_t slot,
                                               float gate, typename S::T* to, int hidden,
                                               Examined<S, W>& examined) {
  using T = typename S::T;
  const int vectors = hidden / S::kSize;
  Row<S> residual, update;
  residual.load(row_of<T>(a.residual, slot, hidden), vectors);
  update.load(row_of<T>(a.update, slot, hidden), vectors);
  for_vectors<S>(vectors, [&](int v, auto nth) {
    const auto out = round_to<T>(gate * update.values(v, nth) + residual.values(v, nth));
    write<S::kSize>(to, v, out);
    examined.add(v, out);
  });
}

// `x` may be where it is written to.
template <typename S, typename W>
__device__ __forceinline__ void write_skipped_row(const typename S::T* x, bool scaled, float gate,
                                                  typename S::T* to, int hidden,
                                                  Examined<S, W>& examined) {
  using T = typename S::T;
  const bool written = scaled || to != x;
  if (!written && !examined.scored && !examined.checked) return;
  const int vectors = hidden / S::kSize;
  Row<S> row;
  row.load(x, vectors);
  for_vectors<S>(vectors, [&](int v, auto nth) {
    Packed<T, S::kSize> out = row.packed(v, nth);
    if (scaled) out = round_to<T>(gate * widen(out));
    if (written) write<S::kSize>(to, v, out);
    examined.add(v, out);
  });
}

template <typename S, typename W>
__global__ void __launch_bounds__(kMostThreads)
    weighted_scatter_add_kernel(WeightedScatterAdd a, int hidden) {
  using T = typename S::T;
  PMOD_SHARED(float, scratch, kWarp);
  const int64_t r = blockIdx.x;
  const int32_t slot = a.inverse[r];
  const uint8_t kind = a.kind[r];
  const bool routable = kind == kRoutable;
  Examined<S, W> examined{.weight = Weight<S, W>(a.next_weight),
                          .scored = kPresent<W> && routable,
                          .checked = a.finite != nullptr && kind != kPadding};
  T* to = row_of<T>(a.out, r, hidden);
  if (leads_to_one_of(a.slots, slot)) {
    const float gate = routable && a.gate_mlp ? a.gate[r] : 1.0F;
    write_kept_row(a, slot, gate, to, hidden, examined);
  } else {
    const bool scaled = routable && a.scale_skipped;
    const float gate = scaled ? a.gate[r] : 1.0F;
    write_skipped_row(row_of<T>(a.x, r, hidden), scaled, gate, to, hidden, examined);
  }
  if (examined.nan != 0.0F) *a.finite = false;  // every thread that writes writes the same
  if constexpr (kPresent<W>) {
    float logit = 0.0F;
    if (routable) logit = block_sum(examined.logit, scratch) + number_of<T>(a.next_bias);
    if (threadIdx.x == 0) a.next_logits[r] = logit;
  }
}

}  // namespace pmod::cuda
