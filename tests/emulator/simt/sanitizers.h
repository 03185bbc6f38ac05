// What the sanitizers must be told. AddressSanitizer: where poisoned memory lies and which stack is
// in use. ThreadSanitizer: which fiber runs, and what orders the accesses of CUDA threads. Only
// barriers, __syncwarp, atomics and the ends of a launch do; a switch of fibers does not, so that
// the sanitizer sees a race between two CUDA threads even when one OS thread runs both.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SIMT_TSAN 1
#endif
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// For a frame that is left without a return.
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
#define SIMT_UNINSTRUMENTED __attribute__((noinline, no_sanitize("address", "thread")))
#else
#define SIMT_UNINSTRUMENTED
#endif

namespace simt {

#if defined(SIMT_TSAN)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

inline void poison([[maybe_unused]] const void* at, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(at, bytes);
#endif
}

inline void unpoison([[maybe_unused]] const void* at, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(at, bytes);
#endif
}

// What one CUDA thread did before it happens before what another does after.
inline void happens_before([[maybe_unused]] void* event) {
#if defined(SIMT_TSAN)
  __tsan_release(event);
#endif
}
inline void happens_after([[maybe_unused]] void* event) {
#if defined(SIMT_TSAN)
  __tsan_acquire(event);
#endif
}

inline void stop_watching() {
#if defined(SIMT_TSAN)
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}
inline void watch_again() {
#if defined(SIMT_TSAN)
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

// The emulator's own accesses, which all fibers of an OS thread share, are no races of the kernel.
struct Unwatched {
  Unwatched() { stop_watching(); }
  ~Unwatched() { watch_again(); }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// The kernel, called by the emulator.
struct Watched {
  Watched() { watch_again(); }
  ~Watched() { stop_watching(); }
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;
};

}  // namespace simt
