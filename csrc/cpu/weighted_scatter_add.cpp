// pmod::weighted_scatter_add: reference.weighted_scatter_add.
//
// One task per range of rows; a row is written once, from its slot if it was kept, else from x.
// Backward visits each row of the gradient once, and finishes the router's gradient of skipped rows
// there if it is given the router; chunks of rows for the router. Reads N + K rows and writes N;
// backward reads 2N rows and writes N, and K more for the gradient of the residual and for zeros in
// kept rows of grad_x, each where the caller asks for it.

#include <atomic>
#include <tuple>
#include <vector>

#include "cpu/chunked_sum.h"
#include "cpu/route.h"

namespace pmod::cpu {
namespace {

struct Arguments {
  Tensor x, residual, update, gate, inverse, index, kind;
  int64_t rows, hidden, slots;
};

Arguments check_arguments(const char* op, const Tensor& x_arg, const Tensor& residual,
                          const Tensor& update, const Tensor& gate, const Tensor& inverse,
                          const Tensor& index, const Tensor& kind) {
  Arguments a;
  a.x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  a.rows = a.x.size(0);
  a.hidden = a.x.size(1);
  a.update = matrix(op, "update", update, a.x.scalar_type(), -1, a.hidden);
  a.slots = a.update.size(0);
  a.residual = matrix(op, "residual", residual, a.x.scalar_type(), a.slots, a.hidden);
  a.gate = vector(op, "gate", gate, acc_type(a.x), a.rows);
  a.inverse = index_vector(op, "inverse", inverse, a.rows, a.slots);
  a.index = vector(op, "index", index, ScalarType::Int, a.slots);
  a.kind = check_kind(op, kind, a.rows);
  return a;
}

struct Options {
  bool gate_mlp, scale_skipped, check_finite;
};

// Writes to `target`, which may be x itself; returns the next logits and the finite flag.
std::tuple<Tensor, Tensor> scatter(const char* op, const Arguments& a, const Options& options,
                                   const OptionalTensor& next_weight,
                                   const OptionalTensor& next_bias, const Tensor& target) {
  Tensor next_logits = allocate({next_weight ? a.rows : 0}, acc_type(a.x));
  Tensor flag = allocate({options.check_finite ? 1 : 0}, ScalarType::Bool);
  std::atomic<bool> finite = true;
  dispatch_rows(op, "x", a.x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> w(op, "next_weight", next_weight, a.hidden);
    const bool in_place = target.const_data_ptr() == a.x.const_data_ptr();
    const WeightedScatterAdd<T> loop{.x = data<T>(a.x),
                                     .residual = data<T>(a.residual),
                                     .update = data<T>(a.update),
                                     .gate = data<A>(a.gate),
                                     .inverse = data<int32_t>(a.inverse),
                                     .kind = data<uint8_t>(a.kind),
                                     .out = mutable_data<T>(target),
                                     .next_weight = w.get(),
                                     .next_bias = scalar<T>(op, "next_bias", next_bias),
                                     .next_logits = mutable_data<A>(next_logits),
                                     .hidden = a.hidden,
                                     .gate_mlp = options.gate_mlp,
                                     .scale_skipped = options.scale_skipped,
                                     .check_finite = options.check_finite,
                                     .streaming = !in_place && worth_streaming(target)};
    for_ranges(a.rows, a.hidden * sizeof(T), [&](int64_t begin, int64_t end) {
      if (!row_loops<T>().weighted_scatter_add(loop, begin, end)) finite = false;
    });
  });
  if (options.check_finite) *mutable_data<bool>(flag) = finite;
  return {next_logits, flag};
}

std::tuple<Tensor, Tensor, Tensor> weighted_scatter_add(
    const Tensor& x, const Tensor& residual, const Tensor& update, const Tensor& gate,
    const Tensor& inverse, const Tensor& index, const Tensor& kind, bool gate_mlp,
    bool scale_skipped, const OptionalTensor& next_weight, const OptionalTensor& next_bias,
    bool check_finite) {
  const char* op = "weighted_scatter_add";
  const Arguments a = check_arguments(op, x, residual, update, gate, inverse, index, kind);
  const Options options{
      .gate_mlp = gate_mlp, .scale_skipped = scale_skipped, .check_finite = check_finite};
  Tensor out = allocate({a.rows, a.hidden}, a.x.scalar_type());
  auto [logits, finite] = scatter(op, a, options, next_weight, next_bias, out);
  return {out, logits, finite};
}

std::tuple<Tensor, Tensor> weighted_scatter_add_in_place(
    const Tensor& x, const Tensor& residual, const Tensor& update, const Tensor& gate,
    const Tensor& inverse, const Tensor& index, const Tensor& kind, bool gate_mlp,
    bool scale_skipped, const OptionalTensor& next_weight, const OptionalTensor& next_bias,
    bool check_finite) {
  const char* op = "weighted_scatter_add_";
  const Arguments a = check_arguments(op, x, residual, update, gate, inverse, index, kind);
  check_mutable(op, "x", x, x);
  const Options options{
      .gate_mlp = gate_mlp, .scale_skipped = scale_skipped, .check_finite = check_finite};
  return scatter(op, a, options, next_weight, next_bias, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weighted_scatter_add_backward(
    const Tensor& grad_out_arg, const Tensor& x, const Tensor& update, const Tensor& gate,
    const Tensor& inverse, const Tensor& index, const Tensor& kind, bool gate_mlp,
    bool scale_skipped, const OptionalTensor& router_weight, const OptionalTensor& logits_arg,
    double gate_scale, int64_t activation, bool write_residual, bool zero_kept) {
  const char* op = "weighted_scatter_add_backward";
  const Arguments a = check_arguments(op, x, update, update, gate, inverse, index, kind);
  const int64_t folded = router_weight ? a.hidden : 0;
  const ScalarType acc = acc_type(a.x);
  const Tensor grad_out = matrix(op, "grad_out", grad_out_arg, a.x.scalar_type(), a.rows, a.hidden);
  const Gate router_gate = check_gate(op, gate_scale, 0, activation);
  check(router_weight.has_value() == logits_arg.has_value() &&
            router_gate.activation != Activation::kSoftmax,
        "pmod_ops.", op, ": router_weight: expected logits and a gate per row beside it");
  const auto empty = [&](int64_t rows) { return allocate({rows, a.hidden}, a.x.scalar_type()); };
  // slots that hold no row (filler) are not visited
  const auto zeros = [&](int64_t rows) { return torch::stable::new_zeros(a.x, {rows, a.hidden}); };
  const int32_t* slot_of = data<int32_t>(a.inverse);
  const bool filler =
      std::count_if(slot_of, slot_of + a.rows, [](int32_t slot) { return slot >= 0; }) < a.slots;
  Tensor grad_x = empty(a.rows);
  const int64_t written = write_residual ? a.slots : 0;
  Tensor grad_residual = filler ? zeros(written) : empty(written);
  Tensor grad_update = filler ? zeros(a.slots) : empty(a.slots);
  Tensor grad_gate = allocate({a.rows}, acc);
  Tensor grad_router = allocate({folded}, acc);
  Tensor grad_bias = allocate({router_weight ? 1 : 0}, acc);
  dispatch_rows(op, "x", a.x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> w(op, "router_weight", router_weight, a.hidden);
    std::vector<A> slope, z;
    if (logits_arg) {
      slope = gate_slope<A>(vector(op, "logits", *logits_arg, acc, a.rows), router_gate);
      z.resize(a.rows);
    }
    const Chunks chunks(a.rows);
    ChunkedSum<T> sum(chunks, folded);
    chunks.for_each([&](int64_t c, int64_t begin, int64_t end) {
      const WeightedScatterAddBackward<T> loop{
          .grad_out = data<T>(grad_out),
          .x = data<T>(a.x),
          .update = data<T>(a.update),
          .gate = data<A>(a.gate),
          .inverse = data<int32_t>(a.inverse),
          .kind = data<uint8_t>(a.kind),
          .router_weight = w.get(),
          .slope = slope.data(),
          .grad_x = mutable_data<T>(grad_x),
          .grad_residual = write_residual ? mutable_data<T>(grad_residual) : nullptr,
          .grad_update = mutable_data<T>(grad_update),
          .grad_gate = mutable_data<A>(grad_gate),
          .grad_logits = z.empty() ? nullptr : z.data(),
          .hidden = a.hidden,
          .gate_mlp = gate_mlp,
          .scale_skipped = scale_skipped,
          .streaming = worth_streaming(grad_x) && worth_streaming(grad_update) &&
                       (!write_residual || worth_streaming(grad_residual)),
          .zero_kept = zero_kept,
          .router = sum.chunk(c)};
      row_loops<T>().weighted_scatter_add_backward(loop, begin, end);
    });
    if (router_weight) {
      sum.write(mutable_data<A>(grad_router));
      *mutable_data<A>(grad_bias) = sum_of(z);
    }
  });
  return {grad_x, grad_residual, grad_update, grad_gate, grad_router, grad_bias};
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("weighted_scatter_add", TORCH_BOX(&pmod::cpu::weighted_scatter_add));
  m.impl("weighted_scatter_add_", TORCH_BOX(&pmod::cpu::weighted_scatter_add_in_place));
  m.impl("weighted_scatter_add_backward", TORCH_BOX(&pmod::cpu::weighted_scatter_add_backward));
}
