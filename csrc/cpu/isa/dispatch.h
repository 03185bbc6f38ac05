// Which instruction set the row loops use: the best this CPU has, or a lower one by PMOD_CPU_ISA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/rows/loops.h"

namespace pmod::cpu {

// In the order of what they can do; a higher one implies the lower ones.
enum class Isa : uint8_t { kBase, kAvx2, kAvx512, kAvx512Bf16 };

// The levels that were compiled and that this CPU has, lowest first.
const std::vector<Isa>& available_isas();

// Read from the environment at the first call. Throws std::runtime_error if PMOD_CPU_ISA names none
// of the available levels.
Isa active_isa();

std::string isa_name(Isa isa);

namespace base {
template <typename T>
const RowLoops<T>& row_loops();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename T>
const RowLoops<T>& row_loops();
}
namespace avx512 {
template <typename T>
const RowLoops<T>& row_loops();
}
namespace avx512_bf16 {
template <typename T>
const RowLoops<T>& row_loops();
}
#endif

}  // namespace pmod::cpu
