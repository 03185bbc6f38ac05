// The backward of what reads x: route, gather_rmsnorm and route_gather. One row of x at a time: the
// gradient of the gathered row, if it was kept, of its logit, and what came to it another way, go
// to the gradient of x with one rounding.
#pragma once

#include "cpu/rows/block.h"
#include "cpu/rows/gather.h"
#include "cpu/rows/gather_add_rmsnorm.h"
#include "cpu/rows/loops.h"
#include "cpu/rows/parameter_sum.h"

namespace pmod::cpu::PMOD_ISA {

// `slot` < 0: the row was not kept.
template <typename T>
PMOD_INLINE void reader_backward_row(const ReadersBackward<T>& a, int64_t row, int64_t slot) {
  const bool gathered = slot >= 0 && a.grad_rows;
  const bool more = slot >= 0 && a.grad_kept;
  const bool fresh = slot >= 0 && a.overwrite;
  const Acc<T> z = a.grad_logits ? a.grad_logits[row] : Acc<T>(0);
  if (!gathered && !more && !fresh && z == 0) return;
  const T* x = a.x + row * a.hidden;
  const int64_t at = slot * a.hidden;
  T* to = a.grad_x + row * a.hidden;
  const auto finish = [&](int64_t i, auto lanes, Block<Acc<T>> grad) PMOD_INLINE_LAMBDA {
    if (more) grad = grad + load(a.grad_kept + at + i, lanes);
    if (z != 0) {
      Acc<T>* of_weight = a.router.block + i;
      store_block(of_weight, load_block(of_weight) + z * load(x + i, lanes));
      grad = grad + z * load_weight(a.router_weight, i);
    }
    if (!fresh) grad = grad + load(to + i, lanes);
    write(to + i, round_to<T>(grad), lanes);
  };
  if (gathered && a.norm_weight) {
    const NormBackward<T> norm(a.grad_rows + at, x, a.norm_weight, a.rstd[slot], a.norm.block,
                               a.hidden);
    const T* next = next_row(a.x, a.index, slot, a.slots, a.hidden);
    for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      prefetch(next + i);
      prefetch(a.grad_rows + at + a.hidden + i);
      if (more) prefetch(a.grad_kept + at + a.hidden + i);
      prefetch(a.grad_x + (next - a.x) + i);
      finish(i, lanes, norm.block(i, lanes));
    });
    return;
  }
  for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
    finish(i, lanes, gathered ? load(a.grad_rows + at + i, lanes) : Block<Acc<T>>{});
  });
}

// Over rows of x if there is an `inverse`, else over slots.
template <typename T>
void readers_backward(const ReadersBackward<T>& a, int64_t begin, int64_t end) {
  const ParameterSum<Acc<T>> sums[] = {a.router, a.norm};
  for_summed_rows(begin, end, a.hidden, sums, [&](int64_t r) PMOD_INLINE_LAMBDA {
    const int64_t row = a.inverse ? r : a.index[r];
    if (row >= 0) reader_backward_row(a, row, a.inverse ? a.inverse[r] : r);
  });
}

}  // namespace pmod::cpu::PMOD_ISA
