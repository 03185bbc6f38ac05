// gather and its backward, gather_rmsnorm, gather_add_rmsnorm.

#include "device.h"

namespace pmod::test {
namespace {

template <typename T>
Outputs<T> run_gather(const Device<T>& d, Flags /*flags*/) {
  const Problem<T>& p = d.p;
  Outputs<T> out;
  auto& rows = out.rows["rows"] = d.matrix(p.slots, p.offset);
  Allowed memory;
  cuda::launch_gather(d.rows(), {.x = memory.read(p.x, "x"),
                                 .index = d.index.data(),
                                 .out = memory.write(rows, "rows"),
                                 .rows = p.rows,
                                 .slots = p.slots});
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
Outputs<T> run_gather_backward(const Device<T>& d, Flags flags) {
  const Problem<T>& p = d.p;
  Outputs<T> out;
  auto& grad_x = out.rows["grad_x"] = p.grad_x.clone();
  Allowed memory;
  cuda::launch_gather_backward(d.rows(), {.grad_rows = memory.read(p.grad_rows, "grad_rows"),
                                          .index = d.index.data(),
                                          .grad_x = memory.write(grad_x, "grad_x"),
                                          .rows = p.rows,
                                          .slots = p.slots,
                                          .accumulate = flags[kAccumulate]});
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
                 [&](int64_t i) { return Bounded<float>(value(before[i])) + value(grad[i]); });
    }
  }
}

// The norm of one row, and 1 / rms beside it; `x` is the row as the kernel saw it.
template <typename T>
void check_norm(Expect<T>& expect, const Problem<T>& p, const Outputs<T>& out, int64_t s,
                const T* x) {
  using B = Bounded<float>;
  const B squares =
      device_dot_product(p.hidden, [&](int64_t i) { return B(value(x[i])) * value(x[i]); });
  const B mean = squares / static_cast<double>(p.hidden);
  expect.number("rstd", s, B(1) / square_root(mean + p.eps));
  const float rstd = out.values.at("rstd")[s];
  expect.row("rows", s, [&](int64_t i) {
    return B(rounded_product<T>(rstd, static_cast<float>(value(x[i])))) * p.norm[i];
  });
}

enum NormFlags { kAfterSelect, kNumNormFlags };

template <typename T>
Outputs<T> run_gather_rmsnorm(const Device<T>& d, Flags flags) {
  const Problem<T>& p = d.p;
  Outputs<T> out;
  auto& rows = out.rows["rows"] = d.matrix(p.slots, p.offset);
  auto& rstd = out.values["rstd"] = d.numbers(p.slots);
  Allowed memory;
  cuda::launch_gather_rmsnorm(d.rows(), {.x = memory.read(p.x, "x"),
                                         .index = d.index.data(),
                                         .weight = d.norm_weight(memory),
                                         .eps = p.eps,
                                         .out = memory.write(rows, "rows"),
                                         .rstd = rstd.data(),
                                         .rows = p.rows,
                                         .slots = p.slots,
                                         .after_select = flags[kAfterSelect]});
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
Outputs<T> run_gather_add_rmsnorm(const Device<T>& d, Flags /*flags*/) {
  const Problem<T>& p = d.p;
  Outputs<T> out;
  auto& residual = out.rows["residual"] = d.matrix(p.slots, p.offset);
  auto& rows = out.rows["rows"] = d.matrix(p.slots, 3 * p.offset);
  auto& rstd = out.values["rstd"] = d.numbers(p.slots);
  Allowed memory;
  cuda::launch_gather_add_rmsnorm(d.rows(), {.x = memory.read(p.x, "x"),
                                             .attn_out = memory.read(p.attn_out, "attn_out"),
                                             .index = d.index.data(),
                                             .weight = d.norm_weight(memory),
                                             .eps = p.eps,
                                             .residual = memory.write(residual, "residual"),
                                             .out = memory.write(rows, "rows"),
                                             .rstd = rstd.data(),
                                             .rows = p.rows,
                                             .slots = p.slots});
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
               [&](int64_t i) { return Bounded<float>(value(x[i])) + value(attn_out[i]); });
    check_norm(expect, p, out, s, p.row(out.rows.at("residual"), s));
  }
}

}  // namespace

template <typename T>
void append_forward(std::vector<DeviceOp<T>>& ops) {
  ops.push_back({"gather", 0, run_gather<T>, check_gather<T>});
  ops.push_back({"gather_backward", kNumGatherBackwardFlags, run_gather_backward<T>,
                 check_gather_backward<T>});
  ops.push_back({"gather_rmsnorm", kNumNormFlags, run_gather_rmsnorm<T>, check_gather_rmsnorm<T>});
  ops.push_back({"gather_add_rmsnorm", 0, run_gather_add_rmsnorm<T>, check_gather_add_rmsnorm<T>});
}

template void append_forward<float>(std::vector<DeviceOp<float>>&);
template void append_forward<Bf16>(std::vector<DeviceOp<Bf16>>&);
template void append_forward<F16>(std::vector<DeviceOp<F16>>&);

}  // namespace pmod::test
