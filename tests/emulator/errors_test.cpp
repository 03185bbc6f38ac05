// Kernels that break the rules of CUDA are found out, and the emulator is of use afterwards.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace pmod::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFU;

std::atomic<int> alive = 0;  // objects on the stacks of threads
struct Counted {
  Counted() { ++alive; }
  ~Counted() { --alive; }
};

enum class Wrong {
  kNothing,
  kTwoBarriers,
  kExitBeforeBarrier,
  kExitBeforeCollective,
  kBarrierInWarp,
  kTwoCollectives,
  kTwoMasks,
  kNotInMask,
  kNoSuchLane,
  kWidth,
};

__global__ void wrong_kernel(Wrong wrong, int* out) {
  const Counted counted;
  const unsigned t = threadIdx.x;
  switch (wrong) {
    case Wrong::kNothing:
      break;
    case Wrong::kTwoBarriers:
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Wrong::kExitBeforeBarrier:
      if (t == 40) return;
      __syncthreads();
      break;
    case Wrong::kExitBeforeCollective:
      if (t == 3) return;
      __shfl_sync(kAll, 1, 0);
      break;
    case Wrong::kBarrierInWarp:
      if (t % 32 == 4) __syncthreads();
      __syncwarp();
      break;
    case Wrong::kTwoCollectives:
      if (t % 32 < 16) {
        __any_sync(kAll, 1);
      } else {
        __all_sync(kAll, 1);
      }
      break;
    case Wrong::kTwoMasks:
      __ballot_sync(t % 32 < 16 ? kAll : kAll << 1, 1);
      break;
    case Wrong::kNotInMask:
      __ballot_sync(0xFFFF, 1);
      break;
    case Wrong::kNoSuchLane:
      __ballot_sync(kAll, 1);
      break;
    case Wrong::kWidth:
      __shfl_sync(kAll, 1, 0, 12);
      break;
  }
  out[blockIdx.x * blockDim.x + t] = 1;
}

void check_error(Wrong wrong, unsigned block, const std::vector<std::string>& expected) {
  for (const uint64_t seed : {0, 1, 2, 3}) {
    for (const unsigned os_threads : {1U, 2U}) {
      const simt::ScopedOptions scope(schedule(seed, os_threads));
      constexpr unsigned kBlocks = 5;
      std::vector<int> out(kBlocks * block);
      const auto launch_it = [&](Wrong what) {
        run(wrong_kernel, kBlocks, block, what, out.data());
      };
      const std::string error = error_of([&] { launch_it(wrong); });
      for (const std::string& part : expected) {
        INFO(error);
        CHECK(error.find(part) != std::string::npos);
      }
      CHECK(alive == 0);
      launch_it(Wrong::kNothing);
      CHECK(out == std::vector<int>(out.size(), 1));
    }
  }
}

TEST_CASE("errors name the kernel, the block, the thread and the place") {
  check_error(Wrong::kTwoBarriers, 64,
              {"launched in ", "kernels.h:", ": block ", "thread ", "divergent barrier",
               "errors_test.cpp:"});
}
TEST_CASE("threads exit before a barrier") {
  check_error(Wrong::kExitBeforeBarrier, 64, {"divergent barrier: thread ", "40 has exited"});
}
TEST_CASE("a lane exits before a collective") {
  check_error(Wrong::kExitBeforeCollective, 32, {"deadlock: thread ", "but thread 3 has exited"});
}
TEST_CASE("a barrier within a warp") {
  check_error(Wrong::kBarrierInWarp, 64,
              {"deadlock: thread 0 is at the collective", "but thread 4 is at the barrier of"});
}
TEST_CASE("lanes of a warp at different collectives") {
  check_error(Wrong::kTwoCollectives, 64,
              {"deadlock: thread 0 is at the collective", "but thread 16 is at the collective"});
}
TEST_CASE("lanes of a warp with different masks") {
  check_error(Wrong::kTwoMasks, 64,
              {"deadlock: thread 0 is at", "0xffffffff", "but thread 16 is at", "0xfffffffe"});
}
TEST_CASE("a lane that is not in its own mask") {
  check_error(Wrong::kNotInMask, 32, {"the mask 0xffff of", "does not name the lane itself"});
}
TEST_CASE("a mask of lanes that do not exist") {
  check_error(Wrong::kNoSuchLane, 20, {"the mask 0xffffffff of", "names lanes that do not exist"});
}
TEST_CASE("the width of a shuffle") {
  check_error(Wrong::kWidth, 32, {"width of a shuffle must be a power of two"});
}

