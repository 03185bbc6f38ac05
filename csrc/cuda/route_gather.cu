#include "cuda/dispatch.h"
#include "cuda/route_gather.cuh"

namespace pmod::cuda {

Status launch_readers_backward(const Rows& rows, const ReadersBackward& backward) {
  const ReadersBackward& a = backward;
  const bool routes = a.grad_router_weight != nullptr, normalises = a.norm_weight.data != nullptr;
  // without rows there is nothing to visit, and vectors of rows may be null because they are empty
  const int64_t visited = a.inverse != nullptr ? a.rows : a.slots;
  const int64_t partials = a.rows == 0 ? 0 : parameter_partials(visited);
  const Parameter router_weight = routes ? a.router_weight : Parameter{};
  const Pointers pointers = {a.x,        a.grad_rows,        a.grad_kept,       a.grad_x,
                             a.partials, router_weight.data, a.norm_weight.data};
  Status status = dispatch_summed(rows, pointers, [&]<typename S>() {
    return dispatch_optional_weight_of<S>(router_weight, [&]<typename RouterW>() {
      return dispatch_optional_weight_of<S>(a.norm_weight, [&]<typename NormW>() {
        return launch_blocks<S>(readers_backward_kernel<S, RouterW, NormW>, partials, rows, a);
      });
    });
  });
  const float* norm_partials = a.partials + (routes ? partials * rows.hidden : 0);
  if (status == kSuccess && routes) {
    status =
        launch_sum_partials(a.partials, partials, rows.hidden, a.grad_router_weight, rows.stream);
  }
  if (status == kSuccess && routes) {
    status = launch_sum(a.grad_logits, a.rows, a.grad_router_bias, rows.stream);
  }
  if (status == kSuccess && normalises) {
    status =
        launch_sum_partials(norm_partials, partials, rows.hidden, a.grad_norm_weight, rows.stream);
  }
  return status;
}

}  // namespace pmod::cuda
