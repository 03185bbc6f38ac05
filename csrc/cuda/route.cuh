// route: the logit x_r . w + b of every routable row, 0 elsewhere (reference.score), and the
// gradient of the logits from those of logits and gates.
//
// score: a warp per row, so that no block has to meet; a lane has eight vectors of 16 bytes on
// their way. Rows that are not routable are not read: V rows of D elements. Sums in float, in the
// order of weighted_scatter_add, which may score the same row for the next layer.
// logit_gradient: a thread per row; with a softmax gate, which couples rows, a block per sequence.
#pragma once

#include "cuda/dot.cuh"
#include "cuda/gate.cuh"
#include "cuda/launchers.h"

namespace pmod::cuda {

constexpr int kScoreThreads = 256;
constexpr int kScoreRows = kScoreThreads / kWarp;
constexpr int kGradientThreads = 256;
constexpr int kSoftmaxThreads = 1024;

// `threads`: of a block that works on one such row (dot.cuh).
template <typename S, typename W>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score_kernel(Score score, int hidden, int threads) {
  using T = typename S::T;
  const int64_t r = int64_t{blockIdx.x} * kScoreRows + threadIdx.x / kWarp;
  if (r >= score.rows) return;
  float logit = 0.0F;
  if (score.kind[r] == kRoutable) {
    const float bias = number_of<T>(score.bias);
    logit = dot_product_like_block<S>(row_of<T>(score.x, r, hidden),
                                      static_cast<const W*>(score.weight.data), hidden, threads) +
            bias;
  }
  if (threadIdx.x % kWarp == 0) score.logits[r] = logit;
}

// What a row gets from grad_logits, on top of what it gets from grad_gate.
__device__ __forceinline__ void write_gradient(const LogitGradient& g, int64_t r, float of_gate) {
  const float of_logit = g.grad_logits == nullptr ? 0.0F : g.grad_logits[r];
  g.out[r] = of_gate + of_logit;
}

// Not with a softmax gate, unless there is no gradient of it.
__global__ void __launch_bounds__(kGradientThreads)
    logit_gradient_kernel(Gate gate, LogitGradient g) {
  const int64_t r = int64_t{blockIdx.x} * kGradientThreads + threadIdx.x;
  if (r >= g.rows) return;
  if (g.kind[r] != kRoutable) {
    g.out[r] = 0.0F;
  } else {
    write_gradient(g, r,
                   g.grad_gate == nullptr ? 0.0F : gate_slope(gate, g.logits[r]) * g.grad_gate[r]);
  }
}

__global__ void __launch_bounds__(kSoftmaxThreads, 1)
    softmax_logit_gradient_kernel(Gate gate, LogitGradient g) {
  PMOD_SHARED(float, scratch, kWarp);
  const Range rows = rows_of_sequence(g.cu_seqlens, blockIdx.x, g.rows);
  const Softmax softmax(g.logits, g.kind, rows, scratch);
  const float mean = sum_over_routable(
      g.kind, rows, scratch, [&](int64_t r) { return softmax(g.logits[r]) * g.grad_gate[r]; });
  for (int64_t r = rows.begin + threadIdx.x; r < rows.end; r += blockDim.x) {
    if (g.kind[r] != kRoutable) {
      g.out[r] = 0.0F;
    } else {
      write_gradient(g, r, gate.scale * softmax(g.logits[r]) * (g.grad_gate[r] - mean));
    }
  }
}

}  // namespace pmod::cuda
