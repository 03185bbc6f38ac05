// CUDA on the CPU, for csrc/cuda/platform.h where the compiler is not nvcc. Every CUDA thread is a
// fiber; collectives and barriers wait for whom they name, and say so if those cannot come. It
// shows what kernels compute and where they break the rules of CUDA, not how fast they are.
#pragma once

#include <cstdint>

#include "simt/collectives.h"
#include "simt/language.h"
#include "simt/launch.h"
#include "simt/memory.h"
#include "simt/numbers.h"
#include "simt/options.h"
#include "simt/registry.h"

// As on the GPU, one array for the block wherever the function is called from.
#define PMOD_SHARED(type, name, count)  \
  static constexpr char name##_key = 0; \
  type(&name)[count] = ::simt::shared_array<type, count>(&name##_key, #name)

namespace simt {

template <typename T, size_t kCount>
T (&shared_array(const void* key, const char* name))
[kCount] {
  static_assert(alignof(T) <= SharedMemory::kAlignment);
  const Unwatched quiet;
  void* array = this_thread().block->shared.array(key, sizeof(T) * kCount, name);
  return *static_cast<T(*)[kCount]>(array);
}

}  // namespace simt

namespace pmod::cuda {

using Stream = void*;
enum Status : int { kSuccess = 0 };

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const simt::Grid& grid, unsigned block,
              Stream /*stream*/, bool overlap, const Arguments&... arguments) {
  simt::launch(kernel, grid, block, overlap, static_cast<Parameters>(arguments)...);
  return kSuccess;
}

inline Status set_bytes(void* to, int value, int64_t bytes, Stream /*stream*/) {
  simt::set_bytes(to, value, bytes);
  return kSuccess;
}

inline void wait_for_predecessor() { simt::this_thread().waited = true; }
inline void let_successor_start() { simt::this_thread(); }

inline uint32_t pack_bf16(float low, float high) {
  return simt::bf16_bits(low) | static_cast<uint32_t>(simt::bf16_bits(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return simt::f16_bits(low) | static_cast<uint32_t>(simt::f16_bits(high)) << 16;
}
inline float2 unpack_f16(uint32_t pair) {
  return {simt::from_f16_bits(static_cast<uint16_t>(pair)),
          simt::from_f16_bits(static_cast<uint16_t>(pair >> 16))};
}

inline void count_read(const void* from, int bytes) { simt::count_access(from, bytes, false); }
inline void count_write(const void* to, int bytes) { simt::count_access(to, bytes, true); }

}  // namespace pmod::cuda
