// pmod::gather_add_rmsnorm: reference.gather_add_rmsnorm.
//
// One task per range of slots: the residual x[index] + attn_out is rounded and written, then
// normalised from the cache. Backward adds the gradient through the norm to the one that reached
// the residual; the sum is the gradient of attn_out and of the kept rows of x. Fixed chunks of
// slots for the weight. Reads 2K rows and writes 2K; backward reads 3K (4K where it adds) and
// writes 2K.

#include <tuple>
#include <vector>

#include "cpu/adapter.h"

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
  Tensor residual = torch::stable::new_empty(x, {slots, hidden});
  Tensor rows = torch::stable::new_empty(x, {slots, hidden});
  Tensor rstd = torch::stable::new_empty(x, {slots}, acc_type(x));
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const std::vector<A> w = weights<A>(op, "norm_weight", norm_weight, hidden);
    const T* in = x.const_data_ptr<T>();
    const T* attn = attn_out.const_data_ptr<T>();
    const int32_t* row_of = index.const_data_ptr<int32_t>();
    T* sum = residual.mutable_data_ptr<T>();
    T* out = rows.mutable_data_ptr<T>();
    A* scale = rstd.mutable_data_ptr<A>();
    for_rows(slots, hidden * sizeof(T), [&](int64_t s) {
      T* to = sum + s * hidden;
      if (row_of[s] < 0) {
        zero_row(to, hidden);
        zero_row(out + s * hidden, hidden);
        scale[s] = 0;
        return;
      }
      const T* from = in + row_of[s] * hidden;
      const T* added = attn + s * hidden;
      for (int64_t i = 0; i < hidden; ++i) to[i] = static_cast<T>(A(from[i]) + A(added[i]));
      scale[s] = rmsnorm_row(to, w.data(), A(eps), out + s * hidden, hidden);
    });
  });
  return {residual, rows, rstd};
}

std::tuple<Tensor, Tensor> gather_add_rmsnorm_backward(
    Tensor grad_x, const OptionalTensor& grad_residual_arg, const OptionalTensor& grad_rows_arg,
    const Tensor& residual_arg, const Tensor& index_arg, const Tensor& norm_weight,
    const Tensor& rstd_arg, bool accumulate) {
  const char* op = "gather_add_rmsnorm_backward_";
  const Tensor residual = matrix(op, "residual", residual_arg, residual_arg.scalar_type(), -1, -1);
  const int64_t slots = residual.size(0), hidden = residual.size(1);
  const ScalarType type_of_rows = residual.scalar_type();
  OptionalTensor grad_residual, grad_rows;
  if (grad_residual_arg) {
    grad_residual = matrix(op, "grad_residual", *grad_residual_arg, type_of_rows, slots, hidden);
  }
  if (grad_rows_arg) {
    grad_rows = matrix(op, "grad_rows", *grad_rows_arg, type_of_rows, slots, hidden);
  }
  matrix(op, "grad_x", grad_x, type_of_rows, -1, hidden);
  check_mutable(op, "grad_x", grad_x, grad_x);
  const Tensor index = index_vector(op, "index", index_arg, slots, grad_x.size(0));
  const Tensor rstd = vector(op, "rstd", rstd_arg, acc_type(residual), slots);
  Tensor grad_attn_out = torch::stable::new_empty(residual, {slots, hidden});
  Tensor grad_weight = torch::stable::new_empty(residual, {hidden}, acc_type(residual));
  dispatch_rows(op, "residual", residual, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const std::vector<A> w = weights<A>(op, "norm_weight", norm_weight, hidden);
    const T* sum = residual.const_data_ptr<T>();
    const T* of_residual = grad_residual ? grad_residual->const_data_ptr<T>() : nullptr;
    const T* of_rows = grad_rows ? grad_rows->const_data_ptr<T>() : nullptr;
    const A* scale = rstd.const_data_ptr<A>();
    const int32_t* row_of = index.const_data_ptr<int32_t>();
    T* out = grad_x.mutable_data_ptr<T>();
    T* attn = grad_attn_out.mutable_data_ptr<T>();
    PartialSums sums(hidden);
    for_chunks(slots, [&](int64_t c, int64_t begin, int64_t end) {
      std::vector<A> row(hidden);
      for (int64_t s = begin; s < end; ++s) {
        const int64_t at = s * hidden;
        if (row_of[s] < 0) {
          zero_row(attn + at, hidden);
          continue;
        }
        std::fill(row.begin(), row.end(), A(0));
        if (of_rows) {
          rmsnorm_backward_row(of_rows + at, sum + at, w.data(), scale[s], row.data(),
                               sums.chunk(c), hidden);
        }
        if (of_residual) add_row(of_residual + at, row.data(), hidden);
        store_row(row.data(), false, attn + at, hidden);
        store_row(row.data(), accumulate, out + row_of[s] * hidden, hidden);
      }
    });
    sums.write(grad_weight.mutable_data_ptr<A>());
  });
  return {grad_attn_out, grad_weight};
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("gather_add_rmsnorm", TORCH_BOX(&pmod::cpu::gather_add_rmsnorm));
  m.impl("gather_add_rmsnorm_backward_", TORCH_BOX(&pmod::cpu::gather_add_rmsnorm_backward));
}
