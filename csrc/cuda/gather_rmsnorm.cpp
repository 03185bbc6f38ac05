// pmod::gather_rmsnorm: reference.gather_rmsnorm. Tensors to the launchers of gather_rmsnorm.cu and
// route_gather.cu.

#include <tuple>

#include "cuda/adapter.h"

namespace pmod::cuda {

std::tuple<Tensor, Tensor> normalise_rows(const char* op, const Rows& rows, const Tensor& x,
                                          const Tensor& index, const OptionalTensor& norm_weight,
                                          double eps, bool after_select) {
  const ParameterTensor weight(op, "norm_weight", norm_weight, x, rows.hidden);
  const int64_t slots = index.numel();
  Tensor out = allocate({slots, rows.hidden}, x.scalar_type());
  Tensor rstd = allocate({slots}, ScalarType::Float);
  check_launch(op, launch_gather_rmsnorm(rows, {.x = x.const_data_ptr(),
                                                .index = data<int32_t>(index),
                                                .weight = weight.get(),
                                                .eps = static_cast<float>(eps),
                                                .out = out.mutable_data_ptr(),
                                                .rstd = mutable_data<float>(rstd),
                                                .rows = x.size(0),
                                                .slots = slots,
                                                .after_select = after_select}));
  return {out, rstd};
}

namespace {

std::tuple<Tensor, Tensor> gather_rmsnorm(const Tensor& x_arg, const Tensor& index_arg,
                                          const Tensor& norm_weight, double eps) {
  const char* op = "gather_rmsnorm";
  const OnDevice device(op, "x", x_arg);
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Tensor index = vector(op, "index", index_arg, ScalarType::Int, -1);
  return normalise_rows(op, rows_of(op, x, device), x, index, norm_weight, eps, false);
}

Tensor gather_rmsnorm_backward(const Tensor& grad_x, const Tensor& grad_rows_arg,
                               const Tensor& x_arg, const Tensor& index_arg,
                               const Tensor& norm_weight, const Tensor& rstd_arg, bool accumulate) {
  const char* op = "gather_rmsnorm_backward_";
  const OnDevice device(op, "x", x_arg);
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Rows rows = rows_of(op, x, device);
  const Tensor index = vector(op, "index", index_arg, ScalarType::Int, -1);
  const int64_t slots = index.numel();
  const Tensor grad_rows =
      matrix(op, "grad_rows", grad_rows_arg, x.scalar_type(), slots, rows.hidden);
  const Tensor rstd = vector(op, "rstd", rstd_arg, ScalarType::Float, slots);
  check_mutable(op, "grad_x", grad_x, x);
  const ParameterTensor weight(op, "norm_weight", norm_weight, x, rows.hidden);
  Tensor grad_weight = allocate({rows.hidden}, ScalarType::Float);
  const Tensor sums = partials(slots, 1, rows.hidden);
  check_launch(op,
               launch_readers_backward(rows, {.x = x.const_data_ptr(),
                                              .grad_rows = grad_rows.const_data_ptr(),
                                              .rstd = data<float>(rstd),
                                              .index = data<int32_t>(index),
                                              .norm_weight = weight.get(),
                                              .grad_x = grad_x.mutable_data_ptr(),
                                              .grad_norm_weight = mutable_data<float>(grad_weight),
                                              .partials = mutable_data<float>(sums),
                                              .rows = x.size(0),
                                              .slots = slots,
                                              .overwrite = !accumulate}));
  return grad_weight;
}

}  // namespace
}  // namespace pmod::cuda

PMOD_DEVICE_IMPL(m) {
  m.impl("gather_rmsnorm", TORCH_BOX(&pmod::cuda::gather_rmsnorm));
  m.impl("gather_rmsnorm_backward_", TORCH_BOX(&pmod::cuda::gather_rmsnorm_backward));
}
