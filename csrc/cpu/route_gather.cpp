// pmod::route_gather, and pmod::select_gather for scores that are there: reference.route_gather.
//
// Forward: score, select, then the norm (or a copy) of the kept rows. Backward visits each row of x
// once: the gradient of the gathered row, if it was kept, of its logit, if that is not zero, and
// what reached the kept row another way (`grad_kept`) go to the gradient of x with one rounding; to
// kept rows of x that hold nothing yet if `overwrite`. Chunks of rows for the parameters. Reads V +
// K rows and writes K; backward reads 3K rows and writes K, plus the rows that were skipped and
// whose gate has a gradient.

#include <tuple>
#include <vector>

#include "cpu/chunked_sum.h"
#include "cpu/gather.h"
#include "cpu/gather_rmsnorm.h"
#include "cpu/route.h"

namespace pmod::cpu {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// (rows, rstd): normalised if there is a weight, else copied, and no rstd.
std::tuple<Tensor, Tensor> gather_rows(const char* op, const Tensor& x, const Tensor& index,
                                       const OptionalTensor& norm_weight, double eps) {
  if (norm_weight) return normalise_rows(op, x, index, *norm_weight, eps);
  return {copy_rows(op, x, index), allocate({0}, acc_type(x))};
}

Outputs route_gather(const Tensor& x_arg, const Tensor& router_weight,
                     const OptionalTensor& router_bias, const Tensor& kind,
                     const Tensor& cu_seqlens, const OptionalTensor& pool_id, const Tensor& k,
                     const Tensor& slot_start, int64_t num_slots, int64_t max_length,
                     double gate_scale, double gate_bias, int64_t activation,
                     const OptionalTensor& norm_weight, double eps) {
  const char* op = "route_gather";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Plan plan =
      check_plan(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length, x.size(0));
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  Tensor logits = score(op, x, router_weight, router_bias, plan.kind);
  auto [index, inverse] = select_rows(op, logits, plan);
  Tensor weight = gate_of(logits, plan.kind, plan.cu_seqlens, gate);
  auto [rows, rstd] = gather_rows(op, x, index, norm_weight, eps);
  return {logits, weight, index, inverse, rows, rstd, no_scratch()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_gather(
    const Tensor& x_arg, const Tensor& logits_arg, const Tensor& kind, const Tensor& cu_seqlens,
    const OptionalTensor& pool_id, const Tensor& k, const Tensor& slot_start, int64_t num_slots,
    int64_t max_length, double gate_scale, double gate_bias, int64_t activation,
    const OptionalTensor& norm_weight, double eps) {
  const char* op = "select_gather";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Tensor logits = vector(op, "logits", logits_arg, acc_type(x), x.size(0));
  const Plan plan =
      check_plan(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length, x.size(0));
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  auto [index, inverse] = select_rows(op, logits, plan);
  Tensor weight = gate_of(logits, plan.kind, plan.cu_seqlens, gate);
  auto [rows, rstd] = gather_rows(op, x, index, norm_weight, eps);
  return {weight, rows, rstd, index, inverse, no_scratch()};
}

std::tuple<Tensor, Tensor, Tensor> route_gather_backward(
    Tensor grad_x, const OptionalTensor& grad_logits, const OptionalTensor& grad_gate,
    const OptionalTensor& grad_rows_arg, const OptionalTensor& grad_kept_arg, const Tensor& x_arg,
    const Tensor& router_weight, const Tensor& logits_arg, const Tensor& kind_arg,
    const Tensor& cu_seqlens, const Tensor& index_arg, const Tensor& inverse_arg,
    const OptionalTensor& norm_weight, const Tensor& rstd_arg, double gate_scale,
    int64_t activation, bool overwrite) {
  const char* op = "route_gather_backward_";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const int64_t rows = x.size(0), hidden = x.size(1);
  const Tensor index = index_vector(op, "index", index_arg, -1, rows);
  const int64_t slots = index.numel();
  const ScalarType acc = acc_type(x);
  check_mutable(op, "grad_x", grad_x, x);
  const Tensor logits = vector(op, "logits", logits_arg, acc, rows);
  const OptionalTensor of_logits = vector(op, "grad_logits", grad_logits, acc, rows);
  const OptionalTensor of_gate = vector(op, "grad_gate", grad_gate, acc, rows);
  const OptionalTensor grad_rows =
      matrix(op, "grad_rows", grad_rows_arg, x.scalar_type(), slots, hidden);
  const OptionalTensor grad_kept =
      matrix(op, "grad_kept", grad_kept_arg, x.scalar_type(), slots, hidden);
  const Tensor kind = check_kind(op, kind_arg, rows);
  const Tensor bounds = check_cu_seqlens(op, cu_seqlens, rows);
  const Tensor inverse = index_vector(op, "inverse", inverse_arg, rows, slots);
  const Tensor rstd = vector(op, "rstd", rstd_arg, acc, norm_weight ? slots : 0);
  const Gate gate = check_gate(op, gate_scale, 0, activation);
  Tensor grad_router = allocate({hidden}, acc);
  Tensor grad_bias = allocate({1}, acc);
  Tensor grad_norm = allocate({norm_weight ? hidden : 0}, acc);
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> router(op, "router_weight", router_weight, hidden);
    const PaddedWeight<T> norm(op, "norm_weight", norm_weight, hidden);
    const auto z = logit_gradient<A>(of_logits, of_gate, logits, kind, bounds, gate);
    const Chunks chunks(rows);
    ChunkedSum<T> router_sum(chunks, hidden), norm_sum(chunks, norm_weight ? hidden : 0);
    chunks.for_each([&](int64_t c, int64_t begin, int64_t end) {
      const ReadersBackward<T> loop{.x = data<T>(x),
                                    .grad_rows = data<T>(grad_rows),
                                    .grad_kept = data<T>(grad_kept),
                                    .rstd = data<A>(rstd),
                                    .grad_logits = z.data(),
                                    .inverse = data<int32_t>(inverse),
                                    .index = data<int32_t>(index),
                                    .slots = slots,
                                    .router_weight = router.get(),
                                    .norm_weight = norm.get(),
                                    .grad_x = mutable_data<T>(grad_x),
                                    .overwrite = overwrite,
                                    .hidden = hidden,
                                    .router = router_sum.chunk(c),
                                    .norm = norm_sum.chunk(c)};
      row_loops<T>().readers_backward(loop, begin, end);
    });
    router_sum.write(mutable_data<A>(grad_router));
    *mutable_data<A>(grad_bias) = sum_of(z);
    if (norm_weight) norm_sum.write(mutable_data<A>(grad_norm));
  });
  return {grad_router, grad_bias, grad_norm};
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("route_gather", TORCH_BOX(&pmod::cpu::route_gather));
  m.impl("select_gather", TORCH_BOX(&pmod::cpu::select_gather));
  m.impl("route_gather_backward_", TORCH_BOX(&pmod::cpu::route_gather_backward));
}
