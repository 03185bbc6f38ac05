// RMSNorm of gathered rows: reference.gather_rmsnorm. The backward is in route_gather.cuh.
//
// One block per slot, with the row in registers between the sum of squares and the product. Reads K
// rows and writes K.
#pragma once

#include "cuda/launchers.h"
#include "cuda/norm.cuh"

namespace pmod::cuda {

template <typename S, typename W>
__global__ void __launch_bounds__(kMostThreads) gather_rmsnorm_kernel(GatherRmsnorm a, int hidden) {
  using T = typename S::T;
  PMOD_SHARED(float, scratch, kWarp);
  wait_for_predecessor();
  const int vectors = hidden / S::kSize;
  const int32_t index = a.index[blockIdx.x];
  T* to = row_of<T>(a.out, blockIdx.x, hidden);
  if (!leads_to_one_of(a.rows, index)) {
    write_zeros<S>(to, vectors);
    if (threadIdx.x == 0) a.rstd[blockIdx.x] = 0.0F;
    return;
  }
  Row<S> row;
  row.load(row_of<T>(a.x, index, hidden), vectors);
  float squares = 0.0F;
  for_vectors<S>(vectors, [&](int v, auto nth) {
    const Values<S::kSize> x = row.values(v, nth);
    squares = add_products(x, x, squares);
  });
  const float rstd = reciprocal_rms(block_sum(squares, scratch), hidden, a.eps);
  const Weight<S, W> weight(a.weight);
  for_vectors<S>(vectors, [&](int v, auto nth) {
    write<S::kSize>(to, v, normalise<T>(row.values(v, nth), rstd, weight.at(v)));
  });
  if (threadIdx.x == 0) a.rstd[blockIdx.x] = rstd;
}

}  // namespace pmod::cuda
