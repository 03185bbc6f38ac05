// pmod::weighted_scatter_add: reference.weighted_scatter_add. Tensors to the launchers of
// weighted_scatter_add.cu.

#include <tuple>

#include "cuda/adapter.h"

namespace pmod::cuda {
namespace {

struct Arguments {
  Tensor x, residual, update, gate, inverse, index, kind;
  int64_t slots;

  Arguments(const char* op, const Tensor& x_arg, const Tensor& residual_arg,
            const Tensor& update_arg, const Tensor& gate_arg, const Tensor& inverse_arg,
            const Tensor& index_arg, const Tensor& kind_arg)
      : x(matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1)),
        residual(matrix(op, "residual", residual_arg, x.scalar_type(), -1, x.size(1))),
        update(matrix(op, "update", update_arg, x.scalar_type(), residual.size(0), x.size(1))),
        gate(vector(op, "gate", gate_arg, ScalarType::Float, x.size(0))),
        inverse(vector(op, "inverse", inverse_arg, ScalarType::Int, x.size(0))),
        index(vector(op, "index", index_arg, ScalarType::Int, residual.size(0))),
        kind(check_kind(op, kind_arg, x.size(0))),
        slots(residual.size(0)) {}
};

struct Options {
  bool gate_mlp, scale_skipped, check_finite;
};

// Writes to `target`, which may be x itself; returns the next logits and the finite flag.
std::tuple<Tensor, Tensor> scatter(const char* op, const OnDevice& device, const Arguments& a,
                                   const Options& options, const OptionalTensor& next_weight,
                                   const OptionalTensor& next_bias, const Tensor& target) {
  const Rows rows = rows_of(op, a.x, device);
  const ParameterTensor weight(op, "next_weight", next_weight, a.x, rows.hidden);
  const ParameterTensor bias(op, "next_bias", next_bias, a.x, 1);
  Tensor next_logits = allocate({next_weight ? a.x.size(0) : 0}, ScalarType::Float);
  Tensor finite = allocate({options.check_finite ? 1 : 0}, ScalarType::Bool);
  check_launch(op, launch_weighted_scatter_add(
                       rows, {.x = a.x.const_data_ptr(),
                              .residual = a.residual.const_data_ptr(),
                              .update = a.update.const_data_ptr(),
                              .gate = data<float>(a.gate),
                              .inverse = data<int32_t>(a.inverse),
                              .kind = data<uint8_t>(a.kind),
                              .out = target.mutable_data_ptr(),
                              .next_weight = weight.get(),
                              .next_bias = bias.get(),
                              .next_logits = mutable_data<float>(next_logits),
                              .finite = options.check_finite ? mutable_data<bool>(finite) : nullptr,
                              .rows = a.x.size(0),
                              .slots = a.slots,
                              .gate_mlp = options.gate_mlp,
                              .scale_skipped = options.scale_skipped}));
  return {next_logits, finite};
}

std::tuple<Tensor, Tensor, Tensor> weighted_scatter_add(
    const Tensor& x, const Tensor& residual, const Tensor& update, const Tensor& gate,
    const Tensor& inverse, const Tensor& index, const Tensor& kind, bool gate_mlp,
    bool scale_skipped, const OptionalTensor& next_weight, const OptionalTensor& next_bias,
    bool check_finite) {
  const char* op = "weighted_scatter_add";
  const OnDevice device(op, "x", x);
  const Arguments a(op, x, residual, update, gate, inverse, index, kind);
  const Options options{
      .gate_mlp = gate_mlp, .scale_skipped = scale_skipped, .check_finite = check_finite};
  Tensor out = allocate({a.x.size(0), a.x.size(1)}, a.x.scalar_type());
  auto [logits, finite] = scatter(op, device, a, options, next_weight, next_bias, out);
  return {out, logits, finite};
}

std::tuple<Tensor, Tensor> weighted_scatter_add_in_place(
    const Tensor& x, const Tensor& residual, const Tensor& update, const Tensor& gate,
    const Tensor& inverse, const Tensor& index, const Tensor& kind, bool gate_mlp,
    bool scale_skipped, const OptionalTensor& next_weight, const OptionalTensor& next_bias,
    bool check_finite) {
  const char* op = "weighted_scatter_add_";
  const OnDevice device(op, "x", x);
  const Arguments a(op, x, residual, update, gate, inverse, index, kind);
  check_mutable(op, "x", x, x);
  const Options options{
      .gate_mlp = gate_mlp, .scale_skipped = scale_skipped, .check_finite = check_finite};
  return scatter(op, device, a, options, next_weight, next_bias, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weighted_scatter_add_backward(
    const Tensor& grad_out_arg, const Tensor& x, const Tensor& update, const Tensor& gate,
    const Tensor& inverse, const Tensor& index, const Tensor& kind, bool gate_mlp,
    bool scale_skipped, const OptionalTensor& router_weight, const OptionalTensor& logits_arg,
    double gate_scale, int64_t activation, bool write_residual, bool zero_kept) {
  const char* op = "weighted_scatter_add_backward";
  const OnDevice device(op, "x", x);
  const Arguments a(op, x, update, update, gate, inverse, index, kind);
  const Rows shape = rows_of(op, a.x, device);
  const ScalarType type = a.x.scalar_type();
  const int64_t rows = a.x.size(0), hidden = shape.hidden, folded = router_weight ? rows : 0;
  const Tensor grad_out = matrix(op, "grad_out", grad_out_arg, type, rows, hidden);
  const Gate router_gate = check_gate(op, gate_scale, 0, activation);
  check(router_weight.has_value() == logits_arg.has_value() &&
            router_gate.activation != Activation::kSoftmax,
        "pmod_ops.", op, ": router_weight: expected logits and a gate per row beside it");
  const OptionalTensor logits = vector(op, "logits", logits_arg, ScalarType::Float, rows);
  const ParameterTensor router(op, "router_weight", router_weight, a.x, hidden);
  Tensor grad_x = allocate({rows, hidden}, type);
  Tensor grad_residual = allocate({write_residual ? a.slots : 0, hidden}, type);
  Tensor grad_update = allocate({a.slots, hidden}, type);
  Tensor grad_gate = allocate({rows}, ScalarType::Float);
  Tensor grad_router = allocate({router_weight ? hidden : 0}, ScalarType::Float);
  Tensor grad_bias = allocate({router_weight ? 1 : 0}, ScalarType::Float);
  const Tensor z = allocate({folded}, ScalarType::Float);
  const Tensor sums = partials(folded, 1, hidden);
  check_launch(
      op, launch_weighted_scatter_add_backward(
              shape, {.grad_out = grad_out.const_data_ptr(),
                      .x = a.x.const_data_ptr(),
                      .update = a.update.const_data_ptr(),
                      .gate = data<float>(a.gate),
                      .inverse = data<int32_t>(a.inverse),
                      .index = data<int32_t>(a.index),
                      .kind = data<uint8_t>(a.kind),
                      .router_weight = router.get(),
                      .logits = data<float>(logits),
                      .router_gate = router_gate,
                      .grad_x = grad_x.mutable_data_ptr(),
                      .grad_residual = write_residual ? grad_residual.mutable_data_ptr() : nullptr,
                      .grad_update = grad_update.mutable_data_ptr(),
                      .grad_gate = mutable_data<float>(grad_gate),
                      .grad_router_weight = mutable_data<float>(grad_router),
                      .grad_router_bias = mutable_data<float>(grad_bias),
                      .grad_logits = mutable_data<float>(z),
                      .partials = mutable_data<float>(sums),
                      .rows = rows,
                      .slots = a.slots,
                      .gate_mlp = gate_mlp,
                      .scale_skipped = scale_skipped,
                      .zero_kept = zero_kept}));
  return {grad_x, grad_residual, grad_update, grad_gate, grad_router, grad_bias};
}

}  // namespace
}  // namespace pmod::cuda

PMOD_DEVICE_IMPL(m) {
  m.impl("weighted_scatter_add", TORCH_BOX(&pmod::cuda::weighted_scatter_add));
  m.impl("weighted_scatter_add_", TORCH_BOX(&pmod::cuda::weighted_scatter_add_in_place));
  m.impl("weighted_scatter_add_backward", TORCH_BOX(&pmod::cuda::weighted_scatter_add_backward));
}
