// Gathered rows plus attention, and the RMSNorm of the sum. One slot at a time.
//
// The sum is formed twice, from rows that are in the cache the second time: so it can be written
// past the cache, and is still normalised as rounded.
#pragma once

#include "cpu/rows/block.h"
#include "cpu/rows/gather.h"
#include "cpu/rows/gather_rmsnorm.h"
#include "cpu/rows/loops.h"
#include "cpu/rows/parameter_sum.h"

namespace pmod::cpu::PMOD_ISA {

template <typename T>
void gather_add_rmsnorm(const GatherAddRmsnorm<T>& a, int64_t begin, int64_t end) {
  const Weight<T> weight = a.weight;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t at = s * a.hidden;
    if (a.index[s] < 0) {
      zero_row(a.residual + at, a.hidden, a.streaming);
      zero_row(a.rows + at, a.hidden, a.streaming);
      a.rstd[s] = 0;
      continue;
    }
    const T* row = a.x + a.index[s] * a.hidden;
    const T* attn = a.attn_out + at;
    const auto add = [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      return round_to<T>(load(row + i, lanes) + load(attn + i, lanes));
    };
    Block<Acc<T>> squares{};
    for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      const Packed<T> residual = add(i, lanes);
      write(a.residual + at + i, residual, lanes, a.streaming);
      squares = squares + widen(residual) * widen(residual);
    });
    const Acc<T> rstd = reciprocal_rms<T>(squares, a.eps, a.hidden);
    const T* next = next_row(a.x, a.index, s, end, a.hidden);
    for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      prefetch(next + i);
      prefetch(attn + a.hidden + i);
      const Packed<T> out = normalise<T>(widen(add(i, lanes)), rstd, load_weight(weight, i));
      write(a.rows + at + i, out, lanes, a.streaming);
    });
    a.rstd[s] = rstd;
  }
  if (a.streaming) finish_streams();
}

// The gradient of one row of RMSNorm: rstd * (g - n * mean(g * n)) with n = x * rstd and
// g = grad * weight. `grad_weight` gets grad * round(n).
template <typename T>
struct NormBackward {
  const T* grad;
  const T* x;
  Weight<T> weight;
  Acc<T> rstd, mean;
  Acc<T>* grad_weight;

  PMOD_INLINE NormBackward(const T* grad_row, const T* row, const Weight<T>& norm_weight,
                           Acc<T> row_rstd, Acc<T>* weight_sum, int64_t size)
      : grad(grad_row), x(row), weight(norm_weight), rstd(row_rstd), grad_weight(weight_sum) {
    Block<Acc<T>> projection{};
    for_blocks(size, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      const Block<Acc<T>> g = load(grad + i, lanes) * load_weight(weight, i);
      projection = projection + g * (rstd * load(x + i, lanes));
    });
    mean = sum<T>(projection) / static_cast<Acc<T>>(size);
  }

  template <typename Lanes>
  [[nodiscard]] PMOD_INLINE Block<Acc<T>> block(int64_t i, Lanes lanes) const {
    const Block<Acc<T>> normed = rstd * load(x + i, lanes);
    const Block<Acc<T>> of_out = load(grad + i, lanes);
    const Block<Acc<T>> of_weight = of_out * widen(round_to<T>(normed));
    store_block(grad_weight + i, load_block(grad_weight + i) + of_weight);
    return rstd * (of_out * load_weight(weight, i) - mean * normed);
  }
};

template <typename T>
void gather_add_rmsnorm_backward(const GatherAddRmsnormBackward<T>& a, int64_t begin, int64_t end) {
  const ParameterSum<Acc<T>> sums[] = {a.norm};
  for_summed_rows(begin, end, a.hidden, sums, [&](int64_t s) PMOD_INLINE_LAMBDA {
    const int64_t at = s * a.hidden;
    if (a.index[s] < 0) return zero_row(a.grad_attn_out + at, a.hidden, a.streaming);
    const int64_t row = a.index[s] * a.hidden;
    const auto finish = [&](int64_t i, auto lanes, Block<Acc<T>> grad) PMOD_INLINE_LAMBDA {
      if (a.grad_residual) grad = grad + load(a.grad_residual + at + i, lanes);
      if (a.grad_out) grad = grad + load(a.grad_out + row + i, lanes);
      write(a.grad_attn_out + at + i, round_to<T>(grad), lanes, a.streaming);
      if (!a.grad_x) return;
      if (a.accumulate) grad = grad + load(a.grad_x + row + i, lanes);
      write(a.grad_x + row + i, round_to<T>(grad), lanes);
    };
    if (!a.grad_rows) {
      for_blocks(a.hidden, [&](int64_t i, auto lanes)
                               PMOD_INLINE_LAMBDA { finish(i, lanes, Block<Acc<T>>{}); });
      return;
    }
    const T* next =
        a.grad_out ? next_row(a.grad_out, a.index, s, end, a.hidden) : a.residual + at + a.hidden;
    const NormBackward<T> norm(a.grad_rows + at, a.residual + at, a.weight, a.rstd[s], a.norm.block,
                               a.hidden);
    for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      prefetch(a.grad_rows + at + a.hidden + i);
      prefetch(a.residual + at + a.hidden + i);
      prefetch(next + i);
      finish(i, lanes, norm.block(i, lanes));
    });
  });
  if (a.streaming) finish_streams();
}

}  // namespace pmod::cpu::PMOD_ISA
