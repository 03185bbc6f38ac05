// What the two ways to select rows share: keys that sort like logits, the digit of the k-th largest
// key from counts of digits, and slots in row order. See select.cuh and select_long.cuh.
#pragma once

#include "cuda/device.cuh"
#include "cuda/gate.cuh"
#include "cuda/launchers.h"

namespace pmod::cuda {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr uint32_t kDigitMask = kDigits - 1;

// Sorts like the logit: NaN highest, -0 equal to +0. As pmod::sort_key.
__device__ __forceinline__ uint32_t sort_key(float logit) {
  constexpr uint32_t kSign = 0x80000000U, kInfinity = 0x7F800000U;
  const uint32_t bits = __float_as_uint(logit);
  const uint32_t size = bits & ~kSign;
  if (size > kInfinity) return ~0U;
  if (size == 0) return kSign;
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

// The rows of a block, kItems for each lane. The rows of a warp follow each other and its lanes
// take turns, so that lanes access memory side by side.
template <int kItems>
struct Tile {
  int64_t first;
  int32_t left;  // rows from the first on

  __device__ __forceinline__ explicit Tile(Range rows)
      : first(rows.begin + threadIdx.x / kWarp * kWarp * kItems + threadIdx.x % kWarp),
        left(static_cast<int32_t>(rows.end - first)) {}

  [[nodiscard]] __device__ __forceinline__ bool has(int i) const { return i * kWarp < left; }
  [[nodiscard]] __device__ __forceinline__ int64_t row(int i) const { return first + i * kWarp; }
};

// How often each digit occurs among the rows of a block. Copies keep warps out of each other's way
// where many rows have the same digit.
class DigitCounts {
 public:
  static constexpr int kCopies = 8;

  // `counts`: kCopies * kDigits, shared. The caller puts a barrier between clear() and add(), add()
  // and take().
  __device__ __forceinline__ explicit DigitCounts(int32_t* counts) : counts_(counts) {}

  __device__ __forceinline__ void clear() {
    for (unsigned i = threadIdx.x; i < kCopies * kDigits; i += blockDim.x) counts_[i] = 0;
  }
  __device__ __forceinline__ void add(uint32_t digit) {
    atomicAdd(&counts_[threadIdx.x / kWarp % kCopies * kDigits + digit], 1);
  }
  // And sets it to 0. Every digit by one thread.
  __device__ __forceinline__ int32_t take(uint32_t digit) {
    int32_t count = 0;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      count += counts_[copy * kDigits + digit];
      counts_[copy * kDigits + digit] = 0;
    }
    return count;
  }

 private:
  int32_t* counts_;
};

// The digit whose count a thread brings to pick_digit: from the largest down.
__device__ __forceinline__ uint32_t digit_of_thread() { return kDigits - 1 - threadIdx.x; }

struct PickedDigit {
  uint32_t digit;
  int32_t count;   // keys with this digit
  int32_t wanted;  // so many of them are among the largest ones; count or more: all of them
};

// The sum of one number per thread, in thread order. Every thread of the block calls it.
struct BlockSum {
  int32_t upto;   // of this thread and those before it
  int32_t total;  // of all

  __device__ __forceinline__ explicit BlockSum(int32_t value) : upto(value), total(0) {
    PMOD_SHARED(int32_t, sums, kWarp);
    const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (unsigned step = 1; step < kWarp; step *= 2) {
      const int32_t before = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += before;
    }
    if (lane == kWarp - 1) sums[warp] = upto;
    __syncthreads();
    const uint32_t of_lane = lane < blockDim.x / kWarp ? sums[lane] : 0;
    upto += static_cast<int32_t>(__reduce_add_sync(kAllLanes, lane < warp ? of_lane : 0));
    total = static_cast<int32_t>(__reduce_add_sync(kAllLanes, of_lane));
    __syncthreads();
  }
};

// The same in every thread of the block, all of which call it.
__device__ __forceinline__ uint32_t block_min(uint32_t value) {
  PMOD_SHARED(uint32_t, least, kWarp);
  const unsigned lane = threadIdx.x % kWarp;
  value = __reduce_min_sync(kAllLanes, value);
  if (lane == 0) least[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = __reduce_min_sync(kAllLanes, lane < blockDim.x / kWarp ? least[lane] : ~0U);
  __syncthreads();
  return value;
}

// The digit of the wanted-th largest key, wanted >= 1; digit 0 if there are fewer keys. Every
// thread of the block calls it, the first kDigits with counts.
__device__ __forceinline__ PickedDigit pick_digit(int32_t count, int32_t wanted) {
  PMOD_SHARED(PickedDigit, picked, 1);
  const int32_t upto = BlockSum(count).upto;
  const int32_t above = upto - count;
  if (threadIdx.x < kDigits && above < wanted) {
    if (wanted <= upto || digit_of_thread() == 0) {
      picked[0] = {digit_of_thread(), count, wanted - above};
    }
  }
  __syncthreads();
  return picked[0];
}

// Rows of a block that are marked by bits, one per item of a tile, counted in row order.
struct MarkedRows {
  int before;  // in earlier warps
  int total;   // in the block

  // Every thread of the block calls it.
  __device__ __forceinline__ explicit MarkedRows(uint32_t marks) {
    PMOD_SHARED(uint32_t, counts, kWarp);
    const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const uint32_t count = __reduce_add_sync(kAllLanes, __popc(marks));
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    const uint32_t of_lane = lane < blockDim.x / kWarp ? counts[lane] : 0;
    before = static_cast<int>(__reduce_add_sync(kAllLanes, lane < warp ? of_lane : 0));
    total = static_cast<int>(__reduce_add_sync(kAllLanes, of_lane));
    __syncthreads();
  }

  // Calls f(i, marked, marked rows of the block before this one) for the items of a tile.
  template <int kItems, typename F>
  __device__ __forceinline__ void for_each(uint32_t marks, const F& f) const {
    const uint32_t lanes_below = (1U << threadIdx.x % kWarp) - 1;
    int rank = before;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool marked = (marks >> i & 1U) != 0;
      const uint32_t warp = __ballot_sync(kAllLanes, marked);
      f(i, marked, rank + __popc(warp & lanes_below));
      rank += __popc(warp);
    }
  }
};

// The slots of a sequence, up to those of the next one: kept rows, then filler. Kept rows for which
// a wrong plan has no slot count as not kept.
__device__ __forceinline__ Range slots_of_sequence(const Select& s, int64_t sequence) {
  const int64_t begin = s.slot_start[sequence];
  const int64_t next = sequence + 1 < s.sequences ? int64_t{s.slot_start[sequence + 1]} : s.slots;
  return {begin, min(next, s.slots)};
}

// Writes index and inverse for the rows of a tile, whose first kept one gets slots.begin.
template <int kItems>
__device__ __forceinline__ void write_slots(const Select& s, const Tile<kItems>& tile, Range slots,
                                            const MarkedRows& kept, uint32_t keep) {
  kept.for_each<kItems>(keep, [&](int i, bool marked, int rank) {
    if (!tile.has(i)) return;
    const int64_t slot = slots.begin + rank;
    const bool placed = marked && slot >= 0 && slot < slots.end;
    s.inverse[tile.row(i)] = placed ? static_cast<int32_t>(slot) : -1;
    if (placed) s.index[slot] = static_cast<int32_t>(tile.row(i));
  });
}

}  // namespace pmod::cuda
