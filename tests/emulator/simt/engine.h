// Runs blocks of a launch on one OS thread: which CUDA thread goes next, when a barrier opens, and
// what it means that nobody can go on.
#pragma once

#include <array>
#include <exception>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/block.h"

namespace simt {

// Where a thread is that does not run.
inline std::string describe(const Thread& thread) {
  std::ostringstream text;
  text << "thread " << thread.index.x;
  switch (thread.state) {
    case State::kReady:
      text << " runs";
      break;
    case State::kAtCollective:
      text << " is at the collective of " << to_string(thread.place) << " with mask 0x" << std::hex
           << thread.mask;
      break;
    case State::kAtBarrier:
      text << " is at the barrier of " << to_string(thread.place);
      break;
    case State::kDone:
      text << " has exited";
      break;
  }
  return text.str();
}

class Engine {
 public:
  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Takes blocks until there are none left or one has failed.
  void run(Launch& launch, unsigned worker) {
    const Unwatched quiet;
    launch_ = &launch;
    random_ = Random(launch.seed ^ (worker + 1));
    failed_ = unwinding_ = false;
    tally_.assign(detail::registry().size() + 1, {});
    scheduler_.adopt_os_thread();
    happens_before(&started_);
    reserve();
    live_ = 0;
    for (unsigned slot = 0; slot < launch.resident_blocks; ++slot) begin_block(slot);
    while (!failed_ && live_ != 0) {
      const unsigned slot = random_.bit_of(live_);
      Block& block = *blocks_[slot];
      if (block.ready_warps != 0) {
        advance(block);
      } else {
        settle(block);
        if (block.done == block.size) begin_block(slot);
      }
    }
    if (failed_) unwind();
    current = nullptr;
    happens_after(&ended_);
  }

  [[nodiscard]] const std::vector<Traffic>& tally() const { return tally_; }

  // Lets others run until this thread is chosen again. If it is not ready, somebody must make it
  // so.
  void suspend(Thread& me) {
    leave(me, false);
    if (unwinding_) throw Unwind{};
  }

  // In a seeded schedule: maybe lets others run.
  void maybe_yield(Thread& me) {
    Block& block = *me.block;
    if (launch_->seed != 0 && !block.runs_ahead()) suspend(me);
  }

 private:
  // Thrown through the frames of threads that will not be resumed.
  struct Unwind {};

  // As many stacks and blocks as this launch can need.
  void reserve() {
    const unsigned size = launch_->block.x;
    while (blocks_.size() < launch_->resident_blocks) blocks_.push_back(std::make_unique<Block>());
    const unsigned stacks = size * launch_->resident_blocks;
    if (stacks > stack_count_) {
      stacks_ = nullptr;  // before the new ones take their place
      stacks_ = std::make_unique<Stacks>(stacks);
      stack_count_ = stacks;
    }
  }

  // Puts the next block of the launch into the slot, if one is left.
  void begin_block(unsigned slot) {
    live_ &= ~(1U << slot);
    if (launch_->failed.load(std::memory_order_relaxed)) return;
    const uint64_t next = launch_->next_block.fetch_add(1, std::memory_order_relaxed);
    if (next >= launch_->grid.x) return;
    const uint64_t number = (next * launch_->stride + launch_->offset) % launch_->grid.x;
    Block& block = *blocks_[slot];
    block.begin(*launch_, static_cast<unsigned>(number), *stacks_, slot * launch_->block.x, &enter);
    block.engine = this;
    block.tally = &tally_;
    live_ |= 1U << slot;
  }

  // A thread of the block runs, and others of its warp that it leaves to.
  void advance(Block& block) {
    const unsigned w = choose(block, block.ready_warps);
    Warp& warp = block.warps[w];
    current = &warp.threads[choose(block, warp.ready)];
    scheduler_.switch_to(current->fiber);
    if (warp.ready == 0) block.ready_warps &= ~(1U << w);
  }

  unsigned choose(Block& block, uint32_t mask) {
    return launch_->seed == 0 ? __builtin_ctz(mask) : block.random.bit_of(mask);
  }

  SIMT_UNINSTRUMENTED void leave(Thread& me, bool for_ever) {
    Fiber& next = successor(me);
    if (for_ever) happens_before(&ended_);
    if (&next != &me.fiber) me.fiber.switch_to(next, for_ever);
  }

