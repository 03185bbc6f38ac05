// select for batches with a sequence of more than kOneBlockRows rows; short ones may be among them.
//
// The logit's key is followed by the row, the lowest of which counts most, so that no two keys of a
// pool are equal. A pass per digit of 8 bits: one kernel counts the digits of the rows that are
// still undecided, of every pool, in global memory; the next picks each pool's digit. Passes with
// nothing left to decide return at once. Then kept rows are counted in parts of sequences, counts
// are added up along each sequence, and slots are written in row order. A part of a sequence per
// block; reads a few integers per row and pass. Integer atomics only, so that their order does not
// show; no kernel waits for another block.
#pragma once

#include "cuda/selection.cuh"

namespace pmod::cuda {

constexpr int kPartThreads = kDigits;
constexpr int kPartItems = 8;
constexpr int kPartRows = kPartThreads * kPartItems;
constexpr int kGateRows = 1024;
constexpr int kLogitBits = 32;

// How far a pool's selection has come: keys are decided by comparing key >> shift with prefix.
struct PoolState {
  uint64_t prefix;
  int32_t shift;
  int32_t wanted;  // rows whose digits so far equal the prefix that are still to be kept; 0: done
};

struct LongSelect {
  Select select;
  int32_t* counts;    // [P, kDigits], all 0 at the start
  int32_t* open;      // [passes + 1], all 0 at the start: pools that are undecided in each pass
  PoolState* states;  // [P]
  int32_t* kept;      // [parts]: kept rows of the part, then of earlier parts of the sequence
  int64_t parts;
  int row_bits;  // whole digits
};

// Parts before a sequence. Numbers are left out where a sequence ends inside a part; that bounds
// them by N / kPartRows + B without looking at the lengths.
__device__ __forceinline__ int64_t first_part(const Select& s, int64_t sequence) {
  const int64_t begin = min(max(int64_t{s.cu_seqlens[sequence]}, int64_t{0}), s.rows);
  return begin / kPartRows + sequence;
}

struct Part {
  int64_t sequence;
  Range rows;

  __device__ __forceinline__ explicit Part(const Select& s) {
    int64_t low = 0, high = s.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_part(s, middle) <= blockIdx.x ? low : high) = middle;
    }
    sequence = low;
    rows = rows_of_sequence(s.cu_seqlens, low, s.rows);
    const int64_t before = max(int64_t{blockIdx.x} - first_part(s, low), int64_t{0});
    rows.begin = min(rows.begin + before * kPartRows, rows.end);
    rows.end = min(rows.begin + kPartRows, rows.end);
  }
};

// The pool of a routable row, or -1.
template <bool kPools>
__device__ __forceinline__ int32_t pool_of(const Select& s, const Part& part, int64_t row) {
  if constexpr (kPools) {
    const int32_t pool = s.pool_id[row];
    return pool >= 0 && pool < s.pools ? pool : -1;
  } else {
    return static_cast<int32_t>(part.sequence);
  }
}

__device__ __forceinline__ uint64_t key_of(const LongSelect& a, int64_t row) {
  const uint64_t rows = (uint64_t{1} << a.row_bits) - 1;
  return uint64_t{sort_key(a.select.logits[row])} << a.row_bits |
         (rows - static_cast<uint64_t>(row));
}

// A tile's rows that have to be counted in a pass.
template <bool kPools>
struct Undecided {
  uint32_t digits[kPartItems];
  int32_t pools[kPartItems];  // -1: decided

  __device__ __forceinline__ Undecided(const LongSelect& a, const Part& part, int pass, int shift) {
    const Tile<kPartItems> tile(part.rows);
#pragma unroll
    for (int i = 0; i < kPartItems; ++i) {
      digits[i] = 0;
      pools[i] = -1;
      if (!tile.has(i) || a.select.kind[tile.row(i)] != kRoutable) continue;
      const uint64_t key = key_of(a, tile.row(i)) >> shift;
      digits[i] = static_cast<uint32_t>(key) & kDigitMask;
      pools[i] = pool_of<kPools>(a.select, part, tile.row(i));
      if (pass == 0 || pools[i] < 0) continue;
      const PoolState state = a.states[pools[i]];
      if (state.wanted == 0 || key >> kDigitBits != state.prefix) pools[i] = -1;
    }
  }
};

