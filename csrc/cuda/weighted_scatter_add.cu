#include "cuda/dispatch.h"
#include "cuda/weighted_scatter_add.cuh"
#include "cuda/weighted_scatter_add_backward.cuh"

namespace pmod::cuda {

Status launch_weighted_scatter_add(const Rows& rows, const WeightedScatterAdd& scatter) {
  const WeightedScatterAdd& a = scatter;
  if (a.finite != nullptr) {
    const Status status = set_bytes(a.finite, 1, sizeof(bool), rows.stream);
    if (status != kSuccess) return status;
  }
  const Pointers pointers = {a.x, a.residual, a.update, a.out, a.next_weight.data};
  return dispatch_streamed(rows, pointers, [&]<typename S>() {
    return dispatch_optional_weight_of<S>(a.next_weight, [&]<typename W>() {
      return launch_blocks<S>(weighted_scatter_add_kernel<S, W>, a.rows, rows, a);
    });
  });
}

namespace {

Status launch_filler_backward(const Rows& rows, const WeightedScatterAddBackward& a) {
  if (a.slots == 0) return kSuccess;
  constexpr int64_t kSlots = 8;  // of a block
  const auto blocks = static_cast<unsigned>((a.slots + kSlots - 1) / kSlots);
  return dispatch_streamed(rows, {a.grad_update, a.grad_residual}, [&]<typename S>() {
    return launch(filler_backward_kernel<S>, blocks, kSlots * kWarp, rows.stream, false, a,
                  static_cast<int>(rows.hidden));
  });
}

}  // namespace

Status launch_weighted_scatter_add_backward(const Rows& rows,
                                            const WeightedScatterAddBackward& backward) {
  const WeightedScatterAddBackward& a = backward;
  const Pointers pointers = {a.grad_out,      a.x,           a.update,   a.router_weight.data,
                             a.grad_residual, a.grad_update, a.partials, a.grad_x};
  Status status = launch_filler_backward(rows, a);
  if (status != kSuccess) return status;
  if (a.router_weight.data == nullptr) {
    return dispatch_streamed(rows, pointers, [&]<typename S>() {
      return launch_blocks<S>(weighted_scatter_add_backward_kernel<S>, a.rows, rows, a);
    });
  }
  const int64_t partials = parameter_partials(a.rows);
  status = dispatch_summed(rows, pointers, [&]<typename S>() {
    return dispatch_weight_of<S>(a.router_weight, [&]<typename W>() {
      return launch_blocks<S>(weighted_scatter_add_router_backward_kernel<S, W>, partials, rows, a);
    });
  });
  if (status != kSuccess) return status;
  status =
      launch_sum_partials(a.partials, partials, rows.hidden, a.grad_router_weight, rows.stream);
  if (status != kSuccess) return status;
  return launch_sum(a.grad_logits, a.rows, a.grad_router_bias, rows.stream);
}

}  // namespace pmod::cuda