  // The fiber that goes next: one of the same warp, unless the schedule is a random one in which
  // others come between.
  Fiber& successor(Thread& me) {
    const Unwatched quiet;
    const uint32_t ready = me.warp->ready;
    Block& block = *me.block;
    if (ready == 0 || failed_ || unwinding_ || (launch_->seed != 0 && !block.runs_ahead())) {
      return scheduler_;
    }
    current = &me.warp->threads[choose(block, ready)];
    return current->fiber;
  }

  // Nobody in the block can run: it is finished, all are at a barrier, or it is stuck.
  void settle(Block& block) {
    if (block.done == block.size) {
      try {
        block.shared.check_red_zones();
      } catch (const std::exception& error) {
        fail(block, error.what());
      }
    } else if (block.at_barrier == block.size) {
      block.release_barrier();
    } else {
      fail(block, why_stuck(block));
    }
  }

  static std::string why_stuck(const Block& block) {
    const Thread* waits = nullptr;
    for (unsigned i = 0; i < block.size && waits == nullptr; ++i) {
      if (block.threads[i].state == State::kAtCollective) waits = &block.threads[i];
    }
    std::ostringstream text;
    if (waits != nullptr) {
      text << "deadlock: " << describe(*waits);
      for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if ((waits->mask >> lane & 1U) == 0) continue;
        const Thread& other = waits->warp->threads[lane];
        if (other.state == State::kAtCollective && other.mask == waits->mask &&
            other.operation == waits->operation) {
          continue;
        }
        text << ", but " << describe(other);
        break;
      }
      return text.str();
    }
    const Thread* exited = nullptr;
    for (unsigned i = 0; i < block.size; ++i) {
      const Thread& thread = block.threads[i];
      (thread.state == State::kDone ? exited : waits) = &thread;
    }
    text << "divergent barrier: " << describe(*waits) << ", but " << describe(*exited);
    return text.str();
  }

  void fail(const Block& block, const std::string& what) {
    failed_ = true;
    const std::lock_guard lock(launch_->mutex);
    if (launch_->failed.exchange(true)) return;
    launch_->error = "block " + std::to_string(block.index.x) + ", " + what;
  }

  // Destroys what is on the stacks of threads that have begun and not ended.
  void unwind() {
    unwinding_ = true;
    for (; live_ != 0; live_ &= live_ - 1) {
      const Block& block = *blocks_[__builtin_ctz(live_)];
      for (unsigned i = 0; i < block.size; ++i) {
        Thread& thread = block.threads[i];
        if (!thread.started || thread.state == State::kDone) continue;
        current = &thread;
        scheduler_.switch_to(thread.fiber);
      }
    }
  }

  // The first frame of every CUDA thread.
  SIMT_UNINSTRUMENTED static void enter() {
    Thread& me = *current;
    Engine& engine = *me.block->engine;
    Fiber::arrive(engine.scheduler_);
    engine.live(me);
    engine.leave(me, true);
    __builtin_unreachable();
  }

  void live(Thread& me) {
    const Unwatched quiet;
    std::string error;
    me.started = true;
    happens_after(&started_);
    try {
      const Watched kernel;
      launch_->call(launch_->arguments);
    } catch (const Unwind&) {
      error.clear();
    } catch (const std::exception& exception) {
      error = exception.what();
    }
    me.state = State::kDone;
    me.warp->ready &= ~(1U << me.lane);
    ++me.block->done;
    if (!error.empty()) fail(*me.block, "thread " + std::to_string(me.index.x) + ": " + error);
  }

  Launch* launch_ = nullptr;
  Fiber scheduler_;  // this OS thread
  Random random_;
  bool failed_ = false;     // something in this engine has
  bool unwinding_ = false;  // after that
  std::vector<std::unique_ptr<Block>> blocks_;
  uint32_t live_ = 0;  // which of them have threads left
  std::unique_ptr<Stacks> stacks_;
  unsigned stack_count_ = 0;
  std::vector<Traffic> tally_;
  char started_ = 0, ended_ = 0;  // events for ThreadSanitizer
};

}  // namespace simt