// Of the pools of a part one is counted in shared memory, the others, of which there are rarely
// any, row by row.
template <bool kPools>
__global__ void __launch_bounds__(kPartThreads)
    count_digits_kernel(LongSelect a, int pass, int shift) {
  PMOD_SHARED(int32_t, shared_counts, DigitCounts::kCopies* kDigits);
  if (pass > 0 && a.open[pass] == 0) return;
  const Part part(a.select);
  if (part.rows.begin == part.rows.end) return;
  DigitCounts counts(shared_counts);
  counts.clear();
  __syncthreads();
  const Undecided<kPools> rows(a, part, pass, shift);
  auto shared_pool = static_cast<int32_t>(part.sequence);
  if constexpr (kPools) {
    uint32_t pool = ~0U;
#pragma unroll
    for (int i = 0; i < kPartItems; ++i) pool = min(pool, static_cast<uint32_t>(rows.pools[i]));
    shared_pool = static_cast<int32_t>(block_min(pool));  // -1 if there is nothing to count
  }
#pragma unroll
  for (int i = 0; i < kPartItems; ++i) {
    if (rows.pools[i] < 0) continue;
    if (rows.pools[i] == shared_pool) {
      counts.add(rows.digits[i]);
    } else {
      atomicAdd(&a.counts[int64_t{rows.pools[i]} * kDigits + rows.digits[i]], 1);
    }
  }
  __syncthreads();
  const int32_t count = counts.take(threadIdx.x);
  if (count > 0) atomicAdd(&a.counts[int64_t{shared_pool} * kDigits + threadIdx.x], count);
}

// A block per pool.
__global__ void __launch_bounds__(kDigits) pick_digits_kernel(LongSelect a, int pass, int shift) {
  const int64_t pool = blockIdx.x;
  PoolState state = pass == 0 ? PoolState{0, 0, a.select.k[pool]} : a.states[pool];
  if (pass > 0 && state.wanted == 0) return;
  if (state.wanted > 0) {
    int32_t* counts = a.counts + pool * kDigits;
    const int32_t count = counts[digit_of_thread()];
    counts[digit_of_thread()] = 0;
    const PickedDigit picked = pick_digit(count, state.wanted);
    const uint64_t prefix = state.prefix << kDigitBits | picked.digit;
    state = {prefix, shift, picked.wanted < picked.count ? picked.wanted : 0};
  } else {
    state = {2, 63, 0};  // what no key reaches
  }
  if (threadIdx.x != 0) return;
  a.states[pool] = state;
  if (state.wanted > 0) atomicAdd(&a.open[pass + 1], 1);
}

template <bool kPools>
__device__ __forceinline__ uint32_t kept_rows(const LongSelect& a, const Part& part) {
  const Tile<kPartItems> tile(part.rows);
  uint32_t keep = 0;
#pragma unroll
  for (int i = 0; i < kPartItems; ++i) {
    if (!tile.has(i)) continue;
    const uint8_t kind = a.select.kind[tile.row(i)];
    bool kept = kind == kAlways;
    if (kind == kRoutable) {
      const int32_t pool = pool_of<kPools>(a.select, part, tile.row(i));
      if (pool >= 0) {
        const PoolState state = a.states[pool];
        kept = key_of(a, tile.row(i)) >> state.shift >= state.prefix;
      }
    }
    if (kept) keep |= 1U << i;
  }
  return keep;
}

template <bool kPools>
__global__ void __launch_bounds__(kPartThreads) count_kept_kernel(LongSelect a) {
  const MarkedRows kept(kept_rows<kPools>(a, Part(a.select)));
  if (threadIdx.x == 0) a.kept[blockIdx.x] = kept.total;
}

// A block per sequence.
__global__ void __launch_bounds__(kPartThreads) add_up_kept_kernel(LongSelect a) {
  const int64_t first = first_part(a.select, blockIdx.x);
  const int64_t end = min(first_part(a.select, blockIdx.x + 1), a.parts);
  int32_t before = 0;
  for (int64_t at = first; at < end; at += kPartThreads) {
    const int64_t part = at + threadIdx.x;
    const int32_t count = part < end ? a.kept[part] : 0;
    const BlockSum sum(count);
    if (part < end) a.kept[part] = before + sum.upto - count;
    before += sum.total;
  }
}

template <bool kPools>
__global__ void __launch_bounds__(kPartThreads) write_slots_kernel(LongSelect a) {
  const Part part(a.select);
  const uint32_t keep = kept_rows<kPools>(a, part);
  Range slots = slots_of_sequence(a.select, part.sequence);
  slots.begin += a.kept[blockIdx.x];
  write_slots(a.select, Tile<kPartItems>(part.rows), slots, MarkedRows(keep), keep);
}

// A block per sequence if gates are a softmax, else per kGateRows rows.
__global__ void __launch_bounds__(1024) gate_kernel(Gate gate, Select s) {
  const int64_t first = int64_t{blockIdx.x} * kGateRows;
  const Range rows = gate.activation == Activation::kSoftmax
                         ? rows_of_sequence(s.cu_seqlens, blockIdx.x, s.rows)
                         : Range{first, min(first + kGateRows, s.rows)};
  write_gates(gate, s.logits, s.kind, rows, s.gate);
}

}  // namespace pmod::cuda
