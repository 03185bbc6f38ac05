// How launches are scheduled. Process-wide; from the environment at first use.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <thread>

#include "simt/sanitizers.h"

namespace simt {

struct Options {
  // OS threads that share the blocks of a launch. PMOD_SIMT_THREADS.
  unsigned os_threads = 1;
  // 0: threads, warps and blocks run in order. Else the seed of random orders, another one in every
  // launch: warps run ahead alone or are interleaved at barriers, collectives and atomics.
  // PMOD_SIMT_SEED.
  uint64_t seed = 0;
  // Blocks that a seeded schedule interleaves on one OS thread. PMOD_SIMT_RESIDENT.
  unsigned resident_blocks = 3;

  static Options from_environment() {
    const auto number = [](const char* name, uint64_t otherwise) {
      const char* text = std::getenv(name);
      return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
    };
    const unsigned cores = kThreadSanitizer ? 1 : std::thread::hardware_concurrency();
    return {.os_threads = static_cast<unsigned>(number("PMOD_SIMT_THREADS", cores)),
            .seed = number("PMOD_SIMT_SEED", 0),
            .resident_blocks = static_cast<unsigned>(number("PMOD_SIMT_RESIDENT", 3))};
  }
};

namespace detail {
struct Schedule {
  Options options = Options::from_environment();
  uint64_t launches = 0;  // since the options were set: each launch has an order of its own
};
inline Schedule& schedule() {
  static Schedule schedule;
  return schedule;
}
}  // namespace detail

inline const Options& options() { return detail::schedule().options; }
inline void set_options(const Options& options) {
  detail::schedule() = {.options = options, .launches = 0};
}

// Options for a scope.
class ScopedOptions {
 public:
  explicit ScopedOptions(const Options& options) : before_(simt::options()) {
    set_options(options);
  }
  ~ScopedOptions() { set_options(before_); }
  ScopedOptions(const ScopedOptions&) = delete;
  ScopedOptions& operator=(const ScopedOptions&) = delete;

 private:
  Options before_;
};

// SplitMix64: small, and good enough to shuffle.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15U;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
  // Less than n, which is at most 2^32.
  uint64_t below(uint64_t n) { return ((next() >> 32) * n) >> 32; }

  // One of the set bits of a mask that is not 0.
  unsigned bit_of(uint32_t mask) {
    uint64_t guesses = next();
    for (int i = 0; i < 4; ++i, guesses >>= 5) {
      if ((mask >> (guesses % 32) & 1U) != 0) return guesses % 32;
    }
    for (auto skip = below(std::popcount(mask)); skip > 0; --skip) mask &= mask - 1;
    return std::countr_zero(mask);
  }

 private:
  uint64_t state_;
};

}  // namespace simt