__global__ void nothing_kernel() {}
__global__ void launching_kernel() { launch(nothing_kernel, 1, 1, nullptr, false); }

TEST_CASE("launches that cannot be") {
  for (const auto& [grid, block] :
       std::vector<std::pair<unsigned, unsigned>>{{0, 32}, {1, 0}, {1, 1025}, {1U << 31, 32}}) {
    const std::string error = error_of([&, g = grid, b = block] { run(nothing_kernel, g, b); });
    CHECK(error.find("cannot be launched") != std::string::npos);
  }
  CHECK(error_of([] { run(nothing_kernel, 3, 7); }).empty());
  CHECK(error_of([] { run(launching_kernel, 1, 1); }).find("cannot launch another") !=
        std::string::npos);
  CHECK(error_of([] { __syncthreads(); }).find("in a kernel only") != std::string::npos);
}

// What lies beside an array is another's: not instrumented, to go there under AddressSanitizer too.
__attribute__((no_sanitize("address", "undefined"))) __global__ void beside_kernel(bool floats,
                                                                                   int at) {
  PMOD_SHARED(float, first, 5);
  PMOD_SHARED(uint8_t, second, 7);
  volatile float* const numbers = first;
  volatile uint8_t* const bytes = second;
  if (threadIdx.x == 0) {
    if (floats) {
      numbers[at] = 1.0F;
    } else {
      bytes[at] = 1;
    }
  }
}

TEST_CASE("writes beside a shared array") {
  const auto error = [](bool floats, int at) {
    return error_of([&] { run(beside_kernel, 3, 32, floats, at); });
  };
  for (const int at : {0, 4}) CHECK(error(true, at).empty());
  for (const int at : {0, 6}) CHECK(error(false, at).empty());
  const std::string found = "shared memory was written ";
  for (const int at : {5, 8, 20}) {
    CHECK(error(true, at).find(found + "beyond the end of first") != std::string::npos);
  }
  for (const int at : {7, 8, 70}) {
    CHECK(error(false, at).find(found + "beyond the end of second") != std::string::npos);
  }
  CHECK(error(true, -1).find(found + "before first") != std::string::npos);
  CHECK(error(false, -1).find(found + "before second") != std::string::npos);
}

__global__ void too_much_kernel() {
  PMOD_SHARED(float, some, 8192);
  PMOD_SHARED(float, more, 4097);
  some[0] = more[0] = 0.0F;
}

TEST_CASE("more shared memory than a block has") {
  CHECK(error_of([] { run(too_much_kernel, 1, 1); }).find("no space for more of 16388 bytes") !=
        std::string::npos);
}

__global__ void unwritten_kernel(float* number, uint16_t* half, double* wide, int* integer) {
  PMOD_SHARED(float, numbers, 33);
  PMOD_SHARED(uint16_t, halves, 33);
  PMOD_SHARED(double, doubles, 33);
  PMOD_SHARED(int, integers, 33);
  const unsigned t = threadIdx.x;
  const unsigned i = blockIdx.x * blockDim.x + t;
  number[i] = numbers[t];
  half[i] = halves[t];
  wide[i] = doubles[t];
  integer[i] = integers[t];
  numbers[t] = 1.0F;  // must be gone in the next block
}

TEST_CASE("shared memory that was never written is not a number") {
  std::vector<float> number(66);
  std::vector<uint16_t> half(66);
  std::vector<double> wide(66);
  std::vector<int> integer(66);
  run(unwritten_kernel, 2, 33, number.data(), half.data(), wide.data(), integer.data());
  for (int i = 0; i < 66; ++i) {
    CHECK(std::isnan(number[i]));
    CHECK(std::isnan(unpack_f16(half[i]).x));
    CHECK(std::isnan(__uint_as_float(static_cast<uint32_t>(half[i]) << 16)));
    CHECK(std::isnan(wide[i]));
    CHECK(integer[i] > 2'000'000'000);
  }
}

}  // namespace
}  // namespace pmod::cuda
