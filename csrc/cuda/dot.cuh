// The dot product of a row with a weight, by one warp, with the bits that a block gets whose
// threads own the row in shares S: each thread's vectors in order, then lanes, then warps in order.
// So a score does not depend on whether it was taken with a row (weighted_scatter_add) or later
// (route).
#pragma once

#include "cuda/row.cuh"

namespace pmod::cuda {

// The same bits in every lane. `threads`: of the block, block_size<S>(hidden).
template <typename S, typename W>
__device__ __forceinline__ float dot_product_like_block(const typename S::T* row, const W* weight,
                                                        int hidden, int threads) {
  constexpr int kSize = S::kSize, kWarps = 8 / S::kVectors;  // so many at once: 8 loads
  const int vectors = hidden / kSize;
  float sum = 0.0F;
#pragma unroll 1
  for (int first = threadIdx.x % kWarp; first < threads; first += kWarps * kWarp) {
    Packed<typename S::T, kSize> packed[kWarps][S::kVectors];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
#pragma unroll
      for (int n = 0; n < S::kVectors; ++n) {
        const int v = first + w * kWarp + n * threads;
        if (first + w * kWarp < threads && v < vectors) packed[w][n] = read<kSize>(row, v);
      }
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int thread = first + w * kWarp;
      if (thread - thread % kWarp >= threads) break;
      float part = 0.0F;
#pragma unroll
      for (int n = 0; n < S::kVectors; ++n) {
        const int v = thread + n * threads;
        if (v >= vectors) continue;
        part = add_products(widen(packed[w][n]), load_weight<kSize>(weight, v), part);
      }
#pragma unroll 1
      for (int v = thread + S::kVectors * threads; v < vectors; v += threads) {
        part = add_products(widen(read<kSize>(row, v)), load_weight<kSize>(weight, v), part);
      }
      sum += warp_sum(part);
    }
  }
  return sum;
}

}  // namespace pmod::cuda
