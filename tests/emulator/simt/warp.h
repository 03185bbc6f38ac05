// Collectives: of the lanes of a warp that a mask names, and barriers of a block.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "simt/engine.h"

namespace simt {

inline Thread& this_thread() {
  if (current == nullptr) throw std::runtime_error("simt: this can be called in a kernel only");
  return *current;
}

// What the lanes of a mask bring to a collective. Other entries hold nothing.
using Brought = std::array<uint64_t, kWarpSize>;

// The result that all lanes share, of the operations that have one.
inline uint32_t common_result(const Brought& brought, uint32_t mask, Operation operation) {
  uint32_t ballot = 0;
  uint32_t sum = 0;
  uint32_t least = ~0U;
  uint32_t greatest = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    const auto value = static_cast<uint32_t>(brought[lane]);
    if (value != 0) ballot |= 1U << lane;
    sum += value;
    least = std::min(least, value);
    greatest = std::max(greatest, value);
  }
  switch (operation) {
    case Operation::kBallot:
      return ballot;
    case Operation::kAny:
      return ballot != 0 ? 1 : 0;
    case Operation::kAll:
      return ballot == mask ? 1 : 0;
    case Operation::kReduceAdd:
      return sum;
    case Operation::kReduceMin:
      return least;
    case Operation::kReduceMax:
      return greatest;
    default:
      return 0;
  }
}

// Lanes of the mask that brought the same as `lane`.
inline uint32_t matching(const Brought& brought, uint32_t mask, unsigned lane) {
  uint32_t same = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const unsigned other = __builtin_ctz(rest);
    if (brought[other] == brought[lane]) same |= 1U << other;
  }
  return same;
}

// All lanes of the mask are here: gives each its result, and they can go on.
inline void resolve(Warp& warp, uint32_t mask, Operation operation) {
  // What a lane outside of the mask holds is undefined.
  constexpr uint64_t kUndefined = SharedMemory::kUnwritten * uint64_t{0x100000001};
  Brought brought;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    brought[lane] = warp.threads[lane].value;
  }
  const bool shuffle = operation == Operation::kShuffle;
  const uint32_t common = shuffle ? 0 : common_result(brought, mask, operation);
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    Thread& thread = warp.threads[__builtin_ctz(rest)];
    thread.state = State::kReady;
    if (shuffle) {
      thread.value = (mask >> thread.source & 1U) != 0 ? brought[thread.source] : kUndefined;
    } else if (operation == Operation::kMatchAny) {
      thread.value = matching(brought, mask, thread.lane);
    } else {
      thread.value = common;
    }
  }
  warp.ready |= mask;
  warp.collected &= ~mask;
}

// Whether every lane of the mask waits at a collective like that of `me`.
inline bool complete(const Thread& me) {
  const Warp& warp = *me.warp;
  if ((warp.collected & me.mask) != me.mask) return false;
  for (uint32_t rest = me.mask; rest != 0; rest &= rest - 1) {
    const Thread& other = warp.threads[__builtin_ctz(rest)];
    if (other.mask != me.mask || other.operation != me.operation) return false;
  }
  return true;
}

// Brings `value`, waits for the lanes of the mask and returns what the operation gives this lane.
inline uint64_t collective(Operation operation, uint32_t mask, uint64_t value, unsigned source,
                           const Place& place) {
  const Unwatched quiet;
  Thread& me = this_thread();
  Warp& warp = *me.warp;
  const uint32_t bit = 1U << me.lane;
  if ((mask & bit) == 0 || (mask & ~warp.lanes) != 0) {
    std::ostringstream text;
    text << "the mask 0x" << std::hex << mask << " of the collective of " << to_string(place)
         << ((mask & bit) == 0 ? " does not name the lane itself"
                               : " names lanes that do not exist");
    throw std::runtime_error(text.str());
  }
  me.operation = operation;
  me.mask = mask;
  me.source = source;
  me.value = value;
  me.place = place;
  me.state = State::kAtCollective;
  warp.ready &= ~bit;
  warp.collected |= bit;
  Events& events = warp.threads[__builtin_ctz(mask)].events;
  void* event = events.current();
  if (operation == Operation::kSyncWarp) happens_before(event);
  Engine& engine = *me.block->engine;
  if (complete(me)) {
    resolve(warp, mask, operation);
    if (operation == Operation::kSyncWarp) events.next();
    engine.maybe_yield(me);
  } else {
    engine.suspend(me);
  }
  if (operation == Operation::kSyncWarp) happens_after(event);
  return me.value;
}

// Waits for all threads of the block, and returns what they voted.
inline Votes barrier(bool vote, const Place& place) {
  const Unwatched quiet;
  Thread& me = this_thread();
  Block& block = *me.block;
  if (block.at_barrier == 0) {
    block.barrier = place;
  } else if (!same_place(block.barrier, place)) {
    throw std::runtime_error("divergent barrier: it is at the barrier of " + to_string(place) +
                             ", but others are at the barrier of " + to_string(block.barrier));
  }
  block.votes.any = block.votes.any || vote;
  block.votes.all = block.votes.all && vote;
  block.votes.count += vote ? 1 : 0;
  me.place = place;
  me.state = State::kAtBarrier;
  me.warp->ready &= ~(1U << me.lane);
  ++block.at_barrier;
  void* event = block.events.current();
  happens_before(event);
  block.engine->suspend(me);
  happens_after(event);
  return block.result;
}

}  // namespace simt
