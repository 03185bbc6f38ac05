// The registry of allowed memory, the bytes it counts, and overlapping launches.

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "kernels.h"

namespace pmod::cuda {
namespace {

template <int kSize>
__global__ void copy_kernel(const float* from, float* to, int64_t shift) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  write<kSize>(to, i, read<kSize>(from + shift, i));
}

__global__ void load_kernel(const uint4* from, unsigned* to, int64_t at) {
  atomicAdd(&to[at], __ldg(from + at).x);
}

__global__ void shared_atomic_kernel() {
  PMOD_SHARED(unsigned, count, 2);
  if (threadIdx.x == 0) count[1] = 0;
  __syncthreads();
  atomicAdd(&count[1], 1);
}

void check_contains(const std::string& text, const std::string& part) {
  INFO(text, "\nmust contain: ", part);
  CHECK(text.find(part) != std::string::npos);
}

struct alignas(16) Words {
  float w[512];
};

TEST_CASE("accesses outside of allowed memory") {
  Words memory[3] = {};  // with a gap
  Words& from = memory[0];
  Words& to = memory[2];
  const auto copy = [&](int64_t shift, unsigned blocks) {
    return error_of([&] { run(copy_kernel<4>, blocks, 32, &from.w[0], &to.w[0], shift); });
  };
  CHECK(copy(0, 4).empty());  // nothing is allowed explicitly, so all is
  const auto x = simt::allow(&from, sizeof(from), false, "x");
  check_contains(copy(0, 4), "out of bounds: writes 16 bytes at ");
  auto out = simt::allow(&to, sizeof(to), false, "out");
  check_contains(copy(0, 4), "\"out\" + 0, which has 2048 bytes and is read-only");
  out = simt::allow(&to, sizeof(to) - 16, true, "out");
  check_contains(copy(0, 4),
                 "block 3, thread 31: out of bounds: writes 16 bytes at \"out\" + 2032");
  CHECK(copy(0, 3).empty());
  check_contains(copy(512 - 384 + 4, 3), "reads 16 bytes at \"x\" + 2048, which has 2048 bytes");
  check_contains(copy(-4, 1), "out of bounds: reads 16 bytes at ");
  check_contains(copy(1, 1), "misaligned: reads 16 bytes at \"x\" + 4");
}

TEST_CASE("read-only loads, atomics and set_bytes are checked too") {
  std::vector<uint4> from(4);
  std::vector<unsigned> to(4);
  const auto x = simt::allow(from.data(), 3 * sizeof(uint4), false, "x");
  const auto out = simt::allow(to.data(), 2 * sizeof(unsigned), true, "out");
  const auto load = [&](int64_t at) {
    return error_of([&] { run(load_kernel, 1, 1, from.data(), to.data(), at); });
  };
  CHECK(load(1).empty());
  check_contains(load(2), "writes 4 bytes at \"out\" + 8");
  check_contains(load(3), "reads 16 bytes at \"x\" + 48");
  CHECK(error_of([&] { run(shared_atomic_kernel, 2, 64); }).empty());

  CHECK(set_bytes(to.data(), 0x11, 8, nullptr) == kSuccess);
  CHECK(to == std::vector<unsigned>{0x11111111, 0x11111111, 0, 0});
  check_contains(error_of([&] { set_bytes(to.data(), 0, 9, nullptr); }),
                 "set_bytes: out of bounds");
  check_contains(error_of([&] { set_bytes(from.data(), 0, 1, nullptr); }), "is read-only");
  check_contains(error_of([&] { set_bytes(to.data(), 0, -1, nullptr); }), "negative");
  CHECK(set_bytes(to.data(), 0, 0, nullptr) == kSuccess);
}

TEST_CASE("bytes read and written are counted by name") {
  for (const simt::Options& options : {schedule(0), schedule(0, 3), schedule(1), schedule(2, 2)}) {
    const simt::ScopedOptions scope(options);
    Words from{};
    Words to{};
    simt::reset_traffic();
    run(copy_kernel<4>, 4, 32, &from.w[0], &to.w[0], 0);
    CHECK(simt::traffic() == simt::Traffic{2048, 2048});
    {
      const auto a = simt::allow(&from.w[0], 1024, false, "x");
      const auto b = simt::allow(&from.w[256], 1024, false, "x");  // one name for two
      const auto c = simt::allow(&to, sizeof(to), true, "out");
      run(copy_kernel<4>, 4, 32, &from.w[0], &to.w[0], 0);
      run(copy_kernel<1>, 2, 32, &from.w[0], &to.w[0], 0);
      set_bytes(&to, 0, 100, nullptr);
    }
    CHECK(simt::traffic("x") == simt::Traffic{2048 + 256, 0});
    CHECK(simt::traffic("out") == simt::Traffic{0, 2048 + 256 + 100});
    CHECK(simt::traffic("other") == simt::Traffic{});
    CHECK(simt::traffic() == simt::Traffic{2 * 2048 + 256, 2 * 2048 + 256 + 100});
    simt::reset_traffic();
    CHECK(simt::traffic() == simt::Traffic{});
    CHECK(simt::traffic("x") == simt::Traffic{});
  }
}

__global__ void overlapping_kernel(const float* from, float* to, bool wait) {
  if (wait) wait_for_predecessor();
  write<1>(to, threadIdx.x, read<1>(from, threadIdx.x));
  let_successor_start();
}

TEST_CASE("a kernel that overlaps waits before it touches memory") {
  const std::vector<float> from(32, 3.0F);
  std::vector<float> to(32);
  const auto error = [&](bool overlap, bool wait) {
    return error_of(
        [&] { launch(overlapping_kernel, 1, 32, nullptr, overlap, from.data(), to.data(), wait); });
  };
  CHECK(error(false, false).empty());
  CHECK(error(true, true).empty());
  CHECK(to == from);
  check_contains(error(true, false), "accesses memory before wait_for_predecessor()");
}

}  // namespace
}  // namespace pmod::cuda
