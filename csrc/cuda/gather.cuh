// Copies of rows: reference.gather and its backward.
//
// One block per slot. No two slots hold the same row, so backward writes rows of the gradient of x
// without atomics. Reads K rows and writes K; backward reads K (2K where it adds) and writes K.
// Bitwise copies; sums round once.
#pragma once

#include "cuda/launchers.h"
#include "cuda/row.cuh"

namespace pmod::cuda {

template <typename S>
__global__ void __launch_bounds__(kMostThreads) gather_kernel(Gather a, int hidden) {
  using T = typename S::T;
  const int vectors = hidden / S::kSize;
  const int32_t row = a.index[blockIdx.x];
  T* to = row_of<T>(a.out, blockIdx.x, hidden);
  if (leads_to_one_of(a.rows, row)) {
    copy_row<S>(row_of<T>(a.x, row, hidden), to, vectors);
  } else {
    write_zeros<S>(to, vectors);
  }
}

template <typename S>
__global__ void __launch_bounds__(kMostThreads)
    gather_backward_kernel(GatherBackward a, int hidden) {
  using T = typename S::T;
  const int vectors = hidden / S::kSize;
  const int32_t row = a.index[blockIdx.x];
  if (!leads_to_one_of(a.rows, row)) return;
  const T* from = row_of<T>(a.grad_rows, blockIdx.x, hidden);
  T* to = row_of<T>(a.grad_x, row, hidden);
  if (!a.accumulate) return copy_row<S>(from, to, vectors);
  Row<S> grad, before;
  grad.load(from, vectors);
  before.load(to, vectors);
  for_vectors<S>(vectors, [&](int v, auto nth) {
    write<S::kSize>(to, v, round_to<T>(before.values(v, nth) + grad.values(v, nth)));
  });
}

}  // namespace pmod::cuda
