// Lets a test count the bytes of rows that the loops read and write; nothing in a normal build.
#pragma once

#include <cstdint>

#if defined(PMOD_COUNT_TRAFFIC)
namespace pmod::cpu {
void count_read(const void* from, int64_t bytes);
void count_write(const void* to, int64_t bytes);
}  // namespace pmod::cpu
#define PMOD_READ(from, bytes) ::pmod::cpu::count_read(from, bytes)
#define PMOD_WRITTEN(to, bytes) ::pmod::cpu::count_write(to, bytes)
#else
#define PMOD_READ(from, bytes) static_cast<void>(0)
#define PMOD_WRITTEN(to, bytes) static_cast<void>(0)
#endif
