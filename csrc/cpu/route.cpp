// pmod::route and pmod::select: reference.route.
//
// One dot product per routable row (rows in parallel), one gate per row, then the selection of
// select.cpp. Backward adds z * weight to the rows of the gradient of x whose z, the gradient of
// the logit, is not zero; weight and bias are summed over fixed chunks of rows. Reads V rows
// forward; backward reads V rows twice and writes V. Sums in the accumulate type, one rounding per
// element.

#include "cpu/route.h"

#include <vector>

#include "cpu/chunked_sum.h"

namespace pmod::cpu {

Tensor check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t rows) {
  Tensor bounds = check_bounds(op, cu_seqlens);
  const int32_t* at = data<int32_t>(bounds);
  const int64_t batch = bounds.numel() - 1;
  check(at[0] == 0 && at[batch] == rows, "pmod_ops.", op,
        ": cu_seqlens: expected offsets from 0 to ", rows);
  for (int64_t b = 0; b < batch; ++b) {
    check(at[b] <= at[b + 1], "pmod_ops.", op, ": cu_seqlens[", b + 1, "]: expected >= ", at[b],
          ", got ", at[b + 1]);
  }
  return bounds;
}

Plan check_plan(const char* op, const Tensor& kind, const Tensor& cu_seqlens,
                const OptionalTensor& pool_id, const Tensor& k, const Tensor& slot_start,
                int64_t num_slots, int64_t max_length, int64_t rows) {
  check_cu_seqlens(op, cu_seqlens, rows);
  return check_shapes(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length, rows);
}

Gate check_gate(const char* op, double scale, double bias, int64_t activation) {
  return {.scale = scale, .bias = bias, .activation = check_activation(op, activation)};
}

Tensor score(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const Tensor& kind) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  Tensor logits = allocate({rows}, acc_type(x));
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> w(op, "router_weight", weight, hidden);
    const Score<T> loop{.x = data<T>(x),
                        .weight = w.get(),
                        .bias = scalar<T>(op, "router_bias", bias),
                        .kind = data<uint8_t>(kind),
                        .logits = mutable_data<A>(logits),
                        .hidden = hidden};
    for_ranges(rows, hidden * sizeof(T),
               [&](int64_t begin, int64_t end) { row_loops<T>().score(loop, begin, end); });
  });
  return logits;
}

namespace {

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed route(const Tensor& x_arg, const Tensor& router_weight, const OptionalTensor& router_bias,
             const Tensor& kind, const Tensor& cu_seqlens, const OptionalTensor& pool_id,
             const Tensor& k, const Tensor& slot_start, int64_t num_slots, int64_t max_length,
             double gate_scale, double gate_bias, int64_t activation) {
  const char* op = "route";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Plan plan =
      check_plan(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length, x.size(0));
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  Tensor logits = score(op, x, router_weight, router_bias, plan.kind);
  auto [index, inverse] = select_rows(op, logits, plan);
  return {logits, gate_of(logits, plan.kind, plan.cu_seqlens, gate), index, inverse, no_scratch()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select(const Tensor& logits_arg, const Tensor& kind,
                                                  const Tensor& cu_seqlens,
                                                  const OptionalTensor& pool_id, const Tensor& k,
                                                  const Tensor& slot_start, int64_t num_slots,
                                                  int64_t max_length, double gate_scale,
                                                  double gate_bias, int64_t activation) {
  const char* op = "select";
  const Tensor logits = vector(op, "logits", logits_arg, acc_type(logits_arg), -1);
  const Plan plan = check_plan(op, kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length,
                               logits.numel());
  const Gate gate = check_gate(op, gate_scale, gate_bias, activation);
  auto [index, inverse] = select_rows(op, logits, plan);
  return {gate_of(logits, plan.kind, plan.cu_seqlens, gate), index, inverse, no_scratch()};
}

Tensor select_backward(const Tensor& grad_gate, const Tensor& logits_arg, const Tensor& kind_arg,
                       const Tensor& cu_seqlens, double gate_scale, int64_t activation) {
  const char* op = "select_backward";
  const Tensor logits = vector(op, "logits", logits_arg, acc_type(logits_arg), -1);
  const int64_t rows = logits.numel();
  const Tensor grad = vector(op, "grad_gate", grad_gate, logits.scalar_type(), rows);
  const Tensor kind = check_kind(op, kind_arg, rows);
  const Tensor bounds = check_cu_seqlens(op, cu_seqlens, rows);
  const Gate gate = check_gate(op, gate_scale, 0, activation);
  Tensor out = allocate({rows}, logits.scalar_type());
  dispatch_rows(op, "logits", logits, [&](auto type) {
    using A = typename decltype(type)::A;
    const auto z = logit_gradient<A>(std::nullopt, grad, logits, kind, bounds, gate);
    std::copy(z.begin(), z.end(), mutable_data<A>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> route_backward(Tensor grad_x, const OptionalTensor& grad_logits,
                                          const OptionalTensor& grad_gate, const Tensor& x_arg,
                                          const Tensor& router_weight, const Tensor& logits_arg,
                                          const Tensor& kind_arg, const Tensor& cu_seqlens,
                                          double gate_scale, int64_t activation) {
  const char* op = "route_backward_";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const int64_t rows = x.size(0), hidden = x.size(1);
  const ScalarType acc = acc_type(x);
  check_mutable(op, "grad_x", grad_x, x);
  const Tensor logits = vector(op, "logits", logits_arg, acc, rows);
  const OptionalTensor of_logits = vector(op, "grad_logits", grad_logits, acc, rows);
  const OptionalTensor of_gate = vector(op, "grad_gate", grad_gate, acc, rows);
  const Tensor kind = check_kind(op, kind_arg, rows);
  const Tensor bounds = check_cu_seqlens(op, cu_seqlens, rows);
  const Gate gate = check_gate(op, gate_scale, 0, activation);
  Tensor grad_weight = allocate({hidden}, acc);
  Tensor grad_bias = allocate({1}, acc);
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> w(op, "router_weight", router_weight, hidden);
    const auto z = logit_gradient<A>(of_logits, of_gate, logits, kind, bounds, gate);
    const std::vector<int32_t> none(rows, -1);
    const Chunks chunks(rows);
    ChunkedSum<T> sum(chunks, hidden);
    chunks.for_each([&](int64_t c, int64_t begin, int64_t end) {
      const ReadersBackward<T> loop{.x = data<T>(x),
                                    .grad_logits = z.data(),
                                    .inverse = none.data(),
                                    .router_weight = w.get(),
                                    .grad_x = mutable_data<T>(grad_x),
                                    .hidden = hidden,
                                    .router = sum.chunk(c)};
      row_loops<T>().readers_backward(loop, begin, end);
    });
    sum.write(mutable_data<A>(grad_weight));
    *mutable_data<A>(grad_bias) = sum_of(z);
  });
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("route", TORCH_BOX(&pmod::cpu::route));
  m.impl("route_backward_", TORCH_BOX(&pmod::cpu::route_backward));
  m.impl("select", TORCH_BOX(&pmod::cpu::select));
  m.impl("select_backward", TORCH_BOX(&pmod::cpu::select_backward));
}
