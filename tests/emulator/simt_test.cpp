// What kernels compute in the emulator: barriers, collectives, shared memory and atomics.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/device.cuh"
#include "kernels.h"

namespace pmod::cuda {
namespace {

// Orders of execution that must not change any result.
const std::vector<simt::Options> kSchedules = {schedule(0),    schedule(0, 3), schedule(1),
                                               schedule(2),    schedule(3),    schedule(4),
                                               schedule(5, 3), schedule(6, 2)};

// ThreadSanitizer's work at a barrier grows with the square of the number of threads.
const std::vector<int> kSizes =
    simt::kThreadSanitizer ? std::vector{1, 33, 160} : std::vector{1, 31, 32, 33, 256, 1000, 1024};

__global__ void rotate_kernel(int* out, int rounds) {
  PMOD_SHARED(int, value, 1024);
  value[threadIdx.x] = static_cast<int>(threadIdx.x);
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    const int next = value[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
    value[threadIdx.x] = next;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = value[threadIdx.x];
}

TEST_CASE("barriers order what the threads of a block do") {
  for (const simt::Options& options : kSchedules) {
    const simt::ScopedOptions scope(options);
    for (const int size : kSizes) {
      constexpr int kBlocks = 5;
      constexpr int kRounds = 7;
      std::vector<int> out(kBlocks * size, -1);
      run(rotate_kernel, kBlocks, size, out.data(), kRounds);
      int wrong = 0;
      for (int i = 0; i < kBlocks * size; ++i) wrong += out[i] != (i % size + kRounds) % size;
      CHECK(wrong == 0);
    }
  }
}

__global__ void votes_kernel(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  const int any = __syncthreads_or(t == 77);
  const int none = __syncthreads_or(t < 0);
  const int all = __syncthreads_and(t >= 0);
  const int most = __syncthreads_and(t != 5);
  const int even = __syncthreads_count(t % 2 == 0);
  out[t] = any + 2 * none + 4 * all + 8 * most + 16 * even;
}

TEST_CASE("barriers that count votes") {
  for (const simt::Options& options : kSchedules) {
    const simt::ScopedOptions scope(options);
    std::vector<int> out(100);
    run(votes_kernel, 1, 100, out.data());
    CHECK(std::count(out.begin(), out.end(), 1 + 4 + 16 * 50) == 100);
  }
}

template <typename T>
__global__ void shuffles_kernel(T* out, int width, int step) {
  const T own = T(threadIdx.x) + T(1000);
  T* to = out + 4 * threadIdx.x;
  to[0] = __shfl_sync(kAllLanes, own, step, width);
  to[1] = __shfl_xor_sync(kAllLanes, own, step, width);
  to[2] = __shfl_up_sync(kAllLanes, own, step, width);
  to[3] = __shfl_down_sync(kAllLanes, own, step, width);
}

TEST_CASE_TEMPLATE("shuffles", T, int, unsigned, float, double, long long) {
  const simt::ScopedOptions scope(schedule(1));
  for (const int width : {1, 2, 4, 8, 16, 32}) {
    for (int step = 0; step < 32; ++step) {
      std::vector<T> out(256);
      run(shuffles_kernel<T>, 1, 64, out.data(), width, step);
      for (int t = 0; t < 64; ++t) {
        const int first = t / width * width;
        const int end = first + width;
        const int partner = t ^ step;
        const auto check = [&](int which, int lane) {
          if (out[4 * t + which] != T(lane) + T(1000)) FAIL("shuffle ", which, " of lane ", t);
        };
        check(0, first + step % width);
        check(1, partner < end ? partner : t);
        check(2, t - step >= first ? t - step : t);
        check(3, t + step < end ? t + step : t);
      }
    }
  }
}

__global__ void collectives_kernel(unsigned* out) {
  const unsigned t = threadIdx.x;
  const unsigned lane = t % 32;
  unsigned* to = out + 8 * t;
  if (lane < 12) {  // a part of the warp, apart from the rest
    constexpr unsigned kPart = 0xFFF;
    to[0] = __ballot_sync(kPart, lane % 3 == 0);
    to[1] = __any_sync(kPart, lane == 13) + 2 * __any_sync(kPart, lane == 11);
    to[2] = __all_sync(kPart, lane < 12) + 2 * __all_sync(kPart, lane != 11);
  } else {
    constexpr unsigned kRest = ~0xFFFU;
    to[0] = __reduce_add_sync(kRest, lane);
    to[1] = __reduce_min_sync(kRest, lane ^ 1);
    to[2] = __reduce_max_sync(kRest, lane ^ 1);
  }
  __syncwarp();
  to[3] = __match_any_sync(kAllLanes, lane % 5);
}

TEST_CASE("votes, reductions and parts of warps") {
  for (const simt::Options& options : kSchedules) {
    const simt::ScopedOptions scope(options);
    std::vector<unsigned> out(8 * 96);
    run(collectives_kernel, 1, 96, out.data());
    for (unsigned t = 0; t < 96; ++t) {
      const unsigned* got = &out[8 * t];
      CHECK(got[0] == (t % 32 < 12 ? 0x249U : (12 + 31) * 10U));
      CHECK(got[1] == (t % 32 < 12 ? 2U : 12U));
      CHECK(got[2] == (t % 32 < 12 ? 1U : 31U));
      unsigned same = 0;
      for (unsigned lane = t % 32 % 5; lane < 32; lane += 5) same |= 1U << lane;
      CHECK(got[3] == same);
    }
  }
}

// The odd ones among `values`, in order, and how many there are.
__global__ void compact_kernel(const int* values, int n, int* out, unsigned* count) {
  PMOD_SHARED(int, before, 33);
  const int t = static_cast<int>(threadIdx.x);
  const int lane = t % kWarp;
  const int warp = t / kWarp;
  const bool odd = t < n && values[t] % 2 != 0;
  const unsigned ballot = __ballot_sync(kAllLanes, odd);
  if (lane == 0) before[warp + 1] = __popc(ballot);
  __syncthreads();
  if (t == 0) {
    before[0] = 0;
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) before[w + 1] += before[w];
  }
  __syncthreads();
  if (odd) {
    out[before[warp] + __popc(ballot & ((1U << lane) - 1))] = values[t];
    atomicAdd(count, 1);
  }
}

TEST_CASE("a scan over a block, and atomics") {
  for (const simt::Options& options : kSchedules) {
    const simt::ScopedOptions scope(options);
    for (const int n : {1, 100, 512}) {
      std::vector<int> values(n);
      std::vector<int> odd;
      for (int i = 0; i < n; ++i) {
        values[i] = i * i % 1013;
        if (values[i] % 2 != 0) odd.push_back(values[i]);
      }
      std::vector<int> out(n);
      unsigned count = 0;
      run(compact_kernel, 1, 512, values.data(), n, out.data(), &count);
      out.resize(odd.size());
      CHECK(out == odd);
      CHECK(count == odd.size());
    }
  }
}

__global__ void atomics_kernel(unsigned long long* sum, int* least, int* greatest, unsigned* bits,
                               unsigned* tickets) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(sum, i);
  atomicMin(least, i - 10);
  atomicMax(greatest, i);
  atomicOr(bits, 1U << (i % 20));
  unsigned seen = 0;
  while (atomicCAS(&tickets[seen], 0, i + 1) != 0) ++seen;
}

TEST_CASE("atomics of several blocks") {
  constexpr unsigned kBlock = simt::kThreadSanitizer ? 8 : 48;
  constexpr unsigned kThreads = 8 * kBlock;
  for (const simt::Options& options : kSchedules) {
    const simt::ScopedOptions scope(options);
    unsigned long long sum = 0;
    int least = 0;
    int greatest = 0;
    unsigned bits = 0;
    std::vector<unsigned> tickets(kThreads);
    run(atomics_kernel, 8, kBlock, &sum, &least, &greatest, &bits, tickets.data());
    CHECK(sum == kThreads * (kThreads - 1) / 2);
    CHECK(least == -10);
    CHECK(greatest == static_cast<int>(kThreads) - 1);
    CHECK(bits == 0xFFFFF);
    std::sort(tickets.begin(), tickets.end());
    std::vector<unsigned> each(tickets.size());
    std::iota(each.begin(), each.end(), 1U);
    CHECK(tickets == each);
  }
}

template <typename T>
concept AddsAtomically = requires(T* at) { atomicAdd(at, T(1)); };
static_assert(AddsAtomically<unsigned> && !AddsAtomically<float> && !AddsAtomically<double>);

__global__ void block_sum_kernel(const float* values, float* out) {
  PMOD_SHARED(float, scratch, kWarp);
  const float* row = values + blockIdx.x * blockDim.x;
  const float first = block_sum(row[threadIdx.x], scratch);
  const float second = block_sum(row[threadIdx.x] + 1.0F, scratch);
  out[blockIdx.x * blockDim.x + threadIdx.x] = first + second;
}

TEST_CASE("block_sum of device.cuh") {
  for (const simt::Options& options : kSchedules) {
    const simt::ScopedOptions scope(options);
    for (const int size : {32, 64, simt::kThreadSanitizer ? 256 : 1024}) {
      std::vector<float> values(4 * size);
      for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 11);
      std::vector<float> out(4 * size);
      run(block_sum_kernel, 4, size, values.data(), out.data());
      for (int b = 0; b < 4; ++b) {
        const auto row = values.begin() + b * size;
        const float sum = 2 * std::accumulate(row, row + size, 0.0F) + static_cast<float>(size);
        CHECK(std::count(out.begin() + b * size, out.begin() + (b + 1) * size, sum) == size);
      }
    }
  }
}

}  // namespace
}  // namespace pmod::cuda
