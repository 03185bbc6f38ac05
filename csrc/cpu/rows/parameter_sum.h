// Parameter gradients over a range of rows. See ParameterSum.
#pragma once

#include <cstdint>

#include "cpu/rows/block.h"
#include "cpu/rows/loops.h"

namespace pmod::cpu::PMOD_ISA {

template <typename A>
PMOD_INLINE void clear(const ParameterSum<A>& sum, int64_t size) {
  __builtin_memset(sum.block, 0, size * sizeof(A));
}

template <typename A>
inline void add_block(const ParameterSum<A>& sum, int64_t size, bool first) {
  if (first) {
    for (int64_t i = 0; i < size; ++i) sum.total[i] = double{sum.block[i]};
  } else {
    for (int64_t i = 0; i < size; ++i) sum.total[i] += double{sum.block[i]};
  }
}

// Calls f(row) for the rows of a range; `sums` are those that f adds to.
template <typename A, int N, typename F>
PMOD_INLINE void for_summed_rows(int64_t begin, int64_t end, int64_t size,
                                 const ParameterSum<A> (&sums)[N], const F& f) {
  size = padded(size);
  for (int64_t block = begin; block < end; block += kBlockRows) {
    for (const auto& sum : sums) {
      if (sum.block != nullptr) clear(sum, size);
    }
    const int64_t block_end = block + kBlockRows < end ? block + kBlockRows : end;
    for (int64_t row = block; row < block_end; ++row) f(row);
    for (const auto& sum : sums) {
      if (sum.block != nullptr) add_block(sum, size, block == begin);
    }
  }
}

}  // namespace pmod::cpu::PMOD_ISA
