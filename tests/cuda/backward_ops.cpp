// gather_add_rmsnorm_backward and readers_backward.

#include "device.h"

namespace pmod::test {
namespace {

using B = Bounded<float>;

// rstd * (g - n * mean(g * n)) with n = x * rstd and g = grad * weight.
template <typename T>
class NormGradient {
 public:
  NormGradient(const Problem<T>& p, int64_t slot, const T* x)
      : grad_(p.row(p.grad_rows, slot)), x_(x), weight_(p.norm), rstd_(p.rstd[slot]) {
    const B projection = device_dot_product(p.hidden, [&](int64_t i) { return g(i) * n(i); });
    mean_ = projection / static_cast<double>(p.hidden);
  }

  B at(int64_t i) const { return B(rstd_) * (g(i) - mean_ * n(i)); }
  B of_weight(int64_t i) const {
    return B(value(grad_[i])) * rounded_product<T>(rstd_, static_cast<float>(value(x_[i])));
  }

 private:
  B g(int64_t i) const { return B(value(grad_[i])) * weight_[i]; }
  B n(int64_t i) const { return B(rstd_) * value(x_[i]); }

  const T* grad_;
  const T* x_;
  const std::vector<float>& weight_;
  float rstd_;
  B mean_;
};

// The gradient of the norm's weight over `rows` visited rows, if the normalised rows have one;
// `row_of` a slot.
template <typename T, typename F>
void check_norm_weight(Expect<T>& expect, const Problem<T>& p, bool grad_rows, int64_t rows,
                       const F& row_of) {
  std::vector<NormGradient<T>> slots;
  for (int64_t s = 0; grad_rows && s < p.slots; ++s) {
    if (p.index[s] >= 0) slots.emplace_back(p, s, row_of(s));
  }
  for (int64_t i = 0; i < p.hidden; ++i) {
    expect.number("grad_norm", i,
                  device_column_sum(static_cast<int64_t>(slots.size()), rows,
                                    [&](int64_t s) { return slots[s].of_weight(i); }));
  }
}

enum AddBackwardFlags {
  kGradResidual,
  kGradOut,
  kGradRowsOfSum,
  kGradX,
  kAccumulate,
  kNumAddBackwardFlags
};

template <typename T>
Outputs<T> run_gather_add_rmsnorm_backward(const Device<T>& d, Flags flags) {
  const Problem<T>& p = d.p;
  Outputs<T> out;
  auto& grad_attn_out = out.rows["grad_attn_out"] = d.matrix(p.slots, p.offset);
  auto& grad_x = out.rows["grad_x"] = p.grad_x.clone();
  auto& grad_norm = out.values["grad_norm"] = d.numbers(p.hidden);
  Buffer<float> partials = d.partials(p.slots, 1);
  Allowed memory;
  const auto given = [&](AddBackwardFlags flag, const Buffer<T>& rows, const char* name) {
    return flags[flag] ? memory.read(rows, name) : nullptr;
  };
  cuda::launch_gather_add_rmsnorm_backward(
      d.rows(), {.grad_residual = given(kGradResidual, p.grad_residual, "grad_residual"),
                 .grad_out = given(kGradOut, p.grad_out, "grad_out"),
                 .grad_rows = given(kGradRowsOfSum, p.grad_rows, "grad_rows"),
                 .residual = memory.read(p.residual, "residual"),
                 .index = d.index.data(),
                 .weight = d.norm_weight(memory),
                 .rstd = p.rstd.data(),
                 .grad_attn_out = memory.write(grad_attn_out, "grad_attn_out"),
                 .grad_x = flags[kGradX] ? memory.write(grad_x, "grad_x") : nullptr,
                 .grad_weight = memory.write(grad_norm, "grad_norm"),
                 .partials = memory.write(partials, "partials"),
                 .rows = p.rows,
                 .slots = p.slots,
                 .accumulate = flags[kAccumulate]});
  return out;
}

template <typename T>
void check_gather_add_rmsnorm_backward(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
  Expect<T> expect(p, out);
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t s = p.inverse[r];
    const T* before = p.row(p.grad_x, r);
    if (s < 0) {
      expect.copy("grad_x", r, before);
      continue;
    }
    const T* grad_residual = p.row(p.grad_residual, s);
    const T* grad_out = p.row(p.grad_out, r);
    const NormGradient<T> norm(p, s, p.row(p.residual, s));
    const auto grad = [&](int64_t i) {
      B sum = flags[kGradRowsOfSum] ? norm.at(i) : B(0);
      if (flags[kGradResidual]) sum = sum + value(grad_residual[i]);
      if (flags[kGradOut]) sum = sum + value(grad_out[i]);
      return sum;
    };
    expect.row("grad_attn_out", s, grad);
    if (!flags[kGradX]) {
      expect.copy("grad_x", r, before);
    } else {
      expect.row("grad_x", r, [&](int64_t i) {
        return flags[kAccumulate] ? grad(i) + value(before[i]) : grad(i);
      });
    }
  }
  for (int64_t s = 0; s < p.slots; ++s) {
    if (p.index[s] < 0) expect.zeros("grad_attn_out", s);
  }
  check_norm_weight(expect, p, flags[kGradRowsOfSum], p.slots,
                    [&](int64_t s) { return p.row(p.residual, s); });
}

enum ReadersFlags { kByIndex, kGradRows, kNorm, kGradKept, kLogits, kOverwrite, kNumReadersFlags };

template <typename T>
Outputs<T> run_readers_backward(const Device<T>& d, Flags flags) {
  const Problem<T>& p = d.p;
  Outputs<T> out;
  auto& grad_x = out.rows["grad_x"] = p.grad_x.clone();
  for (int64_t r = 0; flags[kOverwrite] && r < p.rows; ++r) {
    if (p.kept(r)) std::fill_n(grad_x.data() + r * p.hidden, p.hidden, quiet_nan<T>());
  }
  auto& grad_router = out.values["grad_router"] = d.numbers(flags[kLogits] ? p.hidden : 0);
  auto& grad_bias = out.values["grad_bias"] = d.numbers(flags[kLogits] ? 1 : 0);
  auto& grad_norm = out.values["grad_norm"] = d.numbers(flags[kNorm] ? p.hidden : 0);
  const int64_t visited = flags[kByIndex] ? p.slots : p.rows;
  Buffer<float> partials = d.partials(visited, flags[kLogits] + flags[kNorm]);
  Allowed memory;
  const auto given = [&](ReadersFlags flag, const Buffer<T>& rows, const char* name) {
    return flags[flag] ? memory.read(rows, name) : nullptr;
  };
  cuda::launch_readers_backward(
      d.rows(), {.x = memory.read(p.x, "x"),
                 .grad_rows = given(kGradRows, p.grad_rows, "grad_rows"),
                 .grad_kept = given(kGradKept, p.grad_kept, "grad_kept"),
                 .rstd = p.rstd.data(),
                 .grad_logits = flags[kLogits] ? p.grad_logits.data() : nullptr,
                 .inverse = flags[kByIndex] ? nullptr : d.inverse.data(),
                 .index = d.index.data(),
                 .router_weight = d.router_weight(memory),
                 .norm_weight = flags[kNorm] ? d.norm_weight(memory) : cuda::Parameter{},
                 .grad_x = memory.write(grad_x, "grad_x"),
                 .grad_router_weight = memory.write(grad_router, "grad_router"),
                 .grad_router_bias = memory.write(grad_bias, "grad_bias"),
                 .grad_norm_weight = memory.write(grad_norm, "grad_norm"),
                 .partials = memory.write(partials, "partials"),
                 .rows = p.rows,
                 .slots = p.slots,
                 .overwrite = flags[kOverwrite]});
  return out;
}

template <typename T>
void check_router(Expect<T>& expect, const Problem<T>& p, Flags flags,
                  const std::vector<int64_t>& scored) {
  const int64_t visited = flags[kByIndex] ? p.slots : p.rows;
  for (int64_t i = 0; i < p.hidden; ++i) {
    const B sum = device_column_sum(static_cast<int64_t>(scored.size()), visited, [&](int64_t j) {
      return B(p.grad_logits[scored[j]]) * value(p.row(p.x, scored[j])[i]);
    });
    expect.number("grad_router", i, sum);
  }
  expect.number("grad_bias", 0,
                bounded_sum(p.rows, 1, [&](int64_t r) { return B(p.grad_logits[r]); }));
}

template <typename T>
void check_readers_backward(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
  Expect<T> expect(p, out);
  std::vector<int64_t> scored;
  for (int64_t r = 0; r < p.rows; ++r) {
    const bool visited = p.kept(r) || !flags[kByIndex];
    const double z = visited && flags[kLogits] ? double{p.grad_logits[r]} : 0.0;
    if (z != 0) scored.push_back(r);
    const T* before = p.row(p.grad_x, r);
    if (z == 0 && !(p.kept(r) && (flags[kGradRows] || flags[kGradKept] || flags[kOverwrite]))) {
      expect.copy("grad_x", r, before);
      continue;
    }
    const T* grad_rows = p.slot_of(p.grad_rows, r);
    const T* grad_kept = p.slot_of(p.grad_kept, r);
    const bool gathered = p.kept(r) && flags[kGradRows];
    std::vector<NormGradient<T>> norm;
    if (gathered && flags[kNorm]) norm.emplace_back(p, p.inverse[r], p.row(p.x, r));
    expect.row("grad_x", r, [&](int64_t i) {
      B grad(0);
      if (gathered) grad = norm.empty() ? B(value(grad_rows[i])) : norm[0].at(i);
      if (p.kept(r) && flags[kGradKept]) grad = grad + value(grad_kept[i]);
      if (z != 0) grad = grad + B(z) * p.router[i];
      return p.kept(r) && flags[kOverwrite] ? grad : grad + value(before[i]);
    });
  }
  if (flags[kLogits]) check_router(expect, p, flags, scored);
  if (flags[kNorm]) {
    check_norm_weight(expect, p, flags[kGradRows], flags[kByIndex] ? p.slots : p.rows,
                      [&](int64_t s) { return p.row(p.x, p.index[s]); });
  }
}

}  // namespace

template <typename T>
void append_backward(std::vector<DeviceOp<T>>& ops) {
  ops.push_back({"gather_add_rmsnorm_backward", kNumAddBackwardFlags,
                 run_gather_add_rmsnorm_backward<T>, check_gather_add_rmsnorm_backward<T>});
  ops.push_back(
      {"readers_backward", kNumReadersFlags, run_readers_backward<T>, check_readers_backward<T>});
}

template void append_backward<float>(std::vector<DeviceOp<float>>&);
template void append_backward<Bf16>(std::vector<DeviceOp<Bf16>>&);
template void append_backward<F16>(std::vector<DeviceOp<F16>>&);

}  // namespace pmod::test
