// pmod::gather_rmsnorm: reference.gather_rmsnorm.
//
// One task per range of slots: sum of squares of the row, then the row again (it is in the cache),
// normalised. Backward goes over fixed chunks of slots, so that the gradient of the weight is the
// same for any number of threads. Reads K rows and writes K rows; backward reads 2K (3K where it
// adds) and writes K. Rounds before and after the multiplication by the weight, as the norm of a
// Llama does.

#include "cpu/gather_rmsnorm.h"

#include <vector>

namespace pmod::cpu {

std::tuple<Tensor, Tensor> normalise_rows(const char* op, const Tensor& x, const Tensor& index,
                                          const Tensor& norm_weight, double eps) {
  const int64_t slots = index.numel(), hidden = x.size(1);
  Tensor rows = torch::stable::new_empty(x, {slots, hidden});
  Tensor rstd = torch::stable::new_empty(x, {slots}, acc_type(x));
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const std::vector<A> w = weights<A>(op, "norm_weight", norm_weight, hidden);
    const T* in = x.const_data_ptr<T>();
    const int32_t* row_of = index.const_data_ptr<int32_t>();
    T* out = rows.mutable_data_ptr<T>();
    A* scale = rstd.mutable_data_ptr<A>();
    for_rows(slots, hidden * sizeof(T), [&](int64_t s) {
      if (row_of[s] < 0) {
        zero_row(out + s * hidden, hidden);
        scale[s] = 0;
      } else {
        scale[s] = rmsnorm_row(in + row_of[s] * hidden, w.data(), A(eps), out + s * hidden, hidden);
      }
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
  Tensor grad_weight = torch::stable::new_empty(x, {hidden}, acc_type(x));
  dispatch_rows(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::T;
    using A = typename decltype(type)::A;
    const std::vector<A> w = weights<A>(op, "norm_weight", norm_weight, hidden);
    const T* in = x.const_data_ptr<T>();
    const T* grad = grad_rows.const_data_ptr<T>();
    const A* scale = rstd.const_data_ptr<A>();
    const int32_t* row_of = index.const_data_ptr<int32_t>();
    T* out = grad_x.mutable_data_ptr<T>();
    PartialSums sums(hidden);
    for_chunks(slots, [&](int64_t c, int64_t begin, int64_t end) {
      std::vector<A> row(hidden);
      for (int64_t s = begin; s < end; ++s) {
        if (row_of[s] < 0) continue;
        rmsnorm_backward_row(grad + s * hidden, in + row_of[s] * hidden, w.data(), scale[s],
                             row.data(), sums.chunk(c), hidden);
        store_row(row.data(), accumulate, out + row_of[s] * hidden, hidden);
      }
    });
    sums.write(grad_weight.mutable_data_ptr<A>());
  });
  return grad_weight;
}

}  // namespace
}  // namespace pmod::cpu

STABLE_TORCH_LIBRARY_IMPL(pmod, CPU, m) {
  m.impl("gather_rmsnorm", TORCH_BOX(&pmod::cpu::gather_rmsnorm));
  m.impl("gather_rmsnorm_backward_", TORCH_BOX(&pmod::cpu::gather_rmsnorm_backward));
}
