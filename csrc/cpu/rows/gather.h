// Copies of rows. One slot at a time; a slot without a row (index -1) gets zeros.
#pragma once

#include "cpu/rows/block.h"
#include "cpu/rows/loops.h"

namespace pmod::cpu::PMOD_ISA {

// The row that follows in `index`, to be prefetched; any row will do at the end.
template <typename T>
PMOD_INLINE const T* next_row(const T* x, const int32_t* index, int64_t s, int64_t end,
                              int64_t hidden) {
  const int64_t row = s + 1 < end ? index[s + 1] : index[s];
  return x + (row < 0 ? 0 : row) * hidden;
}

template <typename T>
void gather(const Gather<T>& a, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    T* to = a.rows + s * a.hidden;
    const int64_t row = a.index[s];
    if (row < 0) {
      zero_row(to, a.hidden, a.streaming);
    } else {
      copy_row(a.x + row * a.hidden, to, a.hidden, a.streaming,
               next_row(a.x, a.index, s, end, a.hidden));
    }
  }
  if (a.streaming) finish_streams();
}

template <typename T>
void gather_backward(const GatherBackward<T>& a, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    if (a.index[s] < 0) continue;
    const T* from = a.grad_rows + s * a.hidden;
    T* to = a.grad_x + a.index[s] * a.hidden;
    if (!a.accumulate) {
      copy_row(from, to, a.hidden, false, from);
      continue;
    }
    for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      write(to + i, round_to<T>(load(to + i, lanes) + load(from + i, lanes)), lanes);
    });
  }
}

}  // namespace pmod::cpu::PMOD_ISA
