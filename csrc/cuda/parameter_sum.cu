// Launches of parameter_sum.cuh, and how many partial sums there are.

#include <algorithm>

#include "cuda/launchers.h"
#include "cuda/parameter_sum.cuh"

namespace pmod::cuda {

int64_t parameter_partials(int64_t rows) {
  // One block per partial. At 4 rows its float partial, written and read again, costs a quarter of
  // what the rows do in 16 bits (three read, one written), and few rows still reach many
  // multiprocessors. 256 blocks are about two on each multiprocessor of the largest GPUs, which is
  // all that blocks with a register per element and sum have room for.
  constexpr int64_t kLeastRows = 4, kMost = 256;
  return std::min((rows + kLeastRows - 1) / kLeastRows, kMost);
}

Status launch_sum_partials(const float* partials, int64_t count, int64_t hidden, float* out,
                           Stream stream) {
  if (hidden == 0) return kSuccess;
  const auto grid = static_cast<unsigned>((hidden + kWarp - 1) / kWarp);
  return launch(sum_partials_kernel, grid, kPartialWarps * kWarp, stream, false, partials, count,
                hidden, out);
}

Status launch_sum(const float* values, int64_t rows, float* out, Stream stream) {
  return launch(sum_kernel, 1, kSumThreads, stream, false, values, rows, out);
}

}  // namespace pmod::cuda
