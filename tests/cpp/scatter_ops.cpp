// weighted_scatter_add and its backward.

#include <atomic>

#include "expect.h"
#include "ops.h"

namespace pmod::test {
namespace {

enum ScatterFlags { kGateMlp, kScaleSkipped, kInPlace, kScoreNext, kCheckFinite, kNumScatterFlags };

template <typename T>
Outputs<T> run_weighted_scatter_add(const Setting<T>& s, Flags flags) {
  const Problem<T>& p = s.p;
  Outputs<T> out;
  auto& rows = out.rows["out"] =
      flags[kInPlace] ? p.x.clone() : Buffer<T>(p.rows * p.hidden, p.offset);
  auto& logits = out.values["next_logits"];
  logits.resize(flags[kScoreNext] ? p.rows : 0, value(quiet_nan<T>()));
  const auto weight = s.weight(p.router);
  const cpu::WeightedScatterAdd<T> loop{
      .x = flags[kInPlace] ? rows.data() : p.x.data(),
      .residual = p.residual.data(),
      .update = p.update.data(),
      .gate = p.gate.data(),
      .inverse = p.inverse.data(),
      .kind = p.kind.data(),
      .out = rows.data(),
      .next_weight = flags[kScoreNext] ? weight.get() : cpu::Weight<T>{},
      .next_bias = p.bias,
      .next_logits = logits.data(),
      .hidden = p.hidden,
      .gate_mlp = flags[kGateMlp],
      .scale_skipped = flags[kScaleSkipped],
      .check_finite = flags[kCheckFinite],
      .streaming = s.streaming && !flags[kInPlace]};
  std::atomic<bool> finite = true;
  s.for_ranges(p.rows, [&](int64_t begin, int64_t end) {
    if (!s.loops.weighted_scatter_add(loop, begin, end)) finite = false;
  });
  out.finite = finite;
  return out;
}

// The next logits are those of the rows as they were rounded.
template <typename T>
void check_weighted_scatter_add(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
  using B = Bounded<Acc<T>>;
  CHECK(out.finite);
  Expect<T> expect(p, out);
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* x = p.row(p.x, r);
    const T* residual = p.slot_of(p.residual, r);
    const T* update = p.slot_of(p.update, r);
    const double gate = p.routable(r) ? double{p.gate[r]} : 1.0;
    if (p.kept(r)) {
      const double of_update = flags[kGateMlp] ? gate : 1.0;
      expect.row("out", r,
                 [&](int64_t i) { return B(of_update) * value(update[i]) + value(residual[i]); });
    } else if (p.routable(r) && flags[kScaleSkipped]) {
      expect.row("out", r, [&](int64_t i) { return B(gate) * value(x[i]); });
    } else {
      expect.copy("out", r, x);
    }
    if (!flags[kScoreNext]) continue;
    const T* written = p.row(out.rows.at("out"), r);
    const B dot =
        dot_product(p.hidden, [&](int64_t i) { return B(value(written[i])) * p.router[i]; });
    expect.number("next_logits", r, p.routable(r) ? dot + p.bias : B(0));
  }
}

enum ScatterBackwardFlags {
  kGateMlpBackward,
  kScaleSkippedBackward,
  kRouter,
  kGradResidual,
  kZeroKept,
  kNumScatterBackwardFlags
};

template <typename T>
Outputs<T> run_weighted_scatter_add_backward(const Setting<T>& s, Flags flags) {
  using A = Acc<T>;
  const Problem<T>& p = s.p;
  const A unwritten = value(quiet_nan<T>());
  Outputs<T> out;
  auto& grad_x = out.rows["grad_x"] = Buffer<T>(p.rows * p.hidden, p.offset);
  auto& grad_residual = out.rows["grad_residual"] = Buffer<T>(p.slots * p.hidden, 3 * p.offset);
  auto& grad_update = out.rows["grad_update"] = Buffer<T>(p.slots * p.hidden, p.offset);
  auto& grad_gate = out.values["grad_gate"] = std::vector<A>(p.rows, unwritten);
  auto& grad_logits = out.values["grad_logits"] = std::vector<A>(p.rows, unwritten);
  ParameterGradient<T> router(s, p.rows, flags[kRouter]);
  const auto weight = s.weight(p.router);
  s.for_chunks(p.rows, [&](int64_t c, int64_t begin, int64_t end) {
    const cpu::WeightedScatterAddBackward<T> loop{
        .grad_out = p.grad_out.data(),
        .x = p.x.data(),
        .update = p.update.data(),
        .gate = p.gate.data(),
        .inverse = p.inverse.data(),
        .kind = p.kind.data(),
        .router_weight = flags[kRouter] ? weight.get() : cpu::Weight<T>{},
        .slope = flags[kRouter] ? p.slope.data() : nullptr,
        .grad_x = grad_x.data(),
        .grad_residual = flags[kGradResidual] ? grad_residual.data() : nullptr,
        .grad_update = grad_update.data(),
        .grad_gate = grad_gate.data(),
        .grad_logits = flags[kRouter] ? grad_logits.data() : nullptr,
        .hidden = p.hidden,
        .gate_mlp = flags[kGateMlpBackward],
        .scale_skipped = flags[kScaleSkippedBackward],
        .streaming = s.streaming,
        .zero_kept = flags[kZeroKept],
        .router = router.chunk(c)};
    s.loops.weighted_scatter_add_backward(loop, begin, end);
  });
  out.values["grad_router"] = router.elements();
  return out;
}

template <typename T>
void check_kept_row(Expect<T>& expect, const Problem<T>& p, Flags flags, int64_t r) {
  using B = Bounded<Acc<T>>;
  const int64_t s = p.inverse[r];
  const T* grad_out = p.row(p.grad_out, r);
  const T* update = p.row(p.update, s);
  const bool gated = p.routable(r) && flags[kGateMlpBackward];
  expect.row("grad_update", s,
             [&](int64_t i) { return B(gated ? double{p.gate[r]} : 1.0) * value(grad_out[i]); });
  const B of_gate =
      dot_product(p.hidden, [&](int64_t i) { return B(value(grad_out[i])) * value(update[i]); });
  expect.number("grad_gate", r, gated ? of_gate : B(0));
  if (flags[kRouter]) expect.number("grad_logits", r, 0);
  if (flags[kGradResidual]) {
    expect.copy("grad_residual", s, grad_out);
  } else {
    expect.untouched("grad_residual", s);
  }
  if (flags[kZeroKept]) {
    expect.zeros("grad_x", r);
  } else {
    expect.untouched("grad_x", r);
  }
}

// With the router, the gate's gradient goes on to the logit, and from there to x and the router.
template <typename T>
void check_skipped_row(Expect<T>& expect, const Problem<T>& p, Flags flags, const Outputs<T>& out,
                       int64_t r) {
  using B = Bounded<Acc<T>>;
  const T* grad_out = p.row(p.grad_out, r);
  const T* x = p.row(p.x, r);
  if (!p.routable(r) || !flags[kScaleSkippedBackward]) {
    expect.copy("grad_x", r, grad_out);
    expect.number("grad_gate", r, 0);
    if (flags[kRouter]) expect.number("grad_logits", r, 0);
    return;
  }
  const B of_gate =
      dot_product(p.hidden, [&](int64_t i) { return B(value(grad_out[i])) * value(x[i]); });
  expect.number("grad_gate", r, flags[kRouter] ? B(0) : of_gate);
  if (flags[kRouter]) expect.number("grad_logits", r, of_gate * p.slope[r]);
  const double z = flags[kRouter] ? double{out.values.at("grad_logits")[r]} : 0.0;
  expect.row("grad_x", r, [&](int64_t i) {
    const B of_out = B(p.gate[r]) * value(grad_out[i]);
    return flags[kRouter] ? of_out + B(z) * p.router[i] : of_out;
  });
}

template <typename T>
void check_weighted_scatter_add_backward(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
  using B = Bounded<Acc<T>>;
  Expect<T> expect(p, out);
  std::vector<int64_t> scored;
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.kept(r)) {
      check_kept_row(expect, p, flags, r);
    } else {
      check_skipped_row(expect, p, flags, out, r);
      if (p.routable(r) && flags[kScaleSkippedBackward]) scored.push_back(r);
    }
  }
  for (int64_t s = 0; s < p.slots; ++s) {
    if (p.index[s] >= 0) continue;
    expect.untouched("grad_update", s);
    expect.untouched("grad_residual", s);
  }
  const auto& z = out.values.at("grad_logits");
  for (int64_t i = 0; flags[kRouter] && i < p.hidden; ++i) {
    const auto count = static_cast<int64_t>(scored.size());
    const B sum = bounded_sum(count, column_depth<T>(p.rows), [&](int64_t j) {
      return B(z[scored[j]]) * value(p.row(p.x, scored[j])[i]);
    });
    expect.number("grad_router", i, sum);
  }
}

}  // namespace

template <typename T>
void append_scatters(std::vector<Op<T>>& ops) {
  ops.push_back({"weighted_scatter_add", kNumScatterFlags, run_weighted_scatter_add<T>,
                 check_weighted_scatter_add<T>});
  ops.push_back({"weighted_scatter_add_backward", kNumScatterBackwardFlags,
                 run_weighted_scatter_add_backward<T>, check_weighted_scatter_add_backward<T>});
}

template void append_scatters<float>(std::vector<Op<float>>&);
template void append_scatters<double>(std::vector<Op<double>>&);
template void append_scatters<Bf16>(std::vector<Op<Bf16>>&);
template void append_scatters<F16>(std::vector<Op<F16>>&);

}  // namespace pmod::test
