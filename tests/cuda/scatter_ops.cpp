// weighted_scatter_add and its backward.

#include <cmath>

#include "device.h"

namespace pmod::test {
namespace {

using B = Bounded<float>;

enum ScatterFlags { kGateMlp, kScaleSkipped, kInPlace, kScoreNext, kCheckFinite, kNumScatterFlags };

template <typename T>
Outputs<T> run_weighted_scatter_add(const Device<T>& d, Flags flags) {
  const Problem<T>& p = d.p;
  Outputs<T> out;
  auto& rows = out.rows["out"] = flags[kInPlace] ? p.x.clone() : d.matrix(p.rows, p.offset);
  auto& logits = out.values["next_logits"] = d.numbers(flags[kScoreNext] ? p.rows : 0);
  std::vector<uint8_t> finite(1, 0);
  Allowed memory;
  T* to = memory.write(rows, "out");
  cuda::launch_weighted_scatter_add(
      d.rows(),
      {.x = flags[kInPlace] ? to : memory.read(p.x, "x"),
       .residual = memory.read(p.residual, "residual"),
       .update = memory.read(p.update, "update"),
       .gate = p.gate.data(),
       .inverse = d.inverse.data(),
       .kind = p.kind.data(),
       .out = to,
       .next_weight = flags[kScoreNext] ? d.router_weight(memory) : cuda::Parameter{},
       .next_bias = flags[kScoreNext] ? d.next_bias() : cuda::Number{},
       .next_logits = flags[kScoreNext] ? logits.data() : nullptr,
       .finite =
           flags[kCheckFinite] ? reinterpret_cast<bool*>(memory.write(finite, "finite")) : nullptr,
       .rows = p.rows,
       .slots = p.slots,
       .gate_mlp = flags[kGateMlp],
       .scale_skipped = flags[kScaleSkipped]});
  out.finite = finite[0] == (flags[kCheckFinite] ? 1 : 0);
  return out;
}

// The next logits are those of the rows as they were rounded.
template <typename T>
void check_weighted_scatter_add(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
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
        device_dot_product(p.hidden, [&](int64_t i) { return B(value(written[i])) * p.router[i]; });
    expect.number("next_logits", r, p.routable(r) ? dot + p.bias : B(0));
  }
}

enum ScatterBackwardFlags {
  kGateMlpBackward,
  kScaleSkippedBackward,
  kRouter,
  kGradResidual,
  kZeroKept,
  kSigmoid,
  kNumScatterBackwardFlags
};

constexpr float kGateScale = 0.2F;

// Where the gate takes its slope: any number will do.
template <typename T>
std::vector<float> logits_of(const Problem<T>& p) {
  std::vector<float> logits;
  for (const float slope : p.slope) logits.push_back(3.0F * slope);
  return logits;
}

template <typename T>
Outputs<T> run_weighted_scatter_add_backward(const Device<T>& d, Flags flags) {
  const Problem<T>& p = d.p;
  const bool routes = flags[kRouter];
  Outputs<T> out;
  auto& grad_x = out.rows["grad_x"] = d.matrix(p.rows, p.offset);
  auto& grad_residual = out.rows["grad_residual"] = d.matrix(p.slots, 3 * p.offset);
  auto& grad_update = out.rows["grad_update"] = d.matrix(p.slots, p.offset);
  auto& grad_gate = out.values["grad_gate"] = d.numbers(p.rows);
  auto& grad_logits = out.values["grad_logits"] = d.numbers(routes ? p.rows : 0);
  auto& grad_router = out.values["grad_router"] = d.numbers(routes ? p.hidden : 0);
  auto& grad_bias = out.values["grad_bias"] = d.numbers(routes ? 1 : 0);
  Buffer<float> partials = d.partials(routes ? p.rows : 0, 1);
  const std::vector<float> logits = logits_of(p);
  Allowed memory;
  cuda::launch_weighted_scatter_add_backward(
      d.rows(),
      {.grad_out = memory.read(p.grad_out, "grad_out"),
       .x = memory.read(p.x, "x"),
       .update = memory.read(p.update, "update"),
       .gate = p.gate.data(),
       .inverse = d.inverse.data(),
       .index = d.index.data(),
       .kind = p.kind.data(),
       .router_weight = routes ? d.router_weight(memory) : cuda::Parameter{},
       .logits = routes ? logits.data() : nullptr,
       .router_gate = {kGateScale, 1, flags[kSigmoid] ? Activation::kSigmoid : Activation::kTanh},
       .grad_x = memory.write(grad_x, "grad_x"),
       .grad_residual =
           flags[kGradResidual] ? memory.write(grad_residual, "grad_residual") : nullptr,
       .grad_update = memory.write(grad_update, "grad_update"),
       .grad_gate = grad_gate.data(),
       .grad_router_weight = memory.write(grad_router, "grad_router"),
       .grad_router_bias = memory.write(grad_bias, "grad_bias"),
       .grad_logits = routes ? grad_logits.data() : nullptr,
       .partials = memory.write(partials, "partials"),
       .rows = p.rows,
       .slots = p.slots,
       .gate_mlp = flags[kGateMlpBackward],
       .scale_skipped = flags[kScaleSkippedBackward],
       .zero_kept = flags[kZeroKept]});
  return out;
}

// Both functions of the platform are within 4 units in the last place.
B slope_of(float logit, bool sigmoid) {
  const double v = sigmoid ? 1 / (1 + std::exp(-double{logit})) : std::tanh(double{logit});
  const B act(v, 4 * std::numeric_limits<float>::epsilon() * std::abs(v));
  return B(kGateScale) * (sigmoid ? act * (B(1) - act) : B(1) - act * act);
}

template <typename T>
void check_kept_row(Expect<T>& expect, const Problem<T>& p, Flags flags, int64_t r) {
  const int64_t s = p.inverse[r];
  const T* grad_out = p.row(p.grad_out, r);
  const T* update = p.row(p.update, s);
  const bool gated = p.routable(r) && flags[kGateMlpBackward];
  expect.row("grad_update", s,
             [&](int64_t i) { return B(gated ? double{p.gate[r]} : 1.0) * value(grad_out[i]); });
  const B of_gate = device_dot_product(
      p.hidden, [&](int64_t i) { return B(value(grad_out[i])) * value(update[i]); });
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
  const T* grad_out = p.row(p.grad_out, r);
  const T* x = p.row(p.x, r);
  if (!p.routable(r) || !flags[kScaleSkippedBackward]) {
    expect.copy("grad_x", r, grad_out);
    expect.number("grad_gate", r, 0);
    if (flags[kRouter]) expect.number("grad_logits", r, 0);
    return;
  }
  const B of_gate =
      device_dot_product(p.hidden, [&](int64_t i) { return B(value(grad_out[i])) * value(x[i]); });
  expect.number("grad_gate", r, flags[kRouter] ? B(0) : of_gate);
  const B slope = slope_of(logits_of(p)[r], flags[kSigmoid]);
  if (flags[kRouter]) expect.number("grad_logits", r, slope * of_gate);
  const double z = flags[kRouter] ? double{out.values.at("grad_logits")[r]} : 0.0;
  expect.row("grad_x", r, [&](int64_t i) {
    const B of_out = B(p.gate[r]) * value(grad_out[i]);
    return flags[kRouter] ? of_out + B(z) * p.router[i] : of_out;
  });
}

template <typename T>
void check_weighted_scatter_add_backward(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
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
    expect.zeros("grad_update", s);
    if (flags[kGradResidual]) {
      expect.zeros("grad_residual", s);
    } else {
      expect.untouched("grad_residual", s);
    }
  }
  if (!flags[kRouter]) return;
  const auto& z = out.values.at("grad_logits");
  for (int64_t i = 0; i < p.hidden; ++i) {
    const auto count = static_cast<int64_t>(scored.size());
    const B sum = device_column_sum(count, p.rows, [&](int64_t j) {
      return B(z[scored[j]]) * value(p.row(p.x, scored[j])[i]);
    });
    expect.number("grad_router", i, sum);
  }
  expect.number("grad_bias", 0, bounded_sum(p.rows, 1, [&](int64_t r) { return B(z[r]); }));
}

}  // namespace

template <typename T>
void append_scatter(std::vector<DeviceOp<T>>& ops) {
  ops.push_back({"weighted_scatter_add", kNumScatterFlags, run_weighted_scatter_add<T>,
                 check_weighted_scatter_add<T>});
  ops.push_back({"weighted_scatter_add_backward", kNumScatterBackwardFlags,
                 run_weighted_scatter_add_backward<T>, check_weighted_scatter_add_backward<T>});
}

template void append_scatter<float>(std::vector<DeviceOp<float>>&);
template void append_scatter<Bf16>(std::vector<DeviceOp<Bf16>>&);
template void append_scatter<F16>(std::vector<DeviceOp<F16>>&);

}  // namespace pmod::test
