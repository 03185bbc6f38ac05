// pmod::route_gather: reference.route_gather.
//
// Forward: score, select, then the norm (or a copy) of the kept rows. Backward visits each row of x
// once: the gradient of the gathered row, if it was kept, and of its logit, if that is not zero, go
// to the gradient of x in one read-modify-write with one rounding. Fixed chunks of rows for the
// parameters. Reads V + K rows and writes K; backward reads 3K rows and writes K, plus the rows
// that were skipped and whose gate has a gradient.

#include <tuple>
#include <vector>

#include "cpu/gather.h"
#include "cpu/gather_rmsnorm.h"
#include "cpu/route.h"

namespace pmod::cpu {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs route_gather(const Tensor& x_arg, const Tensor& router_weight,
                     const OptionalTensor& router_bias, const Tensor& kind,
                     const Tensor& cu_seqlens, const OptionalTensor& pool_id, const Tensor& k,
                     const Tensor& slot_start, int64_t num_slots, double gate_scale,
                     double gate_bias, int64_t activation, const OptionalTensor& norm_weight,
                     double eps) {
  const char* op = "route_gather";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Plan plan = check_plan(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, x.size(0));
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  Tensor logits = score(op, x, router_weight, router_bias, plan.kind);
  auto [index, inverse] = select_rows(op, logits, plan);
  Tensor weight = gate_of(logits, plan.kind, plan.cu_seqlens, gate);
  if (!norm_weight) {
    Tensor none = torch::stable::new_empty(x, {0}, acc_type(x));
    return {logits, weight, index, inverse, copy_rows(op, x, index), none};
  }
  auto [rows, rstd] = normalise_rows(op, x, index, *norm_weight, eps);
  return {logits, weight, index, inverse, rows, rstd};
}

// The checked inputs of the backward op, as pointers.
template <typename T, typename A>
struct BackwardRows {
  const T* x;
  const T* grad_rows;  // null: no gradient reached the rows
  const A* rstd;
  const A* z;
  const int32_t* inverse;
  const A* router_weight;
  const A* norm_weight;  // null: the rows were copied
  T* grad_x;
  int64_t hidden;

  // Row r of the gradient of x, and its share of the parameters.
  void add(int64_t r, A* row, double* grad_router, double* grad_norm) const {
    const int64_t slot = inverse[r];
    const bool gathered = slot >= 0 && grad_rows != nullptr;
    if (!gathered && z[r] == A(0)) return;
    const T* in = x + r * hidden;
    const T* grad = gathered ? grad_rows + slot * hidden : nullptr;
    std::fill(row, row + hidden, A(0));
    if (gathered && norm_weight) {
      rmsnorm_backward_row(grad, in, norm_weight, rstd[slot], row, grad_norm, hidden);
    } else if (gathered) {
      add_row(grad, row, hidden);
    }
    if (z[r] != A(0)) {
      for (int64_t i = 0; i < hidden; ++i) {
        row[i] += z[r] * router_weight[i];
        grad_router[i] += z[r] * static_cast<A>(in[i]);
      }
    }
    store_row(row, true, grad_x + r * hidden, hidden);
  }
};

std::tuple<Tensor, Tensor, Tensor> route_gather_backward(
    Tensor grad_x, const OptionalTensor& grad_logits, const OptionalTensor& grad_gate,
    const OptionalTensor& grad_rows_arg, const Tensor& x_arg, const Tensor& router_weight,
    const Tensor& logits_arg, const Tensor& kind_arg, const Tensor& cu_seqlens,
    const Tensor& index_arg, const Tensor& inverse_arg, const OptionalTensor& norm_weight,
    const Tensor& rstd_arg, double gate_scale, int64_t activation) {
  const char* op = "route_gather_backward_";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const int64_t rows = x.size(0), hidden = x.size(1);
  const Tensor index = index_vector(op, "index", index_arg, -1, rows);
  const int64_t slots = index.numel();
  const ScalarType acc = acc_type(x);
  check_mutable(op, "grad_x", grad_x, x);
  const Tensor logits = vector(op, "logits", logits_arg, acc, rows);
  OptionalTensor of_logits, of_gate, grad_rows;
  if (grad_logits) of_logits = vector(op, "grad_logits", *grad_logits, acc, rows);
  if (grad_gate) of_gate = vector(op, "grad_gate", *grad_gate, acc, rows);
  if (grad_rows_arg) {
    grad_rows = matrix(op, "grad_rows", *grad_rows_arg, x.scalar_type(), slots, hidden);
  }
  const Tensor kind = check_kind(op, kind_arg, rows);
  const Tensor bounds = check_cu_seqlens(op, cu_seqlens, rows);
  const Tensor inverse = index_vector(op, "inverse", inverse_arg, rows, slots);
  const Tensor rstd = vector(op, "rstd", rstd_arg, acc, norm_weight ? slots : 0);
  const Gate gate = check_gate(op, gate_scale, 0, activation);
  Tensor grad_router = torch::stable::new_empty(x, {hidden}, acc);
  Tensor grad_bias = torch::stable::new_empty(x, {1}, acc);
  Tensor grad_norm = torch::stable::new_empty(x, {norm_weight ? hidden : 0}, acc);
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const std::vector<A> router = weights<A>(op, "router_weight", router_weight, hidden);
    const std::vector<A> norm = weights<A>(op, "norm_weight", norm_weight, hidden);
    const auto z = logit_gradient<A>(of_logits, of_gate, logits, kind, bounds, gate);
    const BackwardRows<T, A> backward{x.const_data_ptr<T>(),
                                      grad_rows ? grad_rows->const_data_ptr<T>() : nullptr,
                                      rstd.const_data_ptr<A>(),
                                      z.data(),
                                      inverse.const_data_ptr<int32_t>(),
                                      router.data(),
                                      norm.empty() ? nullptr : norm.data(),
                                      grad_x.mutable_data_ptr<T>(),
                                      hidden};
    PartialSums router_sums(hidden), bias_sums(1), norm_sums(hidden);
    for_chunks(rows, [&](int64_t c, int64_t begin, int64_t end) {
      std::vector<A> row(hidden);
      for (int64_t r = begin; r < end; ++r) {
        backward.add(r, row.data(), router_sums.chunk(c), norm_sums.chunk(c));
        *bias_sums.chunk(c) += z[r];
      }
    });
    router_sums.write(grad_router.mutable_data_ptr<A>());
    bias_sums.write(grad_bias.mutable_data_ptr<A>());
    if (norm_weight) norm_sums.write(grad_norm.mutable_data_ptr<A>());
  });
  return {grad_router, grad_bias, grad_norm};
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("route_gather", TORCH_BOX(&pmod::cpu::route_gather));
  m.impl("route_gather_backward_", TORCH_BOX(&pmod::cpu::route_gather_backward));
}
