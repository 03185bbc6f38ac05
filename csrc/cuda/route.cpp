// pmod::route and pmod::select: reference.route. Tensors to the launchers of route.cu, select.cu
// and select_long.cu.

#include <tuple>

#include "cuda/adapter.h"

namespace pmod::cuda {

Tensor score(const char* op, const Rows& rows, const Tensor& x, const Tensor& weight,
             const OptionalTensor& bias, const Tensor& kind) {
  const ParameterTensor w(op, "router_weight", weight, x, rows.hidden);
  const ParameterTensor b(op, "router_bias", bias, x, 1);
  Tensor logits = allocate({x.size(0)}, ScalarType::Float);
  check_launch(op, launch_score(rows, {.x = x.const_data_ptr(),
                                       .weight = w.get(),
                                       .bias = b.get(),
                                       .kind = data<uint8_t>(kind),
                                       .logits = mutable_data<float>(logits),
                                       .rows = x.size(0)}));
  return logits;
}

Selected select_rows(const char* op, const Tensor& logits, const Plan& plan, const Gate& gate,
                     Stream stream) {
  const int64_t rows = logits.numel(), sequences = plan.slot_start.numel();
  const int64_t bytes = select_scratch_bytes(rows, sequences, plan.k.numel(), plan.max_length);
  Selected out{.gate = allocate({rows}, ScalarType::Float),
               .index = allocate({plan.num_slots}, ScalarType::Int),
               .inverse = allocate({rows}, ScalarType::Int),
               .scratch = allocate({bytes}, ScalarType::Byte)};
  check_launch(op, launch_select(gate,
                                 {.logits = data<float>(logits),
                                  .kind = data<uint8_t>(plan.kind),
                                  .cu_seqlens = data<int32_t>(plan.cu_seqlens),
                                  .pool_id = data<int32_t>(plan.pool_id),
                                  .k = data<int32_t>(plan.k),
                                  .slot_start = data<int32_t>(plan.slot_start),
                                  .gate = mutable_data<float>(out.gate),
                                  .index = mutable_data<int32_t>(out.index),
                                  .inverse = mutable_data<int32_t>(out.inverse),
                                  .scratch = mutable_data<void>(out.scratch),
                                  .rows = rows,
                                  .sequences = sequences,
                                  .pools = plan.k.numel(),
                                  .slots = plan.num_slots,
                                  .max_length = plan.max_length},
                                 stream));
  return out;
}

Tensor logit_gradient(const char* op, const OptionalTensor& grad_logits,
                      const OptionalTensor& grad_gate, const Tensor& logits, const Tensor& kind,
                      const Tensor& cu_seqlens, const Gate& gate, Stream stream) {
  const int64_t rows = logits.numel();
  Tensor out = allocate({rows}, ScalarType::Float);
  check_launch(op, launch_logit_gradient(gate,
                                         {.grad_logits = data<float>(grad_logits),
                                          .grad_gate = data<float>(grad_gate),
                                          .logits = data<float>(logits),
                                          .kind = data<uint8_t>(kind),
                                          .cu_seqlens = data<int32_t>(cu_seqlens),
                                          .out = mutable_data<float>(out),
                                          .rows = rows,
                                          .sequences = cu_seqlens.numel() - 1},
                                         stream));
  return out;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(
    const Tensor& x_arg, const Tensor& router_weight, const OptionalTensor& router_bias,
    const Tensor& kind, const Tensor& cu_seqlens, const OptionalTensor& pool_id, const Tensor& k,
    const Tensor& slot_start, int64_t num_slots, int64_t max_length, double gate_scale,
    double gate_bias, int64_t activation) {
  const char* op = "route";
  const OnDevice device(op, "x", x_arg);
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Plan plan =
      check_shapes(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length, x.size(0));
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  Tensor logits = score(op, rows_of(op, x, device), x, router_weight, router_bias, plan.kind);
  const Selected s = select_rows(op, logits, plan, gate, device.stream());
  return {logits, s.gate, s.index, s.inverse, s.scratch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select(const Tensor& logits_arg, const Tensor& kind,
                                                  const Tensor& cu_seqlens,
                                                  const OptionalTensor& pool_id, const Tensor& k,
                                                  const Tensor& slot_start, int64_t num_slots,
                                                  int64_t max_length, double gate_scale,
                                                  double gate_bias, int64_t activation) {
  const char* op = "select";
  const OnDevice device(op, "logits", logits_arg);
  const Tensor logits = vector(op, "logits", logits_arg, ScalarType::Float, -1);
  const Plan plan = check_shapes(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots,
                                 max_length, logits.numel());
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  const Selected s = select_rows(op, logits, plan, gate, device.stream());
  return {s.gate, s.index, s.inverse, s.scratch};
}

Tensor select_backward(const Tensor& grad_gate, const Tensor& logits_arg, const Tensor& kind_arg,
                       const Tensor& cu_seqlens, double gate_scale, int64_t activation) {
  const char* op = "select_backward";
  const OnDevice device(op, "logits", logits_arg);
  const Tensor logits = vector(op, "logits", logits_arg, ScalarType::Float, -1);
  const int64_t rows = logits.numel();
  const Tensor grad = vector(op, "grad_gate", grad_gate, ScalarType::Float, rows);
  const Gate gate = check_gate(op, gate_scale, 0, activation);
  return logit_gradient(op, std::nullopt, grad, logits, check_kind(op, kind_arg, rows),
                        check_bounds(op, cu_seqlens), gate, device.stream());
}

std::tuple<Tensor, Tensor> route_backward(const Tensor& grad_x, const OptionalTensor& grad_logits,
                                          const OptionalTensor& grad_gate, const Tensor& x_arg,
                                          const Tensor& router_weight, const Tensor& logits_arg,
                                          const Tensor& kind_arg, const Tensor& cu_seqlens,
                                          double gate_scale, int64_t activation) {
  const char* op = "route_backward_";
  const OnDevice device(op, "x", x_arg);
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Rows shape = rows_of(op, x, device);
  const int64_t rows = x.size(0);
  check_mutable(op, "grad_x", grad_x, x);
  const Tensor logits = vector(op, "logits", logits_arg, ScalarType::Float, rows);
  const Tensor z =
      logit_gradient(op, vector(op, "grad_logits", grad_logits, ScalarType::Float, rows),
                     vector(op, "grad_gate", grad_gate, ScalarType::Float, rows), logits,
                     check_kind(op, kind_arg, rows), check_bounds(op, cu_seqlens),
                     check_gate(op, gate_scale, 0, activation), device.stream());
  const ParameterTensor weight(op, "router_weight", router_weight, x, shape.hidden);
  Tensor none = allocate({rows}, ScalarType::Int);
  check_launch(op, set_bytes(none.mutable_data_ptr(), 0xFF, rows * 4, device.stream()));
  Tensor grad_weight = allocate({shape.hidden}, ScalarType::Float);
  Tensor grad_bias = allocate({1}, ScalarType::Float);
  const Tensor sums = partials(rows, 1, shape.hidden);
  check_launch(
      op, launch_readers_backward(shape, {.x = x.const_data_ptr(),
                                          .grad_logits = data<float>(z),
                                          .inverse = data<int32_t>(none),
                                          .router_weight = weight.get(),
                                          .grad_x = grad_x.mutable_data_ptr(),
                                          .grad_router_weight = mutable_data<float>(grad_weight),
                                          .grad_router_bias = mutable_data<float>(grad_bias),
                                          .partials = mutable_data<float>(sums),
                                          .rows = rows,
                                          .slots = 0,
                                          .overwrite = false}));
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace pmod::cuda

PMOD_DEVICE_IMPL(m) {
  m.impl("route", TORCH_BOX(&pmod::cuda::route));
  m.impl("route_backward_", TORCH_BOX(&pmod::cuda::route_backward));
  m.impl("select", TORCH_BOX(&pmod::cuda::select));
  m.impl("select_backward", TORCH_BOX(&pmod::cuda::select_backward));
}
