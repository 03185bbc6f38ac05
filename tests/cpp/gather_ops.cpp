// score, gather and its backward, gather_rmsnorm, gather_add_rmsnorm.

#include "expect.h"
#include "ops.h"

namespace pmod::test {
namespace {

template <typename T>
Outputs<T> run_score(const Setting<T>& s, Flags /*flags*/) {
  const Problem<T>& p = s.p;
  Outputs<T> out;
  auto& logits = out.values["logits"];
  logits.resize(p.rows, value(quiet_nan<T>()));
  const auto weight = s.weight(p.router);
  const cpu::Score<T> loop{.x = p.x.data(),
                           .weight = weight.get(),
                           .bias = p.bias,
                           .kind = p.kind.data(),
                           .logits = logits.data(),
                           .hidden = p.hidden};
  s.for_ranges(p.rows, [&](int64_t begin, int64_t end) { s.loops.score(loop, begin, end); });
  return out;
}

template <typename T>
void check_score(const Problem<T>& p, Flags /*flags*/, const Outputs<T>& out) {
  using B = Bounded<Acc<T>>;
  Expect<T> expect(p, out);
  for (int64_t r = 0; r < p.rows; ++r) {
    const B dot =
        dot_product(p.hidden, [&](int64_t i) { return B(value(p.row(p.x, r)[i])) * p.router[i]; });
    expect.number("logits", r, p.routable(r) ? dot + p.bias : B(0));
  }
}

template <typename T>
Outputs<T> run_gather(const Setting<T>& s, Flags /*flags*/) {
  const Problem<T>& p = s.p;
  Outputs<T> out;
  auto& rows = out.rows["rows"] = Buffer<T>(p.slots * p.hidden, p.offset);
  const cpu::Gather<T> loop{.x = p.x.data(),
                            .index = p.index.data(),
                            .rows = rows.data(),
                            .hidden = p.hidden,
                            .streaming = s.streaming};
  s.for_ranges(p.slots, [&](int64_t begin, int64_t end) { s.loops.gather(loop, begin, end); });
  return out;
}

template <typename T>
void check_gather(const Problem<T>& p, Flags /*flags*/, const Outputs<T>& out) {
  Expect<T> expect(p, out);
  for (int64_t s = 0; s < p.slots; ++s) {
    if (p.index[s] < 0) {
      expect.zeros("rows", s);
    } else {
      expect.copy("rows", s, p.row(p.x, p.index[s]));
    }
  }
}

enum GatherBackwardFlags { kAccumulate, kNumGatherBackwardFlags };

template <typename T>
Outputs<T> run_gather_backward(const Setting<T>& s, Flags flags) {
  const Problem<T>& p = s.p;
  Outputs<T> out;
  auto& grad_x = out.rows["grad_x"] = p.grad_x.clone();
  const cpu::GatherBackward<T> loop{.grad_rows = p.grad_rows.data(),
                                    .index = p.index.data(),
                                    .grad_x = grad_x.data(),
                                    .hidden = p.hidden,
                                    .accumulate = flags[kAccumulate]};
  s.for_ranges(p.slots,
               [&](int64_t begin, int64_t end) { s.loops.gather_backward(loop, begin, end); });
  return out;
}

template <typename T>
void check_gather_backward(const Problem<T>& p, Flags flags, const Outputs<T>& out) {
  Expect<T> expect(p, out);
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* before = p.row(p.grad_x, r);
    const T* grad = p.slot_of(p.grad_rows, r);
    if (!p.kept(r)) {
      expect.copy("grad_x", r, before);
    } else if (!flags[kAccumulate]) {
      expect.copy("grad_x", r, grad);
    } else {
      expect.row("grad_x", r,
                 [&](int64_t i) { return Bounded<Acc<T>>(value(before[i])) + value(grad[i]); });
    }
  }
}

// The norm of one row, and 1 / rms beside it; `x` is the row as the loop saw it.
template <typename T>
void check_norm(Expect<T>& expect, const Problem<T>& p, const Outputs<T>& out, int64_t s,
                const T* x) {
  using B = Bounded<Acc<T>>;
  const B squares = dot_product(p.hidden, [&](int64_t i) { return B(value(x[i])) * value(x[i]); });
  const B mean = squares / static_cast<double>(p.hidden);
  expect.number("rstd", s, B(1) / square_root(mean + p.eps));
  const Acc<T> rstd = out.values.at("rstd")[s];
  expect.row("rows", s, [&](int64_t i) {
    return B(rounded_product<T>(rstd, static_cast<Acc<T>>(value(x[i])))) * p.norm[i];
  });
}

template <typename T>
Outputs<T> run_gather_rmsnorm(const Setting<T>& s, Flags /*flags*/) {
  const Problem<T>& p = s.p;
  Outputs<T> out;
  auto& rows = out.rows["rows"] = Buffer<T>(p.slots * p.hidden, p.offset);
  auto& rstd = out.values["rstd"];
  rstd.resize(p.slots, value(quiet_nan<T>()));
  const auto weight = s.weight(p.norm);
  const cpu::GatherRmsnorm<T> loop{.x = p.x.data(),
                                   .index = p.index.data(),
                                   .weight = weight.get(),
                                   .eps = p.eps,
                                   .rows = rows.data(),
                                   .rstd = rstd.data(),
                                   .hidden = p.hidden,
                                   .streaming = s.streaming};
  s.for_ranges(p.slots,
               [&](int64_t begin, int64_t end) { s.loops.gather_rmsnorm(loop, begin, end); });
  return out;
}

template <typename T>
void check_gather_rmsnorm(const Problem<T>& p, Flags /*flags*/, const Outputs<T>& out) {
  Expect<T> expect(p, out);
  for (int64_t s = 0; s < p.slots; ++s) {
    if (p.index[s] < 0) {
      expect.zeros("rows", s);
      expect.number("rstd", s, 0);
    } else {
      check_norm(expect, p, out, s, p.row(p.x, p.index[s]));
    }
  }
}

template <typename T>
Outputs<T> run_gather_add_rmsnorm(const Setting<T>& s, Flags /*flags*/) {
  const Problem<T>& p = s.p;
  Outputs<T> out;
  auto& residual = out.rows["residual"] = Buffer<T>(p.slots * p.hidden, p.offset);
  auto& rows = out.rows["rows"] = Buffer<T>(p.slots * p.hidden, 3 * p.offset);
  auto& rstd = out.values["rstd"];
  rstd.resize(p.slots, value(quiet_nan<T>()));
  const auto weight = s.weight(p.norm);
  const cpu::GatherAddRmsnorm<T> loop{.x = p.x.data(),
                                      .attn_out = p.attn_out.data(),
                                      .index = p.index.data(),
                                      .weight = weight.get(),
                                      .eps = p.eps,
                                      .residual = residual.data(),
                                      .rows = rows.data(),
                                      .rstd = rstd.data(),
                                      .hidden = p.hidden,
                                      .streaming = s.streaming};
  s.for_ranges(p.slots,
               [&](int64_t begin, int64_t end) { s.loops.gather_add_rmsnorm(loop, begin, end); });
  return out;
}

// The norm is that of the residual as it was rounded.
template <typename T>
void check_gather_add_rmsnorm(const Problem<T>& p, Flags /*flags*/, const Outputs<T>& out) {
  Expect<T> expect(p, out);
  for (int64_t s = 0; s < p.slots; ++s) {
    if (p.index[s] < 0) {
      expect.zeros("residual", s);
      expect.zeros("rows", s);
      expect.number("rstd", s, 0);
      continue;
    }
    const T* x = p.row(p.x, p.index[s]);
    const T* attn_out = p.row(p.attn_out, s);
    expect.row("residual", s,
               [&](int64_t i) { return Bounded<Acc<T>>(value(x[i])) + value(attn_out[i]); });
    check_norm(expect, p, out, s, p.row(out.rows.at("residual"), s));
  }
}

}  // namespace

template <typename T>
void append_gathers(std::vector<Op<T>>& ops) {
  ops.push_back({"score", 0, run_score<T>, check_score<T>});
  ops.push_back({"gather", 0, run_gather<T>, check_gather<T>});
  ops.push_back({"gather_backward", kNumGatherBackwardFlags, run_gather_backward<T>,
                 check_gather_backward<T>});
  ops.push_back({"gather_rmsnorm", 0, run_gather_rmsnorm<T>, check_gather_rmsnorm<T>});
  ops.push_back({"gather_add_rmsnorm", 0, run_gather_add_rmsnorm<T>, check_gather_add_rmsnorm<T>});
}

template void append_gathers<float>(std::vector<Op<float>>&);
template void append_gathers<double>(std::vector<Op<double>>&);
template void append_gathers<Bf16>(std::vector<Op<Bf16>>&);
template void append_gathers<F16>(std::vector<Op<F16>>&);

}  // namespace pmod::test
