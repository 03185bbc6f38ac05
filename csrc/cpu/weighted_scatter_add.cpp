// pmod::weighted_scatter_add: reference.weighted_scatter_add.
//
// One task per range of rows; a row is written once, from its slot if it was kept, else from x. The
// next layer's logit is taken from the row as rounded. Backward visits each row of the gradient
// once, and finishes the router's gradient of skipped rows there if it is given the router; fixed
// chunks of rows for the router. Reads N + K rows and writes N; backward reads 2N rows and writes N
// + 2K.

#include <tuple>
#include <vector>

#include "cpu/route.h"

namespace pmod::cpu {
namespace {

struct Arguments {
  Tensor x, residual, update, gate, inverse, kind;
  int64_t rows, hidden, slots;
};

Arguments check_arguments(const char* op, const Tensor& x_arg, const Tensor& residual,
                          const Tensor& update, const Tensor& gate, const Tensor& inverse,
                          const Tensor& kind) {
  Arguments a;
  a.x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  a.rows = a.x.size(0);
  a.hidden = a.x.size(1);
  a.update = matrix(op, "update", update, a.x.scalar_type(), -1, a.hidden);
  a.slots = a.update.size(0);
  a.residual = matrix(op, "residual", residual, a.x.scalar_type(), a.slots, a.hidden);
  a.gate = vector(op, "gate", gate, acc_type(a.x), a.rows);
  a.inverse = index_vector(op, "inverse", inverse, a.rows, a.slots);
  a.kind = check_kind(op, kind, a.rows);
  return a;
}

// Writes to `target`, which may be x itself.
Tensor scatter(const char* op, const Arguments& a, bool gate_mlp, bool scale_skipped,
               const OptionalTensor& next_weight, const OptionalTensor& next_bias, Tensor target) {
  const int64_t scored = next_weight ? a.rows : 0;
  Tensor next_logits = torch::stable::new_empty(a.x, {scored}, acc_type(a.x));
  dispatch_rows(op, "x", a.x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const int64_t hidden = a.hidden;
    const std::vector<A> w = weights<A>(op, "next_weight", next_weight, hidden);
    const std::vector<A> b = weights<A>(op, "next_bias", next_bias, 1);
    const A offset = b.empty() ? A(0) : b[0];
    const T* x = a.x.const_data_ptr<T>();
    const T* residual = a.residual.const_data_ptr<T>();
    const T* update = a.update.const_data_ptr<T>();
    const A* gate = a.gate.const_data_ptr<A>();
    const int32_t* slot_of = a.inverse.const_data_ptr<int32_t>();
    const uint8_t* kind = a.kind.const_data_ptr<uint8_t>();
    T* out = target.mutable_data_ptr<T>();
    A* logits = next_logits.mutable_data_ptr<A>();
    for_rows(a.rows, hidden * sizeof(T), [&](int64_t r) {
      T* to = out + r * hidden;
      const bool routable = kind[r] == kRoutable;
      if (slot_of[r] >= 0) {
        const A g = routable && gate_mlp ? gate[r] : A(1);
        const T* base = residual + slot_of[r] * hidden;
        const T* delta = update + slot_of[r] * hidden;
        for (int64_t i = 0; i < hidden; ++i) to[i] = static_cast<T>(A(base[i]) + g * A(delta[i]));
      } else if (routable && scale_skipped) {
        const T* from = x + r * hidden;
        for (int64_t i = 0; i < hidden; ++i) to[i] = static_cast<T>(gate[r] * A(from[i]));
      } else if (to != x + r * hidden) {
        std::copy(x + r * hidden, x + (r + 1) * hidden, to);
      }
      if (next_weight) logits[r] = routable ? dot<A>(to, w.data(), hidden) + offset : A(0);
    });
  });
  return next_logits;
}

std::tuple<Tensor, Tensor> weighted_scatter_add(const Tensor& x, const Tensor& residual,
                                                const Tensor& update, const Tensor& gate,
                                                const Tensor& inverse, const Tensor& kind,
                                                bool gate_mlp, bool scale_skipped,
                                                const OptionalTensor& next_weight,
                                                const OptionalTensor& next_bias) {
  const char* op = "weighted_scatter_add";
  const Arguments a = check_arguments(op, x, residual, update, gate, inverse, kind);
  Tensor out = torch::stable::new_empty(a.x, {a.rows, a.hidden});
  Tensor logits = scatter(op, a, gate_mlp, scale_skipped, next_weight, next_bias, out);
  return {out, logits};
}

Tensor weighted_scatter_add_in_place(const Tensor& x, const Tensor& residual, const Tensor& update,
                                     const Tensor& gate, const Tensor& inverse, const Tensor& kind,
                                     bool gate_mlp, bool scale_skipped,
                                     const OptionalTensor& next_weight,
                                     const OptionalTensor& next_bias) {
  const char* op = "weighted_scatter_add_";
  const Arguments a = check_arguments(op, x, residual, update, gate, inverse, kind);
  check_mutable(op, "x", x, x);
  return scatter(op, a, gate_mlp, scale_skipped, next_weight, next_bias, x);
}

// The rows of the backward op, as pointers.
template <typename T, typename A>
struct BackwardRows {
  const T* grad_out;
  const T* x;
  const T* update;
  const A* gate;
  const int32_t* inverse;
  const uint8_t* kind;
  bool gate_mlp, scale_skipped;
  const A* router;  // null: the gate of skipped rows gets a gradient instead
  const A* logits;
  A gate_scale;
  Activation activation;
  T *grad_x, *grad_residual, *grad_update;
  A* grad_gate;
  int64_t hidden;

