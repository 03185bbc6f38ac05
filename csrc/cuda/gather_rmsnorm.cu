#include "cuda/dispatch.h"
#include "cuda/gather_rmsnorm.cuh"

namespace pmod::cuda {

Status launch_gather_rmsnorm(const Rows& rows, const GatherRmsnorm& gather) {
  const Pointers pointers = {gather.x, gather.weight.data, gather.out};
  return dispatch_streamed(rows, pointers, [&]<typename S>() {
    return dispatch_weight_of<S>(gather.weight, [&]<typename W>() {
      return launch_blocks<S>(gather_rmsnorm_kernel<S, W>, gather.slots, rows, gather,
                              gather.after_select);
    });
  });
}

}  // namespace pmod::cuda
