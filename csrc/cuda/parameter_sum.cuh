// The gradient of a parameter from its partial sums, and of the bias: sums over rows in a fixed
// order, in double.
//
// sum_partials: a block for 32 columns. Each warp adds consecutive partials in order, then the
// warps are added in order. Reads count * D floats. sum: one block; each thread adds every 1024th
// value in order, then lanes and warps are added.
#pragma once

#include "cuda/device.cuh"

namespace pmod::cuda {

constexpr int kPartialWarps = 16;
constexpr int kSumThreads = 1024;

__global__ void __launch_bounds__(kPartialWarps* kWarp)
    sum_partials_kernel(const float* partials, int64_t count, int64_t hidden, float* out) {
  PMOD_SHARED(double, sums, kPartialWarps* kWarp);
  const int64_t warp = threadIdx.x / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
  double sum = 0.0;
  if (column < hidden) {
    const int64_t end = (warp + 1) * count / kPartialWarps;
#pragma unroll 8
    for (int64_t p = warp * count / kPartialWarps; p < end; ++p) {
      sum += static_cast<double>(partials[p * hidden + column]);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= hidden) return;
  for (int w = 1; w < kPartialWarps; ++w) sum += sums[w * kWarp + threadIdx.x];
  out[column] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const float* values, int64_t rows, float* out) {
  constexpr int kWarps = kSumThreads / kWarp;
  PMOD_SHARED(double, sums, kWarps);
  double sum = 0.0;
#pragma unroll 8
  for (int64_t r = threadIdx.x; r < rows; r += kSumThreads) sum += static_cast<double>(values[r]);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w];
  out[0] = static_cast<float>(sum);
}

}  // namespace pmod::cuda
