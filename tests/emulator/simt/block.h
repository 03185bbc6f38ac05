// The state of a launch, of its blocks, and of their warps and threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <source_location>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/options.h"
#include "simt/registry.h"
#include "simt/shared.h"

struct uint3 {
  unsigned x, y, z;
};

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

using Place = std::source_location;

// The same line of source, if maybe in another instantiation or file that includes it.
inline bool same_place(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

inline std::string to_string(const Place& place) {
  return std::string(place.file_name()) + ":" + std::to_string(place.line());
}

// What a collective of a warp does with the values of its lanes.
enum class Operation : uint8_t {
  kSyncWarp,
  kShuffle,
  kBallot,
  kAny,
  kAll,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kMatchAny,
};

enum class State : uint8_t { kReady, kAtCollective, kAtBarrier, kDone };

class Engine;
struct Block;
struct Warp;

// For ThreadSanitizer. Two in turn: who is early at the next meeting is not seen by who is late at
// leaving this one, and cannot be early by two.
class Events {
 public:
  void* current() { return &event_[meetings_ % 2]; }
  void next() { ++meetings_; }

 private:
  char event_[2]{};
  unsigned meetings_ = 0;
};

struct Thread {
  Fiber fiber;
  uint3 index;  // threadIdx
  Block* block;
  Warp* warp;
  unsigned lane;
  State state;
  bool started;  // has something on its stack
  bool waited;   // has called wait_for_predecessor, or need not
  // Of the collective or barrier that it waits at.
  Operation operation;
  uint32_t mask;
  unsigned source;  // lane to read from
  uint64_t value;   // that it brings, then that it takes away
  Place place;
  size_t range_hint;  // the allowed memory that it accessed last
  Events events;      // of every __syncwarp whose first lane it is
};

struct Warp {
  Thread* threads;     // of its lanes
  uint32_t lanes;      // that exist
  uint32_t ready;      // that can run
  uint32_t collected;  // that wait at a collective
};

// What all threads told a barrier.
struct Votes {
  bool any = false, all = true;
  int count = 0;
};

struct Launch {
  void (*call)(const void*);  // calls the kernel with its arguments
  const void* arguments;
  uint3 grid, block;
  bool overlap;
  unsigned resident_blocks;
  uint64_t seed;            // 0: in order
  uint64_t stride, offset;  // of the order of blocks

  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;  // of what follows
  std::string error;
};

struct Block {
  uint3 index;  // blockIdx
  Launch* launch = nullptr;
  Engine* engine = nullptr;  // that runs it
  unsigned size = 0;         // threads
  unsigned done = 0, at_barrier = 0;
  uint32_t ready_warps = 0;
  Place barrier;        // that the first of at_barrier waits at
  Events events;        // of its barriers
  Votes votes, result;  // being collected; of the last barrier
  Random random;
  unsigned run_ahead = 0;  // seeded: the chance, of 8, that a warp goes on alone
  SharedMemory shared;
  std::vector<Traffic>* tally = nullptr;  // of the engine
  std::array<Warp, kMaxThreads / kWarpSize> warps{};
  std::unique_ptr<Thread[]> threads = std::make_unique<Thread[]>(kMaxThreads);

  // In a seeded schedule: whether a warp goes on alone.
  bool runs_ahead() { return random.below(8) < run_ahead; }

  void begin(Launch& of, unsigned number, const Stacks& stacks, unsigned first_stack,
             void (*entry)()) {
    launch = &of;
    index = {number, 0, 0};
    size = launch->block.x;
    done = at_barrier = ready_warps = 0;
    votes = {};
    random = Random(launch->seed ^ (number + 1) * 0xD1B54A32D192ED03U);
    run_ahead = static_cast<unsigned>(random.below(9));
    shared.reset();
    for (unsigned i = 0; i < size; ++i) {
      Thread& thread = threads[i];
      Warp& warp = warps[i / kWarpSize];
      thread.index = {i, 0, 0};
      thread.block = this;
      thread.warp = &warp;
      thread.lane = i % kWarpSize;
      thread.state = State::kReady;
      thread.started = false;
      thread.waited = !launch->overlap;
      thread.fiber.prepare(stacks.bottom(first_stack + i), i, entry);
    }
    for (unsigned w = 0; w * kWarpSize < size; ++w) {
      const unsigned lanes = std::min(kWarpSize, size - w * kWarpSize);
      const uint32_t all = static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
      warps[w] = {&threads[w * kWarpSize], all, all, 0};
      ready_warps |= 1U << w;
    }
  }

  // Everyone has arrived at the barrier.
  void release_barrier() {
    result = votes;
    votes = {};
    at_barrier = 0;
    events.next();
    for (unsigned i = 0; i < size; ++i) threads[i].state = State::kReady;
    for (unsigned w = 0; w * kWarpSize < size; ++w) {
      warps[w].ready = warps[w].lanes;
      ready_warps |= 1U << w;
    }
  }
};

// The CUDA thread that runs on this OS thread; null in the scheduler and outside of launches.
inline constinit thread_local Thread* current = nullptr;

}  // namespace simt
