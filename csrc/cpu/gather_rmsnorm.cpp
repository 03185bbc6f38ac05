// pmod::gather_rmsnorm: reference.gather_rmsnorm.
//
// One task per range of slots. Backward goes over chunks of slots that do not depend on the number
// of threads, so that neither does the gradient of the weight. Reads K rows and writes K rows;
// backward reads 2K (3K where it adds) and writes K. Rounds before and after the multiplication by
// the weight, as the norm of a Llama does.

#include "cpu/gather_rmsnorm.h"

#include <vector>

#include "cpu/chunked_sum.h"

namespace pmod::cpu {

std::tuple<Tensor, Tensor> normalise_rows(const char* op, const Tensor& x, const Tensor& index,
                                          const Tensor& norm_weight, double eps) {
  const int64_t slots = index.numel(), hidden = x.size(1);
  Tensor rows = allocate({slots, hidden}, x.scalar_type());
  Tensor rstd = allocate({slots}, acc_type(x));
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> weight(op, "norm_weight", norm_weight, hidden);
    const GatherRmsnorm<T> loop{.x = data<T>(x),
                                .index = data<int32_t>(index),
                                .weight = weight.get(),
                                .eps = static_cast<A>(eps),
                                .rows = mutable_data<T>(rows),
                                .rstd = mutable_data<A>(rstd),
                                .hidden = hidden,
                                .streaming = worth_streaming(rows)};
    for_ranges(slots, hidden * sizeof(T), [&](int64_t begin, int64_t end) {
      row_loops<T>().gather_rmsnorm(loop, begin, end);
    });
  });
  return {rows, rstd};
}

namespace {

std::tuple<Tensor, Tensor> gather_rmsnorm(const Tensor& x_arg, const Tensor& index_arg,
                                          const Tensor& norm_weight, double eps) {
  const char* op = "gather_rmsnorm";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const Tensor index = index_vector(op, "index", index_arg, -1, x.size(0));
  return normalise_rows(op, x, index, norm_weight, eps);
}

Tensor gather_rmsnorm_backward(Tensor grad_x, const Tensor& grad_rows_arg, const Tensor& x_arg,
                               const Tensor& index_arg, const Tensor& norm_weight,
                               const Tensor& rstd_arg, bool accumulate) {
  const char* op = "gather_rmsnorm_backward_";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const int64_t hidden = x.size(1);
  const Tensor index = index_vector(op, "index", index_arg, -1, x.size(0));
  const int64_t slots = index.numel();
  const Tensor grad_rows = matrix(op, "grad_rows", grad_rows_arg, x.scalar_type(), slots, hidden);
  const Tensor rstd = vector(op, "rstd", rstd_arg, acc_type(x), slots);
  check_mutable(op, "grad_x", grad_x, x);
  Tensor grad_weight = allocate({hidden}, acc_type(x));
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> weight(op, "norm_weight", norm_weight, hidden);
    const Chunks chunks(slots);
    ChunkedSum<T> sum(chunks, hidden);
    chunks.for_each([&](int64_t c, int64_t begin, int64_t end) {
      const ReadersBackward<T> loop{.x = data<T>(x),
                                    .grad_rows = data<T>(grad_rows),
                                    .rstd = data<A>(rstd),
                                    .index = data<int32_t>(index),
                                    .slots = slots,
                                    .norm_weight = weight.get(),
                                    .grad_x = mutable_data<T>(grad_x),
                                    .overwrite = !accumulate,
                                    .hidden = hidden,
                                    .norm = sum.chunk(c)};
      row_loops<T>().readers_backward(loop, begin, end);
    });
    sum.write(mutable_data<A>(grad_weight));
  });
  return grad_weight;
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("gather_rmsnorm", TORCH_BOX(&pmod::cpu::gather_rmsnorm));
  m.impl("gather_rmsnorm_backward_", TORCH_BOX(&pmod::cpu::gather_rmsnorm_backward));
}
