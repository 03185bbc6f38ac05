// What device code and launchers are written against: nvcc's language, or the emulator in
// tests/emulator, which runs the same source on the CPU. No torch.
#pragma once

#include <cstdint>

// PMOD_CUDA_RUNTIME: host code beside the kernels, which another compiler may compile.
#if defined(__CUDACC__) || defined(PMOD_CUDA_RUNTIME)
#include <cuda_runtime_api.h>

namespace pmod::cuda {

using Stream = cudaStream_t;
using Status = cudaError_t;
constexpr Status kSuccess = cudaSuccess;

inline Status set_bytes(void* to, int value, int64_t bytes, Stream stream) {
  return cudaMemsetAsync(to, value, bytes, stream);
}

}  // namespace pmod::cuda
#endif

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// `count` shared elements, not initialised. In a function that a kernel calls, too.
#define PMOD_SHARED(type, name, count) __shared__ type name[count]

namespace pmod::cuda {

// Puts a kernel on the stream. With `overlap` it may start while the kernel before it drains, so it
// must call wait_for_predecessor() before it touches memory (programmatic dependent launch; sm_90
// and later, no effect elsewhere).
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, Stream stream,
              bool overlap, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// What was written before is visible to a successor that waits; it may start launching.
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float2 unpack_f16(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// Hooks of the emulator, which counts the bytes of rows.
__device__ __forceinline__ void count_read(const void* /*from*/, int /*bytes*/) {}
__device__ __forceinline__ void count_write(const void* /*to*/, int /*bytes*/) {}

}  // namespace pmod::cuda
#elif !defined(PMOD_CUDA_RUNTIME)
#include "simt.h"  // the emulator: the same names
#endif
