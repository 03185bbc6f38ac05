// pmod::gather: reference.gather.
//
// One task per range of slots. No two slots hold the same row, so backward writes rows of the
// gradient of x without atomics. Reads K rows and writes K rows; backward reads K (2K where it
// adds) and writes K. Bitwise copies; sums round once.

#include "cpu/gather.h"

namespace pmod::cpu {

Tensor copy_rows(const char* op, const Tensor& x, const Tensor& index) {
  const int64_t slots = index.numel(), hidden = x.size(1);
  Tensor rows = allocate({slots, hidden}, x.scalar_type());
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    const Gather<T> loop{.x = data<T>(x),
                         .index = data<int32_t>(index),
                         .rows = mutable_data<T>(rows),
                         .hidden = hidden,
                         .streaming = worth_streaming(rows)};
    for_ranges(slots, hidden * sizeof(T),
               [&](int64_t begin, int64_t end) { row_loops<T>().gather(loop, begin, end); });
  });
  return rows;
}

namespace {

Tensor gather(const Tensor& x_arg, const Tensor& index_arg) {
  const char* op = "gather";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  return copy_rows(op, x, index_vector(op, "index", index_arg, -1, x.size(0)));
}

void gather_backward(Tensor grad_x, const Tensor& grad_rows_arg, const Tensor& index_arg,
                     bool accumulate) {
  const char* op = "gather_backward_";
  const Tensor grad_rows = matrix(op, "grad_rows", grad_rows_arg, grad_x.scalar_type(), -1, -1);
  const int64_t slots = grad_rows.size(0), hidden = grad_rows.size(1);
  matrix(op, "grad_x", grad_x, grad_x.scalar_type(), -1, hidden);
  check_mutable(op, "grad_x", grad_x, grad_x);
  const Tensor index = index_vector(op, "index", index_arg, slots, grad_x.size(0));
  dispatch_rows(op, "grad_rows", grad_rows, [&](auto type) {
    using T = typename decltype(type)::T;
    const GatherBackward<T> loop{.grad_rows = data<T>(grad_rows),
                                 .index = data<int32_t>(index),
                                 .grad_x = mutable_data<T>(grad_x),
                                 .hidden = hidden,
                                 .accumulate = accumulate};
    for_ranges(slots, hidden * sizeof(T), [&](int64_t begin, int64_t end) {
      row_loops<T>().gather_backward(loop, begin, end);
    });
  });
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("gather", TORCH_BOX(&pmod::cpu::gather));
  m.impl("gather_backward_", TORCH_BOX(&pmod::cpu::gather_backward));
}
