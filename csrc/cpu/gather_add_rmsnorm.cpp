// pmod::gather_add_rmsnorm: reference.gather_add_rmsnorm.
//
// One task per range of slots. Backward adds the gradient through the norm to the one that reached
// the residual, which may come as gradients of all rows (`grad_out`) and is then read in place; the
// sum is the gradient of attn_out and of the kept rows of x. Chunks of slots for the weight. Reads
// 2K rows and writes 2K; backward reads 3K and writes K, and 2K or K more into a grad_x.

#include <tuple>
#include <vector>

#include "cpu/adapter.h"
#include "cpu/chunked_sum.h"

namespace pmod::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> gather_add_rmsnorm(const Tensor& x_arg,
                                                      const Tensor& attn_out_arg,
                                                      const Tensor& index_arg,
                                                      const Tensor& norm_weight, double eps) {
  const char* op = "gather_add_rmsnorm";
  const Tensor x = matrix(op, "x", x_arg, x_arg.scalar_type(), -1, -1);
  const int64_t hidden = x.size(1);
  const Tensor index = index_vector(op, "index", index_arg, -1, x.size(0));
  const int64_t slots = index.numel();
  const Tensor attn_out = matrix(op, "attn_out", attn_out_arg, x.scalar_type(), slots, hidden);
  Tensor residual = allocate({slots, hidden}, x.scalar_type());
  Tensor rows = allocate({slots, hidden}, x.scalar_type());
  Tensor rstd = allocate({slots}, acc_type(x));
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> weight(op, "norm_weight", norm_weight, hidden);
    const GatherAddRmsnorm<T> loop{.x = data<T>(x),
                                   .attn_out = data<T>(attn_out),
                                   .index = data<int32_t>(index),
                                   .weight = weight.get(),
                                   .eps = static_cast<A>(eps),
                                   .residual = mutable_data<T>(residual),
                                   .rows = mutable_data<T>(rows),
                                   .rstd = mutable_data<A>(rstd),
                                   .hidden = hidden,
                                   .streaming = worth_streaming(residual) && worth_streaming(rows)};
    for_ranges(slots, hidden * sizeof(T), [&](int64_t begin, int64_t end) {
      row_loops<T>().gather_add_rmsnorm(loop, begin, end);
    });
  });
  return {residual, rows, rstd};
}

std::tuple<Tensor, Tensor> gather_add_rmsnorm_backward(
    const OptionalTensor& grad_x, const OptionalTensor& grad_residual_arg,
    const OptionalTensor& grad_out_arg, const OptionalTensor& grad_rows_arg,
    const Tensor& residual_arg, const Tensor& index_arg, const Tensor& norm_weight,
    const Tensor& rstd_arg, bool accumulate) {
  const char* op = "gather_add_rmsnorm_backward_";
  const ScalarType type_of_rows = residual_arg.scalar_type();
  const Tensor residual = matrix(op, "residual", residual_arg, type_of_rows, -1, -1);
  const int64_t slots = residual.size(0), hidden = residual.size(1);
  const OptionalTensor grad_residual =
      matrix(op, "grad_residual", grad_residual_arg, type_of_rows, slots, hidden);
  const OptionalTensor grad_rows =
      matrix(op, "grad_rows", grad_rows_arg, type_of_rows, slots, hidden);
  const OptionalTensor grad_out = matrix(op, "grad_out", grad_out_arg, type_of_rows, -1, hidden);
  int64_t rows = grad_out ? grad_out->size(0) : INT32_MAX;
  if (grad_x) {
    matrix(op, "grad_x", *grad_x, type_of_rows, grad_out ? rows : -1, hidden);
    check_mutable(op, "grad_x", *grad_x, *grad_x);
    rows = grad_x->size(0);
  }
  const Tensor index = index_vector(op, "index", index_arg, slots, rows);
  const Tensor rstd = vector(op, "rstd", rstd_arg, acc_type(residual), slots);
  Tensor grad_attn_out = allocate({slots, hidden}, residual.scalar_type());
  Tensor grad_weight = allocate({hidden}, acc_type(residual));
  dispatch_rows(op, "residual", residual, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const PaddedWeight<T> weight(op, "norm_weight", norm_weight, hidden);
    const Chunks chunks(slots);
    ChunkedSum<T> sum(chunks, hidden);
    chunks.for_each([&](int64_t c, int64_t begin, int64_t end) {
      const GatherAddRmsnormBackward<T> loop{.grad_residual = data<T>(grad_residual),
                                             .grad_out = data<T>(grad_out),
                                             .grad_rows = data<T>(grad_rows),
                                             .residual = data<T>(residual),
                                             .index = data<int32_t>(index),
                                             .weight = weight.get(),
                                             .rstd = data<A>(rstd),
                                             .grad_attn_out = mutable_data<T>(grad_attn_out),
                                             .grad_x = grad_x ? mutable_data<T>(*grad_x) : nullptr,
                                             .hidden = hidden,
                                             .accumulate = accumulate,
                                             .streaming = worth_streaming(grad_attn_out),
                                             .norm = sum.chunk(c)};
      row_loops<T>().gather_add_rmsnorm_backward(loop, begin, end);
    });
    sum.write(mutable_data<A>(grad_weight));
  });
  return {grad_attn_out, grad_weight};
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("gather_add_rmsnorm", TORCH_BOX(&pmod::cpu::gather_add_rmsnorm));
  m.impl("gather_add_rmsnorm_backward_", TORCH_BOX(&pmod::cpu::gather_add_rmsnorm_backward));
}
