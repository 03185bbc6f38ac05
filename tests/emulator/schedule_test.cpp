// Seeded schedules bring out what only some orders of execution show, and can be repeated.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace pmod::cuda {
namespace {

// The kernels here race where they are told to leave out a barrier. ThreadSanitizer says so at
// once.
const bool kRaces = simt::kThreadSanitizer;

constexpr int kSeeds = 40;

// Seeds whose schedule makes `action` return false.
template <typename Action>
int failures(Action action) {
  int count = 0;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    const simt::ScopedOptions scope(schedule(seed));
    count += action() ? 0 : 1;
  }
  return count;
}

// Threads read what earlier warps wrote, which holds in order even without the barrier.
__global__ void read_after_write_kernel(int* out, bool wait) {
  PMOD_SHARED(int, value, 256);
  const int t = static_cast<int>(threadIdx.x);
  value[t] = t;
  if (wait) __syncthreads();
  out[t] = t < 64 ? t : value[t - 64] + 64;
}

// Threads read what later warps wrote before the first barrier and overwrite after the second.
__global__ void write_after_read_kernel(int* out, bool wait) {
  PMOD_SHARED(int, value, 256);
  const int t = static_cast<int>(threadIdx.x);
  value[t] = t;
  __syncthreads();
  out[t] = t >= 192 ? t : value[t + 64] - 64;
  if (wait) __syncthreads();
  value[t] = -1;
}

// The same of lanes within a warp.
__global__ void within_warp_kernel(int* out, bool wait) {
  PMOD_SHARED(int, value, 32);
  const int t = static_cast<int>(threadIdx.x);
  value[t] = t;
  if (wait) __syncwarp();
  out[t] = t < 1 ? t : value[t - 1] + 1;
}

bool counts_up(void (*kernel)(int*, bool), unsigned size, bool wait) {
  std::vector<int> out(size, -1);
  run(kernel, 1, size, out.data(), wait);
  for (unsigned i = 0; i < size; ++i) {
    if (out[i] != static_cast<int>(i)) return false;
  }
  return true;
}

void check_barrier(void (*kernel)(int*, bool), unsigned size) {
  CHECK(failures([&] { return counts_up(kernel, size, true); }) == 0);
  {
    const simt::ScopedOptions scope(schedule(0));
    CHECK(counts_up(kernel, size, true));
    CHECK(counts_up(kernel, size, false));  // in order, nothing is seen
  }
  const int caught = failures([&] { return counts_up(kernel, size, false); });
  MESSAGE(caught, " of ", kSeeds, " seeds show it");
  CHECK(caught >= kSeeds / 2);
}

TEST_CASE("a missing barrier between write and read" * doctest::skip(kRaces)) {
  check_barrier(read_after_write_kernel, 256);
}
TEST_CASE("a missing barrier between read and write" * doctest::skip(kRaces)) {
  check_barrier(write_after_read_kernel, 256);
}
TEST_CASE("a missing __syncwarp" * doctest::skip(kRaces)) { check_barrier(within_warp_kernel, 32); }

// Run by itself, with ThreadSanitizer, it must fail.
TEST_CASE("race: a missing barrier" * doctest::skip()) {
  CHECK(counts_up(read_after_write_kernel, 256, false));
}
TEST_CASE("race: a missing barrier before a write" * doctest::skip()) {
  CHECK(counts_up(write_after_read_kernel, 256, false));
}
TEST_CASE("race: a missing __syncwarp" * doctest::skip()) {
  CHECK(counts_up(within_warp_kernel, 32, false));
}

// Counts without an atomic: blocks that are interleaved lose counts.
__global__ void lose_counts_kernel(int* count) {
  if (threadIdx.x != 0) return;
  const int before = *count;
  __threadfence();
  *count = before + 1;
}

// Expects that the block before has written.
__global__ void expect_order_kernel(int* out) {
  if (threadIdx.x == 0) out[blockIdx.x + 1] = out[blockIdx.x] + 1;
}

TEST_CASE("blocks that depend on each other" * doctest::skip(kRaces)) {
  const auto count = [] {
    int count = 0;
    run(lose_counts_kernel, 16, 32, &count);
    return count == 16;
  };
  const auto order = [] {
    std::vector<int> out(17);
    run(expect_order_kernel, 16, 32, out.data());
    return out[16] == 16;
  };
  const simt::ScopedOptions scope(schedule(0));
  CHECK(count());
  CHECK(order());
  const int lost = failures(count);
  const int late = failures(order);
  MESSAGE(lost, " and ", late, " of ", kSeeds, " seeds show it");
  CHECK(lost >= kSeeds / 2);
  CHECK(late >= kSeeds / 2);
}

// Every block writes its part; the last to finish adds up.
__global__ void last_block_kernel(int* parts, unsigned* finished, int* out) {
  PMOD_SHARED(bool, last, 1);
  const int t = static_cast<int>(threadIdx.x);
  parts[blockIdx.x * blockDim.x + t] = t;
  __threadfence();
  __syncthreads();
  if (t == 0) last[0] = atomicAdd(finished, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last[0] || t != 0) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += parts[i];
  *out = sum;
}

TEST_CASE("the last block sees what all others wrote") {
  for (const unsigned os_threads : {1U, 3U}) {
    for (int seed = 0; seed <= 10; ++seed) {
      const simt::ScopedOptions scope(schedule(seed, os_threads));
      std::vector<int> parts(20 * 40);
      unsigned finished = 0;
      int out = 0;
      run(last_block_kernel, 20, 40, parts.data(), &finished, &out);
      CHECK(out == 20 * (40 * 39 / 2));
    }
  }
}

// The order in which threads come by.
__global__ void order_kernel(unsigned* next, int* order) {
  __syncthreads();
  const unsigned place = atomicAdd(next, 1);
  order[place] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

std::vector<int> order_of(unsigned grid, unsigned block) {
  unsigned next = 0;
  std::vector<int> order(grid * block);
  run(order_kernel, grid, block, &next, order.data());
  return order;
}

TEST_CASE("a seed stands for one order, and every thread runs once") {
  for (const unsigned grid : {1U, 2U, 12U, 97U}) {
    std::vector<std::vector<int>> orders;
    for (int seed = 0; seed < 4; ++seed) {
      const simt::ScopedOptions scope(schedule(seed));
      orders.push_back(order_of(grid, 96));
      const std::vector<int> second = order_of(grid, 96);
      CHECK((second == orders.back()) == (seed == 0));  // each launch has its own
      const simt::ScopedOptions again(schedule(seed));
      CHECK(order_of(grid, 96) == orders.back());
    }
    const std::vector<int> in_order = orders[0];
    CHECK(std::is_sorted(in_order.begin(), in_order.end()));
    for (const std::vector<int>& order : orders) {
      CHECK(std::is_permutation(order.begin(), order.end(), in_order.begin()));
    }
    CHECK(orders[1] != orders[2]);
  }
}

}  // namespace
}  // namespace pmod::cuda