  void kept(int64_t r) const {
    const T* grad = grad_out + r * hidden;
    const int64_t at = inverse[r] * hidden;
    const bool gated = kind[r] == kRoutable && gate_mlp;
    std::copy(grad, grad + hidden, grad_residual + at);
    zero_row(grad_x + r * hidden, hidden);
    grad_gate[r] = gated ? dot<A>(grad, update + at, hidden) : A(0);
    const A g = gated ? gate[r] : A(1);
    for (int64_t i = 0; i < hidden; ++i) grad_update[at + i] = static_cast<T>(g * A(grad[i]));
  }

  void skipped(int64_t r, double* router_sums, double* bias_sum) const {
    const T* grad = grad_out + r * hidden;
    const T* in = x + r * hidden;
    T* to = grad_x + r * hidden;
    grad_gate[r] = 0;
    if (kind[r] != kRoutable || !scale_skipped) {
      std::copy(grad, grad + hidden, to);
      return;
    }
    const A of_gate = dot<A>(grad, in, hidden), g = gate[r];
    if (!router) {
      grad_gate[r] = of_gate;
      for (int64_t i = 0; i < hidden; ++i) to[i] = static_cast<T>(g * A(grad[i]));
      return;
    }
    const A z = gate_scale * activate_derivative(logits[r], activation) * of_gate;
    for (int64_t i = 0; i < hidden; ++i) {
      to[i] = static_cast<T>(g * A(grad[i]) + z * router[i]);
      router_sums[i] += z * A(in[i]);
    }
    *bias_sum += z;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weighted_scatter_add_backward(
    const Tensor& grad_out_arg, const Tensor& x, const Tensor& update, const Tensor& gate,
    const Tensor& inverse, const Tensor& kind, bool gate_mlp, bool scale_skipped,
    const OptionalTensor& router_weight, const OptionalTensor& logits_arg, double gate_scale,
    int64_t activation) {
  const char* op = "weighted_scatter_add_backward";
  const Arguments a = check_arguments(op, x, update, update, gate, inverse, kind);
  const int64_t hidden = a.hidden, folded = router_weight ? hidden : 0;
  const ScalarType acc = acc_type(a.x);
  const Tensor grad_out = matrix(op, "grad_out", grad_out_arg, a.x.scalar_type(), a.rows, hidden);
  const Gate gate_of_router = check_gate(op, gate_scale, 0, activation);
  OptionalTensor logits;
  check(router_weight.has_value() == logits_arg.has_value() &&
            gate_of_router.activation != Activation::kSoftmax,
        "pmod_ops.", op, ": router_weight: expected logits and a gate per row beside it");
  if (logits_arg) logits = vector(op, "logits", *logits_arg, acc, a.rows);
  Tensor grad_x = torch::stable::new_empty(a.x, {a.rows, hidden});
  Tensor grad_residual = torch::stable::new_zeros(a.x, {a.slots, hidden});
  Tensor grad_update = torch::stable::new_zeros(a.x, {a.slots, hidden});
  Tensor grad_gate = torch::stable::new_empty(a.x, {a.rows}, acc);
  Tensor grad_router = torch::stable::new_empty(a.x, {folded}, acc);
  Tensor grad_bias = torch::stable::new_empty(a.x, {router_weight ? 1 : 0}, acc);
  dispatch_rows(op, "x", a.x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const std::vector<A> w = weights<A>(op, "router_weight", router_weight, hidden);
    const BackwardRows<T, A> backward{grad_out.const_data_ptr<T>(),
                                      a.x.const_data_ptr<T>(),
                                      a.update.const_data_ptr<T>(),
                                      a.gate.const_data_ptr<A>(),
                                      a.inverse.const_data_ptr<int32_t>(),
                                      a.kind.const_data_ptr<uint8_t>(),
                                      gate_mlp,
                                      scale_skipped,
                                      router_weight ? w.data() : nullptr,
                                      logits ? logits->const_data_ptr<A>() : nullptr,
                                      static_cast<A>(gate_scale),
                                      gate_of_router.activation,
                                      grad_x.mutable_data_ptr<T>(),
                                      grad_residual.mutable_data_ptr<T>(),
                                      grad_update.mutable_data_ptr<T>(),
                                      grad_gate.mutable_data_ptr<A>(),
                                      hidden};
    PartialSums router_sums(folded), bias_sums(1);
    for_chunks(a.rows, [&](int64_t c, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (backward.inverse[r] >= 0) {
          backward.kept(r);
        } else {
          backward.skipped(r, router_sums.chunk(c), bias_sums.chunk(c));
        }
      }
    });
    if (router_weight) {
      router_sums.write(grad_router.mutable_data_ptr<A>());
      bias_sums.write(grad_bias.mutable_data_ptr<A>());
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
