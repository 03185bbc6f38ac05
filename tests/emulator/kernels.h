// What the tests of the emulator share.
#pragma once

#include <doctest.h>

#include <exception>
#include <string>

#include "cuda/platform.h"

namespace pmod::cuda {

// Launches on the one stream there is.
template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), unsigned grid, unsigned block,
         const Arguments&... arguments) {
  const Status status = launch(kernel, grid, block, nullptr, false, arguments...);
  CHECK(status == kSuccess);
}

// What `action` throws says; empty if it throws nothing.
template <typename Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

// An in-order schedule, or a seeded one, on so many OS threads.
inline simt::Options schedule(uint64_t seed, unsigned os_threads = 1) {
  return {.os_threads = os_threads, .seed = seed, .resident_blocks = 3};
}

}  // namespace pmod::cuda
