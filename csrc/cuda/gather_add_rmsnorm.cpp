// pmod::gather_add_rmsnorm: reference.gather_add_rmsnorm. Tensors to the launchers of
// gather_add_rmsnorm.cu.

#include <tuple>

#include "cuda/adapter.h"

namespace pmod::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> gather_add_rmsnorm(const Tensor& x_arg,
                                                      const Tensor& attn_out_arg,
                                                      const Tensor& index_arg,
                                                      const Tensor& norm_weight, double eps) {
  const char* op = "gather_add_rmsnorm";
  const OnDevice device(op, "x", x_arg);
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Rows rows = rows_of(op, x, device);
  const Tensor index = vector(op, "index", index_arg, ScalarType::Int, -1);
  const int64_t slots = index.numel();
  const Tensor attn_out = matrix(op, "attn_out", attn_out_arg, x.scalar_type(), slots, rows.hidden);
  const ParameterTensor weight(op, "norm_weight", norm_weight, x, rows.hidden);
  Tensor residual = allocate({slots, rows.hidden}, x.scalar_type());
  Tensor out = allocate({slots, rows.hidden}, x.scalar_type());
  Tensor rstd = allocate({slots}, ScalarType::Float);
  check_launch(op, launch_gather_add_rmsnorm(rows, {.x = x.const_data_ptr(),
                                                    .attn_out = attn_out.const_data_ptr(),
                                                    .index = data<int32_t>(index),
                                                    .weight = weight.get(),
                                                    .eps = static_cast<float>(eps),
                                                    .residual = residual.mutable_data_ptr(),
                                                    .out = out.mutable_data_ptr(),
                                                    .rstd = mutable_data<float>(rstd),
                                                    .rows = x.size(0),
                                                    .slots = slots}));
  return {residual, out, rstd};
}

std::tuple<Tensor, Tensor> gather_add_rmsnorm_backward(
    const OptionalTensor& grad_x, const OptionalTensor& grad_residual_arg,
    const OptionalTensor& grad_out_arg, const OptionalTensor& grad_rows_arg,
    const Tensor& residual_arg, const Tensor& index_arg, const Tensor& norm_weight,
    const Tensor& rstd_arg, bool accumulate) {
  const char* op = "gather_add_rmsnorm_backward_";
  const OnDevice device(op, "residual", residual_arg);
  const ScalarType type = residual_arg.scalar_type();
  const Tensor residual = matrix(op, "residual", residual_arg, type, -1, -1);
  const Rows shape = rows_of(op, residual, device);
  const int64_t slots = residual.size(0);
  const OptionalTensor grad_residual =
      matrix(op, "grad_residual", grad_residual_arg, type, slots, shape.hidden);
  const OptionalTensor grad_rows =
      matrix(op, "grad_rows", grad_rows_arg, type, slots, shape.hidden);
  const OptionalTensor grad_out = matrix(op, "grad_out", grad_out_arg, type, -1, shape.hidden);
  int64_t rows = grad_out ? grad_out->size(0) : INT32_MAX;
  if (grad_x) {
    matrix(op, "grad_x", *grad_x, type, grad_out ? rows : -1, shape.hidden);
    check_mutable(op, "grad_x", *grad_x, *grad_x);
    rows = grad_x->size(0);
  }
  const Tensor index = vector(op, "index", index_arg, ScalarType::Int, slots);
  const Tensor rstd = vector(op, "rstd", rstd_arg, ScalarType::Float, slots);
  const ParameterTensor weight(op, "norm_weight", norm_weight, residual, shape.hidden);
  Tensor grad_attn_out = allocate({slots, shape.hidden}, type);
  Tensor grad_weight = allocate({shape.hidden}, ScalarType::Float);
  const Tensor sums = partials(slots, 1, shape.hidden);
  check_launch(op, launch_gather_add_rmsnorm_backward(
                       shape, {.grad_residual = data<uint8_t>(grad_residual),
                               .grad_out = data<uint8_t>(grad_out),
                               .grad_rows = data<uint8_t>(grad_rows),
                               .residual = residual.const_data_ptr(),
                               .index = data<int32_t>(index),
                               .weight = weight.get(),
                               .rstd = data<float>(rstd),
                               .grad_attn_out = grad_attn_out.mutable_data_ptr(),
                               .grad_x = grad_x ? grad_x->mutable_data_ptr() : nullptr,
                               .grad_weight = mutable_data<float>(grad_weight),
                               .partials = mutable_data<float>(sums),
                               .rows = rows,
                               .slots = slots,
                               .accumulate = accumulate}));
  return {grad_attn_out, grad_weight};
}

}  // namespace
}  // namespace pmod::cuda

PMOD_DEVICE_IMPL(m) {
  m.impl("gather_add_rmsnorm", TORCH_BOX(&pmod::cuda::gather_add_rmsnorm));
  m.impl("gather_add_rmsnorm_backward_", TORCH_BOX(&pmod::cuda::gather_add_rmsnorm_backward));
}
