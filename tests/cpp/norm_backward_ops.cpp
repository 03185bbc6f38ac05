// gather_add_rmsnorm_backward and readers_backward.

#include "expect.h"
#include "ops.h"

namespace pmod::test {
namespace {

// rstd * (g - n * mean(g * n)) with n = x * rstd and g = grad * weight.
template <typename T>
class NormGradient {
 public:
  using B = Bounded<Acc<T>>;

  NormGradient(const Problem<T>& p, int64_t slot, const T* x)
      : grad_(p.row(p.grad_rows, slot)), x_(x), weight_(p.norm), rstd_(p.rstd[slot]) {
    const B projection = dot_product(p.hidden, [&](int64_t i) { return g(i) * n(i); });
    mean_ = projection / static_cast<double>(p.hidden);
  }

  B at(int64_t i) const { return B(rstd_) * (g(i) - mean_ * n(i)); }
  B of_weight(int64_t i) const {
    return B(value(grad_[i])) * rounded_product<T>(rstd_, static_cast<Acc<T>>(value(x_[i])));
  }

 private:
  B g(int64_t i) const { return B(value(grad_[i])) * weight_[i]; }
  B n(int64_t i) const { return B(rstd_) * value(x_[i]); }

  const T* grad_;
  const T* x_;
  const std::vector<Acc<T>>& weight_;
  Acc<T> rstd_;
  B mean_;
};

// The gradient of the norm's weight, if there are gradients of the normalised rows; `row_of` a
// slot.
template <typename T, typename F>
void check_norm_weight(Expect<T>& expect, const Problem<T>& p, bool grad_rows, const F& row_of) {
  using B = Bounded<Acc<T>>;
  std::vector<NormGradient<T>> slots;
  for (int64_t s = 0; grad_rows && s < p.slots; ++s) {
    if (p.index[s] >= 0) slots.emplace_back(p, s, row_of(s));
  }
  const auto count = static_cast<int64_t>(slots.size());
  for (int64_t i = 0; i < p.hidden; ++i) {
    const B sum = bounded_sum(count, column_depth<T>(p.rows),
                              [&](int64_t s) { return slots[s].of_weight(i); });
    expect.number("grad_norm", i, sum);
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
Outputs<T> run_gather_add_rmsnorm_backward(const Setting<T>& s, Flags flags) {
  const Problem<T>& p = s.p;
  Outputs<T> out;
  auto& grad_attn_out = out.rows["grad_attn_out"] = Buffer<T>(p.slots * p.hidden, p.offset);
  auto& grad_x = out.rows["grad_x"] = p.grad_x.clone();
  ParameterGradient<T> norm(s, p.slots, true);
  const auto weight = s.weight(p.norm);
  s.for_chunks(p.slots, [&](int64_t c, int64_t begin, int64_t end) {
    const cpu::GatherAddRmsnormBackward<T> loop{
        .grad_residual = flags[kGradResidual] ? p.grad_residual.data() : nullptr,
        .grad_out = flags[kGradOut] ? p.grad_out.data() : nullptr,
        .grad_rows = flags[kGradRowsOfSum] ? p.grad_rows.data() : nullptr,
        .residual = p.residual.data(),
        .index = p.index.data(),
        .weight = weight.get(),
        .rstd = p.rstd.data(),
        .grad_attn_out = grad_attn_out.data(),
        .grad_x = flags[kGradX] ? grad_x.data() : nullptr,
        .hidden = p.hidden,
        .accumulate = flags[kAccumulate],
        .streaming = s.streaming,
        .norm = norm.chunk(c)};
    s.loops.gather_add_rmsnorm_backward(loop, begin, end);
  });
  out.values["grad_norm"] = norm.elements();
  return out;
}

template <typename T>
void check_gather_add_rmsnorm_backward(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
  using B = Bounded<Acc<T>>;
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
  check_norm_weight(expect, p, flags[kGradRowsOfSum],
                    [&](int64_t s) { return p.row(p.residual, s); });
}

enum ReadersFlags { kByIndex, kGradRows, kNorm, kGradKept, kLogits, kOverwrite, kNumReadersFlags };

template <typename T>
Outputs<T> run_readers_backward(const Setting<T>& s, Flags flags) {
  const Problem<T>& p = s.p;
  const int64_t count = flags[kByIndex] ? p.slots : p.rows;
  Outputs<T> out;
  auto& grad_x = out.rows["grad_x"] = p.grad_x.clone();
  for (int64_t r = 0; flags[kOverwrite] && r < p.rows; ++r) {
    if (p.kept(r)) std::fill_n(grad_x.data() + r * p.hidden, p.hidden, quiet_nan<T>());
  }
  ParameterGradient<T> router(s, count, flags[kLogits]), norm(s, count, flags[kNorm]);
  const auto router_weight = s.weight(p.router), norm_weight = s.weight(p.norm);
  s.for_chunks(count, [&](int64_t c, int64_t begin, int64_t end) {
    const cpu::ReadersBackward<T> loop{
        .x = p.x.data(),
        .grad_rows = flags[kGradRows] ? p.grad_rows.data() : nullptr,
        .grad_kept = flags[kGradKept] ? p.grad_kept.data() : nullptr,
        .rstd = p.rstd.data(),
        .grad_logits = flags[kLogits] ? p.grad_logits.data() : nullptr,
        .inverse = flags[kByIndex] ? nullptr : p.inverse.data(),
        .index = p.index.data(),
        .slots = p.slots,
        .router_weight = router_weight.get(),
        .norm_weight = flags[kNorm] ? norm_weight.get() : cpu::Weight<T>{},
        .grad_x = grad_x.data(),
        .overwrite = flags[kOverwrite],
        .hidden = p.hidden,
        .router = router.chunk(c),
        .norm = norm.chunk(c)};
    s.loops.readers_backward(loop, begin, end);
  });
  out.values["grad_router"] = router.elements();
  out.values["grad_norm"] = norm.elements();
  return out;
}

template <typename T>
void check_readers_backward(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
  using B = Bounded<Acc<T>>;
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
  for (int64_t i = 0; flags[kLogits] && i < p.hidden; ++i) {
    const auto count = static_cast<int64_t>(scored.size());
    const B sum = bounded_sum(count, column_depth<T>(p.rows), [&](int64_t j) {
      return B(p.grad_logits[scored[j]]) * value(p.row(p.x, scored[j])[i]);
    });
    expect.number("grad_router", i, sum);
  }
  if (flags[kNorm]) {
    check_norm_weight(expect, p, flags[kGradRows],
                      [&](int64_t s) { return p.row(p.x, p.index[s]); });
  }
}

}  // namespace

template <typename T>
void append_norm_backwards(std::vector<Op<T>>& ops) {
  ops.push_back({"gather_add_rmsnorm_backward", kNumAddBackwardFlags,
                 run_gather_add_rmsnorm_backward<T>, check_gather_add_rmsnorm_backward<T>});
  ops.push_back(
      {"readers_backward", kNumReadersFlags, run_readers_backward<T>, check_readers_backward<T>});
}

template void append_norm_backwards<float>(std::vector<Op<float>>&);
template void append_norm_backwards<double>(std::vector<Op<double>>&);
template void append_norm_backwards<Bf16>(std::vector<Op<Bf16>>&);
template void append_norm_backwards<F16>(std::vector<Op<F16>>&);

}  // namespace pmod::test
