#include "cpu/isa/dispatch.h"

#include <array>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pmod::cpu {
namespace {

constexpr std::array<const char*, 4> kNames = {"base", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)
// Not a name that __builtin_cpu_supports of every compiler knows. AVX2 has the state it needs.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> levels = {Isa::kBase};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !has_f16c()) return levels;
  levels.push_back(Isa::kAvx2);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return levels;
  }
  levels.push_back(Isa::kAvx512);
  if (__builtin_cpu_supports("avx512bf16")) levels.push_back(Isa::kAvx512Bf16);
#endif
  return levels;
}

Isa choose() {
  const char* wanted = std::getenv("PMOD_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return available_isas().back();
  std::string names;
  for (const Isa isa : available_isas()) {
    if (isa_name(isa) == wanted) return isa;
    names += (names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::runtime_error("pmod_ops: PMOD_CPU_ISA: expected one of " + names +
                           " on this CPU, got " + wanted);
}

}  // namespace

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> levels = detect();
  return levels;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

std::string isa_name(Isa isa) { return kNames.at(static_cast<size_t>(isa)); }

template <typename T>
const RowLoops<T>& row_loops() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return avx512_bf16::row_loops<T>();
    case Isa::kAvx512:
      return avx512::row_loops<T>();
    case Isa::kAvx2:
      return avx2::row_loops<T>();
#endif
    default:
      return base::row_loops<T>();
  }
}

template const RowLoops<float>& row_loops<float>();
template const RowLoops<double>& row_loops<double>();
template const RowLoops<Bf16>& row_loops<Bf16>();
template const RowLoops<F16>& row_loops<F16>();

}  // namespace pmod::cpu
