// select: gates, and the rows that each pool keeps, in row order (reference.select); for sequences
// of at most kOneBlockRows rows.
//
// One block per sequence, with a key per row in registers. Each pool finds its k-th largest key by
// digits of 8 bits, from the most significant on, and stops as soon as all rows with the digits so
// far are kept; of rows that equal the k-th key the first are kept. Then the kept rows are counted
// in row order. Reads and writes a few integers per row, and every slot of the sequence; atomics
// count integers in shared memory, in any order.
#pragma once

#include "cuda/selection.cuh"

namespace pmod::cuda {

// The first `wanted` rows that are marked.
template <int kItems>
__device__ __forceinline__ uint32_t first_rows(uint32_t marks, int wanted) {
  uint32_t out = 0;
  MarkedRows(marks).for_each<kItems>(marks, [&](int i, bool marked, int rank) {
    if (marked && rank < wanted) out |= 1U << i;
  });
  return out;
}

// Which of the candidates are the k best. All bits of `keys` and candidates are of the same items.
// Finds `counts` cleared and leaves it so. Every thread of the block calls it.
template <int kItems>
__device__ __forceinline__ uint32_t best_rows(const uint32_t (&keys)[kItems], uint32_t candidates,
                                              int32_t k, DigitCounts counts) {
  if (k <= 0) return 0;
  uint32_t kept = 0;
#pragma unroll 1
  for (int shift = 32 - kDigitBits;; shift -= kDigitBits) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((candidates >> i & 1U) != 0) counts.add(keys[i] >> shift & kDigitMask);
    }
    __syncthreads();
    const int32_t count = threadIdx.x < kDigits ? counts.take(digit_of_thread()) : 0;
    const PickedDigit picked = pick_digit(count, k);
    uint32_t equal = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t digit = keys[i] >> shift & kDigitMask;
      const uint32_t candidate = candidates & (1U << i);
      if (digit > picked.digit) kept |= candidate;
      if (digit == picked.digit) equal |= candidate;
    }
    candidates = equal;
    k = picked.wanted;
    if (k >= picked.count) return kept | candidates;
    if (shift == 0) return kept | first_rows<kItems>(candidates, k);
  }
}

// The best rows of every pool of a sequence. Pools whose ids are not 0..P-1 keep nothing.
template <int kItems>
__device__ __forceinline__ uint32_t best_rows_of_pools(const Select& s, const Tile<kItems>& tile,
                                                       const uint32_t (&keys)[kItems],
                                                       uint32_t candidates, DigitCounts counts) {
  uint32_t least = ~0U, greatest = 0;
#pragma unroll 4
  for (int i = 0; i < kItems; ++i) {
    if ((candidates >> i & 1U) == 0) continue;
    const auto pool = static_cast<uint32_t>(s.pool_id[tile.row(i)]);
    if (pool < s.pools) {
      least = min(least, pool);
      greatest = max(greatest, pool);
    }
  }
  least = block_min(least);
  greatest = ~block_min(~greatest);
  uint32_t kept = 0;
#pragma unroll 1
  for (int64_t pool = least; pool <= greatest; ++pool) {
    uint32_t mine = 0;
#pragma unroll 4
    for (int i = 0; i < kItems; ++i) {
      if ((candidates >> i & 1U) != 0 && s.pool_id[tile.row(i)] == pool) mine |= 1U << i;
    }
    kept |= best_rows<kItems>(keys, mine, s.k[pool], counts);
  }
  return kept;
}

__device__ __forceinline__ void write_filler(const Select& s, int64_t begin, int64_t end) {
  for (int64_t i = max(begin, int64_t{0}) + threadIdx.x; i < end; i += blockDim.x) s.index[i] = -1;
}

template <int kThreads, int kItems, bool kPools>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(Gate gate, Select s) {
  PMOD_SHARED(int32_t, shared_counts, DigitCounts::kCopies* kDigits);
  DigitCounts counts(shared_counts);
  counts.clear();
  Range rows = rows_of_sequence(s.cu_seqlens, blockIdx.x, s.rows);
  rows.end = min(rows.end, rows.begin + kThreads * kItems);
  const Tile<kItems> tile(rows);
  uint32_t keys[kItems];
  uint32_t candidates = 0, keep = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint8_t kind = tile.has(i) ? s.kind[tile.row(i)] : kPadding;
    keys[i] = tile.has(i) ? sort_key(s.logits[tile.row(i)]) : 0;
    if (kind == kRoutable) candidates |= 1U << i;
    if (kind == kAlways) keep |= 1U << i;
  }
  __syncthreads();
  if constexpr (kPools) {
    keep |= best_rows_of_pools<kItems>(s, tile, keys, candidates, counts);
  } else {
    keep |= best_rows<kItems>(keys, candidates, s.k[blockIdx.x], counts);
  }
  const MarkedRows kept(keep);
  const Range slots = slots_of_sequence(s, blockIdx.x);
  write_slots(s, tile, slots, kept, keep);
  if (blockIdx.x == 0) write_filler(s, 0, min(slots.begin, s.slots));
  write_filler(s, slots.begin + kept.total, slots.end);
  write_gates(gate, s.logits, s.kind, rows, s.gate);
  let_successor_start();
}

}  // namespace pmod::cuda
