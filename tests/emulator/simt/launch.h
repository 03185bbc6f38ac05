// Launches: the blocks of a kernel, shared out to OS threads.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "simt/engine.h"

namespace simt {

// Blocks of a launch. Made from a number where launch() is called, it knows that place.
struct Grid {
  unsigned blocks;
  Place place;

  Grid(unsigned blocks, Place place = Place::current())  // NOLINT(google-explicit-constructor)
      : blocks(blocks), place(place) {}
};

// The kernel's name if the linker knows it, and where it was launched.
inline std::string name_of(const void* kernel, const Place& place) {
  std::string name = "kernel";
  Dl_info info{};
  if (dladdr(kernel, &info) != 0 && info.dli_saddr == kernel && info.dli_sname != nullptr) {
    char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    name += std::string(" ") + (demangled != nullptr ? demangled : info.dli_sname);
    std::free(demangled);
  }
  return name + ", launched in " + place.function_name() + " at " + to_string(place);
}

// Kept for their stacks. One launch at a time uses them.
struct Engines {
  std::mutex mutex;
  std::vector<std::unique_ptr<Engine>> engines;
};
inline Engines& engines() {
  static Engines engines;
  return engines;
}

// A permutation of the blocks: number i is i * stride + offset, modulo their number.
inline void shuffle_blocks(Launch& launch, Random& random) {
  launch.stride = 1;
  launch.offset = 0;
  if (launch.seed == 0) return;
  launch.offset = random.below(launch.grid.x);
  do {
    launch.stride = 1 + random.below(launch.grid.x);
  } while (std::gcd(launch.stride, uint64_t{launch.grid.x}) != 1);
}

// Runs all blocks. What went wrong first is in launch.error.
inline void run(Launch& launch) {
  if (current != nullptr) throw std::runtime_error("simt: a kernel cannot launch another");
  if (launch.grid.x == 0 || launch.grid.x > 0x7FFFFFFFU || launch.block.x == 0 ||
      launch.block.x > kMaxThreads) {
    launch.error = "a grid of " + std::to_string(launch.grid.x) + " blocks of " +
                   std::to_string(launch.block.x) + " threads cannot be launched";
    return;
  }
  Engines& all = engines();
  const std::lock_guard lock(all.mutex);
  detail::Schedule& schedule = detail::schedule();
  Random random(schedule.options.seed + 0xD1B54A32D192ED03U * ++schedule.launches);
  launch.seed = schedule.options.seed == 0 ? 0 : random.next() | 1U;
  shuffle_blocks(launch, random);
  unsigned resident = launch.seed == 0 ? 1 : std::clamp(schedule.options.resident_blocks, 1U, 32U);
  unsigned workers = std::max(schedule.options.os_threads, 1U);
  if (kThreadSanitizer) {  // it knows 8,128 threads at most, and every fiber is one
    resident = std::clamp(2048 / launch.block.x, 1U, resident);
    workers = std::min(workers, 3U);
  }
  launch.resident_blocks = std::min(resident, launch.grid.x);
  workers = std::min(workers, launch.grid.x);
  while (all.engines.size() < workers) all.engines.push_back(std::make_unique<Engine>());
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < workers; ++i) {
    threads.emplace_back([&, i] { all.engines[i]->run(launch, i); });
  }
  all.engines[0]->run(launch, 0);
  for (std::thread& thread : threads) thread.join();
  for (unsigned i = 0; i < workers; ++i) detail::registry().count(all.engines[i]->tally());
}

// Runs a kernel to its end. Throws a std::runtime_error if it did something it must not.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const Grid& grid, unsigned block, bool overlap,
            std::type_identity_t<Parameters>... parameters) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {parameters...}};
  Launch launch{};
  launch.call = [](const void* what) {
    const auto* call = static_cast<const Call*>(what);
    std::apply(call->kernel, call->arguments);
  };
  launch.arguments = &call;
  launch.grid = {grid.blocks, 1, 1};
  launch.block = {block, 1, 1};
  launch.overlap = overlap;
  run(launch);
  if (!launch.error.empty()) {
    throw std::runtime_error(name_of(reinterpret_cast<const void*>(kernel), grid.place) + ": " +
                             launch.error);
  }
}

// As the kernel that sets memory would: checked and counted.
inline void set_bytes(void* to, int value, int64_t bytes) {
  if (bytes < 0) throw std::runtime_error("set_bytes: a negative number of bytes");
  detail::Registry& registry = detail::registry();
  const size_t size = static_cast<size_t>(bytes);
  std::vector<Traffic> tally(registry.size() + 1);
  const size_t range = registry.find(to, size, true, 0);
  if (registry.size() != 0 && range == registry.size()) {
    throw std::runtime_error("set_bytes: out of bounds: " + registry.describe(to, size, true));
  }
  if (size != 0) std::memset(to, value, size);
  tally[range].written += bytes;
  registry.count(tally);
}

}  // namespace simt
