#include "cuda/dispatch.h"
#include "cuda/gather.cuh"

namespace pmod::cuda {

Status launch_gather(const Rows& rows, const Gather& gather) {
  const Pointers pointers = {gather.x, gather.out};
  return dispatch_streamed(rows, pointers, [&]<typename S>() {
    return launch_blocks<S>(gather_kernel<S>, gather.slots, rows, gather);
  });
}

Status launch_gather_backward(const Rows& rows, const GatherBackward& backward) {
  const Pointers pointers = {backward.grad_rows, backward.grad_x};
  return dispatch_streamed(rows, pointers, [&]<typename S>() {
    return launch_blocks<S>(gather_backward_kernel<S>, backward.slots, rows, backward);
  });
}

}  // namespace pmod::cuda
