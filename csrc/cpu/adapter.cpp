#include "cpu/adapter.h"

#include <unistd.h>

namespace pmod::cpu {
namespace {

int64_t cache_bytes() {
  constexpr int64_t kUsual = 32 << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? bytes : kUsual;
#else
  return kUsual;
#endif
}

}  // namespace

bool worth_streaming(const Tensor& rows) {
  static const int64_t quarter = cache_bytes() / 4;
  const int64_t hidden = rows.size(1),
                bytes = rows.numel() * static_cast<int64_t>(rows.element_size());
  const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
  return bytes > quarter && hidden % kLanes == 0 && address % kCacheLine == 0;
}

}  // namespace pmod::cpu
