// Gates: scale * act(logit) + bias on routable rows, exactly 1 elsewhere (reference.activate), and
// their derivatives, which come from the logits. A softmax runs over the routable rows of a
// sequence: one block per sequence, each thread adds its rows in order and the block adds threads
// in order. The accurate functions of the platform; a few bytes per row.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launchers.h"

namespace pmod::cuda {

// Rows begin..end of the batch.
struct Range {
  int64_t begin, end;
};

// Of one sequence; inside the batch whatever the offsets say.
__device__ __forceinline__ Range rows_of_sequence(const int32_t* cu_seqlens, int64_t sequence,
                                                  int64_t rows) {
  const int64_t begin = min(max(int64_t{cu_seqlens[sequence]}, int64_t{0}), rows);
  return {begin, min(max(int64_t{cu_seqlens[sequence + 1]}, begin), rows)};
}

// Every activation but softmax.
__device__ __forceinline__ float activate(float logit, Activation activation) {
  if (activation == Activation::kTanh) return tanhf(logit);
  if (activation == Activation::kSigmoid) return 1.0F / (1.0F + expf(-logit));
  return logit;
}

// d gate / d logit; not of softmax. From e = exp(-|z|), as 1 - tanh^2 would cancel: that of the
// logistic function is e / (1 + e)^2, and tanh(z) = 2 logistic(2z) - 1.
__device__ __forceinline__ float gate_slope(const Gate& gate, float logit) {
  if (gate.activation == Activation::kNone) return gate.scale;
  const bool tanh = gate.activation == Activation::kTanh;
  const float e = expf((tanh ? -2.0F : -1.0F) * fabsf(logit));
  return gate.scale * (tanh ? 4.0F : 1.0F) * e / ((1.0F + e) * (1.0F + e));
}

// As block_sum. A number wins against NaN.
__device__ __forceinline__ float block_max(float value, float* scratch) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float largest = scratch[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; ++w) largest = fmaxf(largest, scratch[w]);
  __syncthreads();
  return largest;
}

// Adds up f(row) over the routable rows of a range. Every thread of the block calls it.
template <typename F>
__device__ __forceinline__ float sum_over_routable(const uint8_t* kind, Range rows, float* scratch,
                                                   const F& f) {
  float sum = 0.0F;
  for (int64_t r = rows.begin + threadIdx.x; r < rows.end; r += blockDim.x) {
    if (kind[r] == kRoutable) sum += f(r);
  }
  return block_sum(sum, scratch);
}

// What turns the logits of a sequence into its softmax. The largest logit is taken off first; a NaN
// is no such, and gets into the sum, so that it shows in every row.
struct Softmax {
  float largest, sum;

  __device__ __forceinline__ Softmax(const float* logits, const uint8_t* kind, Range rows,
                                     float* scratch)
      : largest(-INFINITY) {
    for (int64_t r = rows.begin + threadIdx.x; r < rows.end; r += blockDim.x) {
      if (kind[r] == kRoutable) largest = fmaxf(largest, logits[r]);
    }
    largest = block_max(largest, scratch);
    sum = sum_over_routable(kind, rows, scratch,
                            [&](int64_t r) { return expf(logits[r] - largest); });
  }

  [[nodiscard]] __device__ __forceinline__ float operator()(float logit) const {
    return expf(logit - largest) / sum;
  }
};

// Writes the gates of a range: a whole sequence if they are a softmax. Every thread of the block
// calls it.
__device__ __forceinline__ void write_gates(const Gate& gate, const float* logits,
                                            const uint8_t* kind, Range rows, float* out) {
  PMOD_SHARED(float, scratch, kWarp);
  const auto write = [&](const auto& act) {
    for (int64_t r = rows.begin + threadIdx.x; r < rows.end; r += blockDim.x) {
      out[r] = kind[r] == kRoutable ? gate.scale * act(logits[r]) + gate.bias : 1.0F;
    }
  };
  if (gate.activation == Activation::kSoftmax) {
    write(Softmax(logits, kind, rows, scratch));
  } else {
    write([&](float logit) { return activate(logit, gate.activation); });
  }
}

}  // namespace pmod::cuda
