// RMSNorm of gathered rows. One slot at a time: the sum of squares, then the row again, which is in
// the cache by then. Rounds before and after the multiplication by the weight, as a Llama does.
#pragma once

#include "cpu/rows/block.h"
#include "cpu/rows/gather.h"
#include "cpu/rows/loops.h"

namespace pmod::cpu::PMOD_ISA {

PMOD_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
PMOD_INLINE double square_root(double v) { return __builtin_sqrt(v); }

template <typename T>
PMOD_INLINE Acc<T> reciprocal_rms(const Block<Acc<T>>& squares, Acc<T> eps, int64_t size) {
  return Acc<T>(1) / square_root(sum<T>(squares) / static_cast<Acc<T>>(size) + eps);
}

// round(round(x * rstd) * weight)
template <typename T>
PMOD_INLINE Packed<T> normalise(const Block<Acc<T>>& x, Acc<T> rstd, const Block<Acc<T>>& weight) {
  return round_to<T>(widen(round_to<T>(rstd * x)) * weight);
}

template <typename T>
void gather_rmsnorm(const GatherRmsnorm<T>& a, int64_t begin, int64_t end) {
  const Weight<T> weight = a.weight;
  for (int64_t s = begin; s < end; ++s) {
    T* to = a.rows + s * a.hidden;
    if (a.index[s] < 0) {
      zero_row(to, a.hidden, a.streaming);
      a.rstd[s] = 0;
      continue;
    }
    const T* row = a.x + a.index[s] * a.hidden;
    Block<Acc<T>> squares{};
    for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      const Block<Acc<T>> x = load(row + i, lanes);
      squares = squares + x * x;
    });
    const Acc<T> rstd = reciprocal_rms<T>(squares, a.eps, a.hidden);
    const T* next = next_row(a.x, a.index, s, end, a.hidden);
    for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      prefetch(next + i);
      const Packed<T> out = normalise<T>(load(row + i, lanes), rstd, load_weight(weight, i));
      write(to + i, out, lanes, a.streaming);
    });
    a.rstd[s] = rstd;
  }
  if (a.streaming) finish_streams();
}

}  // namespace pmod::cpu::PMOD_ISA
