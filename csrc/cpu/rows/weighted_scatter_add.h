// The output of a routed layer. One row at a time: from its slot if it was kept, else from x. The
// next layer's logit is taken from the row as rounded, while it is in registers.
#pragma once

#include "cpu/rows/block.h"
#include "cpu/rows/loops.h"
#include "cpu/rows/parameter_sum.h"

namespace pmod::cpu::PMOD_ISA {

// Asks for the memory of a row that comes next; `row` itself may be anything.
template <typename T>
struct Sources {
  const T* first;
  const T* second;

  PMOD_INLINE Sources(const T* x, const T* kept, const T* also_kept, const int32_t* inverse,
                      int64_t row, int64_t hidden)
      : first(x + row * hidden), second(first) {
    if (inverse[row] >= 0) {
      first = kept + inverse[row] * hidden;
      second = also_kept + inverse[row] * hidden;
    }
  }

  PMOD_INLINE void prefetch_block(int64_t i) const {
    prefetch(first + i);
    prefetch(second + i);
  }
};

template <bool Score, bool Check, typename T>
bool scatter_rows(const WeightedScatterAdd<T>& a, int64_t begin, int64_t end) {
  const Weight<T> next_weight = a.next_weight;
  bool finite = true;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = a.x + r * a.hidden;
    T* to = a.out + r * a.hidden;
    const int64_t slot = a.inverse[r];
    const bool routable = a.kind[r] == kRoutable;
    const Sources<T> next(a.x, a.residual, a.update, a.inverse, r + 1 < end ? r + 1 : r, a.hidden);
    Block<Acc<T>> logit{}, nan{};
    const auto finish = [&](int64_t i, auto lanes, const Packed<T>& out) PMOD_INLINE_LAMBDA {
      next.prefetch_block(i);
      write(to + i, out, lanes, a.streaming);
      const Block<Acc<T>> v = widen(only(out, lanes));
      if constexpr (Score) logit = logit + v * load_weight(next_weight, i);
      if constexpr (Check) nan = nan + (v - v);  // 0 unless v is infinite or NaN
    };
    if (slot >= 0) {
      const Acc<T> g = routable && a.gate_mlp ? a.gate[r] : Acc<T>(1);
      const T* residual = a.residual + slot * a.hidden;
      const T* update = a.update + slot * a.hidden;
      for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
        finish(i, lanes, round_to<T>(load(residual + i, lanes) + g * load(update + i, lanes)));
      });
    } else if (routable && a.scale_skipped) {
      const Acc<T> g = a.gate[r];
      for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
        finish(i, lanes, round_to<T>(g * load(x + i, lanes)));
      });
    } else if (Score || Check || to != x) {
      for_blocks(a.hidden, [&](int64_t i, auto lanes)
                               PMOD_INLINE_LAMBDA { finish(i, lanes, read(x + i, lanes)); });
    }
    if constexpr (Score) a.next_logits[r] = routable ? sum<T>(logit) + a.next_bias : Acc<T>(0);
    if constexpr (Check) finite = finite && (a.kind[r] == kPadding || sum<T>(nan) == 0);
  }
  if (a.streaming) finish_streams();
  return finite;
}

template <typename T>
bool weighted_scatter_add(const WeightedScatterAdd<T>& a, int64_t begin, int64_t end) {
  if (a.next_weight) {
    return a.check_finite ? scatter_rows<true, true>(a, begin, end)
                          : scatter_rows<true, false>(a, begin, end);
  }
  return a.check_finite ? scatter_rows<false, true>(a, begin, end)
                        : scatter_rows<false, false>(a, begin, end);
}

template <typename T>
PMOD_INLINE void kept_row_backward(const WeightedScatterAddBackward<T>& a, int64_t r,
                                   const Sources<T>& next) {
  const T* grad = a.grad_out + r * a.hidden;
  const int64_t at = a.inverse[r] * a.hidden;
  const bool gated = a.kind[r] == kRoutable && a.gate_mlp;
  const Acc<T> g = gated ? a.gate[r] : Acc<T>(1);
  Block<Acc<T>> of_gate{};
  for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
    next.prefetch_block(i);
    const Packed<T> row = read(grad + i, lanes);
    const Block<Acc<T>> wide = widen(row);
    of_gate = of_gate + wide * load(a.update + at + i, lanes);
    write(a.grad_update + at + i, round_to<T>(g * wide), lanes, a.streaming);
    if (a.grad_residual) write(a.grad_residual + at + i, row, lanes, a.streaming);
  });
  a.grad_gate[r] = gated ? sum<T>(of_gate) : Acc<T>(0);
  if (a.zero_kept) zero_row(a.grad_x + r * a.hidden, a.hidden, a.streaming);
}

template <typename T>
PMOD_INLINE void skipped_row_backward(const WeightedScatterAddBackward<T>& a, int64_t r,
                                      const Sources<T>& next) {
  const T* grad = a.grad_out + r * a.hidden;
  const T* x = a.x + r * a.hidden;
  T* to = a.grad_x + r * a.hidden;
  a.grad_gate[r] = 0;
  if (a.kind[r] != kRoutable || !a.scale_skipped) {
    return copy_row(grad, to, a.hidden, a.streaming, grad + a.hidden);
  }
  const Acc<T> g = a.gate[r];
  Block<Acc<T>> product{};
  for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
    next.prefetch_block(i);
    const Block<Acc<T>> wide = load(grad + i, lanes);
    product = product + wide * load(x + i, lanes);
    if (!a.router_weight) write(to + i, round_to<T>(g * wide), lanes, a.streaming);
  });
  const Acc<T> of_gate = sum<T>(product);
  if (!a.router_weight) {
    a.grad_gate[r] = of_gate;
    return;
  }
  const Acc<T> z = a.slope[r] * of_gate;
  a.grad_logits[r] = z;
  for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
    const Block<Acc<T>> of_x = g * load(grad + i, lanes) + z * load_weight(a.router_weight, i);
    write(to + i, round_to<T>(of_x), lanes, a.streaming);
    Acc<T>* of_weight = a.router.block + i;
    store_block(of_weight, load_block(of_weight) + z * load(x + i, lanes));
  });
}

template <typename T>
void weighted_scatter_add_backward(const WeightedScatterAddBackward<T>& a, int64_t begin,
                                   int64_t end) {
  const ParameterSum<Acc<T>> sums[] = {a.router};
  for_summed_rows(begin, end, a.hidden, sums, [&](int64_t r) PMOD_INLINE_LAMBDA {
    const int64_t after = r + 1 < end ? r + 1 : r;
    const Sources<T> next(a.x, a.update, a.grad_out + after * a.hidden, a.inverse, after, a.hidden);
    if (a.grad_logits) a.grad_logits[r] = 0;
    if (a.inverse[r] >= 0) {
      kept_row_backward(a, r, next);
    } else {
      skipped_row_backward(a, r, next);
    }
  });
  if (a.streaming) finish_streams();
}

}  // namespace pmod::cpu::PMOD_ISA
