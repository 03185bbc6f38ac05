// pmod::route_gather and pmod::select_gather: reference.route_gather. Tensors to the launchers of
// route.cu, select.cu, gather_rmsnorm.cu and route_gather.cu.

#include <tuple>

#include "cuda/adapter.h"

namespace pmod::cuda {
namespace {

// (rows, rstd): normalised if there is a weight, else copied, and no rstd.
std::tuple<Tensor, Tensor> gather_rows(const char* op, const Rows& rows, const Tensor& x,
                                       const Tensor& index, const OptionalTensor& norm_weight,
                                       double eps) {
  if (norm_weight) return normalise_rows(op, rows, x, index, norm_weight, eps, true);
  return {copy_rows(op, rows, x, index), allocate({0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_gather(
    const Tensor& x_arg, const Tensor& router_weight, const OptionalTensor& router_bias,
    const Tensor& kind, const Tensor& cu_seqlens, const OptionalTensor& pool_id, const Tensor& k,
    const Tensor& slot_start, int64_t num_slots, int64_t max_length, double gate_scale,
    double gate_bias, int64_t activation, const OptionalTensor& norm_weight, double eps) {
  const char* op = "route_gather";
  const OnDevice device(op, "x", x_arg);
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Rows shape = rows_of(op, x, device);
  const Plan plan =
      check_shapes(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length, x.size(0));
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  Tensor logits = score(op, shape, x, router_weight, router_bias, plan.kind);
  const Selected s = select_rows(op, logits, plan, gate, device.stream());
  auto [rows, rstd] = gather_rows(op, shape, x, s.index, norm_weight, eps);
  return {logits, s.gate, s.index, s.inverse, rows, rstd, s.scratch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_gather(
    const Tensor& x_arg, const Tensor& logits_arg, const Tensor& kind, const Tensor& cu_seqlens,
    const OptionalTensor& pool_id, const Tensor& k, const Tensor& slot_start, int64_t num_slots,
    int64_t max_length, double gate_scale, double gate_bias, int64_t activation,
    const OptionalTensor& norm_weight, double eps) {
  const char* op = "select_gather";
  const OnDevice device(op, "x", x_arg);
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Tensor logits = vector(op, "logits", logits_arg, ScalarType::Float, x.size(0));
  const Plan plan =
      check_shapes(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length, x.size(0));
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  const Selected s = select_rows(op, logits, plan, gate, device.stream());
  auto [rows, rstd] = gather_rows(op, rows_of(op, x, device), x, s.index, norm_weight, eps);
  return {s.gate, rows, rstd, s.index, s.inverse, s.scratch};
}

std::tuple<Tensor, Tensor, Tensor> route_gather_backward(
    const Tensor& grad_x, const OptionalTensor& grad_logits, const OptionalTensor& grad_gate,
    const OptionalTensor& grad_rows_arg, const OptionalTensor& grad_kept_arg, const Tensor& x_arg,
    const Tensor& router_weight, const Tensor& logits_arg, const Tensor& kind_arg,
    const Tensor& cu_seqlens, const Tensor& index_arg, const Tensor& inverse_arg,
    const OptionalTensor& norm_weight, const Tensor& rstd_arg, double gate_scale,
    int64_t activation, bool overwrite) {
  const char* op = "route_gather_backward_";
  const OnDevice device(op, "x", x_arg);
  const ScalarType type = x_arg.scalar_type();
  const Tensor x = matrix(op, "x", x_arg, type, -1, -1);
  const Rows shape = rows_of(op, x, device);
  const int64_t rows = x.size(0), hidden = shape.hidden;
  const Tensor index = vector(op, "index", index_arg, ScalarType::Int, -1);
  const int64_t slots = index.numel();
  check_mutable(op, "grad_x", grad_x, x);
  const OptionalTensor grad_rows = matrix(op, "grad_rows", grad_rows_arg, type, slots, hidden);
  const OptionalTensor grad_kept = matrix(op, "grad_kept", grad_kept_arg, type, slots, hidden);
  const Tensor inverse = vector(op, "inverse", inverse_arg, ScalarType::Int, rows);
  const Tensor rstd = vector(op, "rstd", rstd_arg, ScalarType::Float, norm_weight ? slots : 0);
  const Tensor z = logit_gradient(
      op, vector(op, "grad_logits", grad_logits, ScalarType::Float, rows),
      vector(op, "grad_gate", grad_gate, ScalarType::Float, rows),
      vector(op, "logits", logits_arg, ScalarType::Float, rows), check_kind(op, kind_arg, rows),
      check_bounds(op, cu_seqlens), check_gate(op, gate_scale, 0, activation), device.stream());
  const ParameterTensor router(op, "router_weight", router_weight, x, hidden);
  const ParameterTensor norm(op, "norm_weight", norm_weight, x, hidden);
  Tensor grad_router = allocate({hidden}, ScalarType::Float);
  Tensor grad_bias = allocate({1}, ScalarType::Float);
  Tensor grad_norm = allocate({norm_weight ? hidden : 0}, ScalarType::Float);
  const Tensor sums = partials(rows, norm_weight ? 2 : 1, hidden);
  check_launch(
      op, launch_readers_backward(shape, {.x = x.const_data_ptr(),
                                          .grad_rows = data<uint8_t>(grad_rows),
                                          .grad_kept = data<uint8_t>(grad_kept),
                                          .rstd = data<float>(rstd),
                                          .grad_logits = data<float>(z),
                                          .inverse = data<int32_t>(inverse),
                                          .index = data<int32_t>(index),
                                          .router_weight = router.get(),
                                          .norm_weight = norm.get(),
                                          .grad_x = grad_x.mutable_data_ptr(),
                                          .grad_router_weight = mutable_data<float>(grad_router),
                                          .grad_router_bias = mutable_data<float>(grad_bias),
                                          .grad_norm_weight = mutable_data<float>(grad_norm),
                                          .partials = mutable_data<float>(sums),
                                          .rows = rows,
                                          .slots = slots,
                                          .overwrite = overwrite}));
  return {grad_router, grad_bias, grad_norm};
}

}  // namespace
}  // namespace pmod::cuda

PMOD_DEVICE_IMPL(m) {
  m.impl("route_gather", TORCH_BOX(&pmod::cuda::route_gather));
  m.impl("select_gather", TORCH_BOX(&pmod::cuda::select_gather));
  m.impl("route_gather_backward_", TORCH_BOX(&pmod::cuda::route_gather_backward));
}
