#include "cuda/dispatch.h"
#include "cuda/gather_add_rmsnorm.cuh"

namespace pmod::cuda {

Status launch_gather_add_rmsnorm(const Rows& rows, const GatherAddRmsnorm& gather) {
  const Pointers pointers = {gather.x, gather.attn_out, gather.weight.data, gather.residual,
                             gather.out};
  return dispatch_streamed(rows, pointers, [&]<typename S>() {
    return dispatch_weight_of<S>(gather.weight, [&]<typename W>() {
      return launch_blocks<S>(gather_add_rmsnorm_kernel<S, W>, gather.slots, rows, gather);
    });
  });
}

Status launch_gather_add_rmsnorm_backward(const Rows& rows,
                                          const GatherAddRmsnormBackward& backward) {
  const GatherAddRmsnormBackward& a = backward;
  const int64_t partials = parameter_partials(a.slots);
  const Pointers pointers = {a.grad_residual, a.grad_out,      a.grad_rows, a.residual,
                             a.weight.data,   a.grad_attn_out, a.grad_x,    a.partials};
  const Status status = dispatch_summed(rows, pointers, [&]<typename S>() {
    return dispatch_weight_of<S>(a.weight, [&]<typename W>() {
      return launch_blocks<S>(gather_add_rmsnorm_backward_kernel<S, W>, partials, rows, a);
    });
  });
  if (status != kSuccess) return status;
  return launch_sum_partials(a.partials, partials, rows.hidden, a.grad_weight, rows.stream);
}

}  // namespace pmod::cuda
