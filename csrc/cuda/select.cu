// Launches of select.cuh, and the choice between it and select_long.cu.

#include "cuda/select.cuh"

namespace pmod::cuda {
namespace {

template <int kThreads, int kItems>
Status launch_one_block(const Gate& gate, const Select& select, Stream stream) {
  const auto run = [&](auto kernel) {
    return launch(kernel, static_cast<unsigned>(select.sequences), kThreads, stream, false, gate,
                  select);
  };
  return select.pool_id != nullptr ? run(select_kernel<kThreads, kItems, true>)
                                   : run(select_kernel<kThreads, kItems, false>);
}

}  // namespace

Status launch_select(const Gate& gate, const Select& select, Stream stream) {
  if (select.sequences == 0) {
    return select.slots == 0
               ? kSuccess
               : set_bytes(select.index, 0xFF, select.slots * int64_t{sizeof(int32_t)}, stream);
  }
  if (select.max_length <= 256 * 4) return launch_one_block<256, 4>(gate, select, stream);
  if (select.max_length <= 1024 * 4) return launch_one_block<1024, 4>(gate, select, stream);
  static_assert(kOneBlockRows == 1024 * 16);
  if (select.max_length <= kOneBlockRows) return launch_one_block<1024, 16>(gate, select, stream);
  return launch_select_long(gate, select, stream);
}

}  // namespace pmod::cuda
