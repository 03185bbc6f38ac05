// Fibers: stacks, and the switch from one to another. On x86-64 a switch saves the registers that
// a called function must keep; elsewhere, or with SIMT_UCONTEXT, it is the C library's.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "simt/sanitizers.h"

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT 1
#endif

#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#else
// Saves the caller's stack pointer in *from and goes on where `to` was saved.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.pushsection .text.simt_switch,"axG",@progbits,simt_switch,comdat
.weak simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
.size simt_switch,.-simt_switch
.popsection
)");
#endif

namespace simt {

// Pages of a stack are taken from the system when they are first touched.
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr size_t kStackBytes = size_t{256} << 10;
#else
constexpr size_t kStackBytes = size_t{64} << 10;
#endif

// Many stacks, each with a page below it that faults. They are never moved.
class Stacks {
 public:
  explicit Stacks(unsigned count) : count_(count), page_(sysconf(_SC_PAGESIZE)) {
    void* memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for the stacks of fibers");
    memory_ = static_cast<std::byte*>(memory);
    for (unsigned i = 0; i < count_; ++i) mprotect(memory_ + i * stride(), page_, PROT_NONE);
  }
  ~Stacks() {
    unpoison(memory_, bytes());
    munmap(memory_, bytes());
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  [[nodiscard]] std::byte* bottom(unsigned i) const { return memory_ + i * stride() + page_; }

 private:
  [[nodiscard]] size_t stride() const { return page_ + kStackBytes; }
  [[nodiscard]] size_t bytes() const { return count_ * stride(); }

  unsigned count_;
  size_t page_;
  std::byte* memory_;
};

// Something that can be suspended and resumed: a stack of its own, or an OS thread's (no stack).
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
#if defined(SIMT_TSAN)
    if (bottom_ != nullptr && tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
#endif
  }

  // The OS thread that calls is this fiber from now on.
  void adopt_os_thread() {
#if defined(SIMT_ASAN)
    asan_bottom_ = nullptr;  // found out at the first switch away
#endif
#if defined(SIMT_TSAN)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // The next switch here calls `entry`, which never returns. `number` staggers the tops of stacks,
  // for they would share a few sets of the cache otherwise.
  void prepare(std::byte* bottom, unsigned number, void (*entry)()) {
    constexpr size_t kStagger = 128;
    bottom_ = bottom;
    const size_t size = kStackBytes - (number % 32) * kStagger;
#if defined(SIMT_ASAN)
    asan_bottom_ = bottom;
    asan_size_ = kStackBytes;
    fake_stack_ = nullptr;
#endif
#if defined(SIMT_TSAN)
    if (tsan_ == nullptr) {
      tsan_ = __tsan_create_fiber(0);
      __tsan_set_fiber_name(tsan_, ("CUDA thread " + std::to_string(number)).c_str());
    }
#endif
#if defined(SIMT_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    // As after a call: the stack pointer is 8 beyond a multiple of 16, the return address is null.
    constexpr int kRegisters = 6;
    auto* top = reinterpret_cast<void**>(bottom + size) - 1;
    top[0] = nullptr;
    top[-1] = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kRegisters; ++i) top[-2 - i] = nullptr;
    top_ = top - 1 - kRegisters;
    static_assert(sizeof(void*) == 8);
#endif
  }

  // From this fiber, which runs, to another. With `for_ever` it is not resumed but prepared again.
  SIMT_UNINSTRUMENTED void switch_to(Fiber& to, [[maybe_unused]] bool for_ever = false) {
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack_, to.asan_bottom_,
                                   to.asan_size_);
#endif
#if defined(SIMT_TSAN)
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_UCONTEXT)
    swapcontext(&context_, &to.context_);
#else
    simt_switch(&top_, to.top_);
#endif
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // Called first thing on a new fiber. The first one of all was started by the OS thread.
  SIMT_UNINSTRUMENTED static void arrive([[maybe_unused]] Fiber& os_thread) {
#if defined(SIMT_ASAN)
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (os_thread.asan_bottom_ == nullptr) {
      os_thread.asan_bottom_ = bottom;
      os_thread.asan_size_ = size;
    }
#endif
  }

 private:
  std::byte* bottom_ = nullptr;
#if defined(SIMT_UCONTEXT)
  ucontext_t context_{};
#else
  void* top_ = nullptr;
#endif
#if defined(SIMT_ASAN)
  const void* asan_bottom_ = nullptr;
  size_t asan_size_ = 0;
  void* fake_stack_ = nullptr;
#endif
#if defined(SIMT_TSAN)
  void* tsan_ = nullptr;
#endif
};

}  // namespace simt
