// pmod::gather: reference.gather. Tensors to the launchers of gather.cu.

#include <tuple>

#include "cuda/adapter.h"

namespace pmod::cuda {

Tensor copy_rows(const char* op, const Rows& rows, const Tensor& x, const Tensor& index) {
  Tensor out = allocate({index.numel(), rows.hidden}, x.scalar_type());
  check_launch(op, launch_gather(rows, {.x = x.const_data_ptr(),
                                        .index = data<int32_t>(index),
                                        .out = out.mutable_data_ptr(),
                                        .rows = x.size(0),
                                        .slots = index.numel()}));
  return out;
}

namespace {

Tensor gather(const Tensor& x_arg, const Tensor& index_arg) {
  const char* op = "gather";
  const OnDevice device(op, "x", x_arg);
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Tensor index = vector(op, "index", index_arg, ScalarType::Int, -1);
  return copy_rows(op, rows_of(op, x, device), x, index);
}

void gather_backward(const Tensor& grad_x, const Tensor& grad_rows_arg, const Tensor& index_arg,
                     bool accumulate) {
  const char* op = "gather_backward_";
  const OnDevice device(op, "grad_x", grad_x);
  check_mutable(op, "grad_x", grad_x, grad_x);
  const Tensor index = vector(op, "index", index_arg, ScalarType::Int, -1);
  const Tensor grad_rows =
      matrix(op, "grad_rows", grad_rows_arg, grad_x.scalar_type(), index.numel(), grad_x.size(1));
  check_launch(op, launch_gather_backward(rows_of(op, grad_x, device),
                                          {.grad_rows = grad_rows.const_data_ptr(),
                                           .index = data<int32_t>(index),
                                           .grad_x = grad_x.mutable_data_ptr(),
                                           .rows = grad_x.size(0),
                                           .slots = index.numel(),
                                           .accumulate = accumulate}));
}

}  // namespace
}  // namespace pmod::cuda

PMOD_DEVICE_IMPL(m) {
  m.impl("gather", TORCH_BOX(&pmod::cuda::gather));
  m.impl("gather_backward_", TORCH_BOX(&pmod::cuda::gather_backward));
}
