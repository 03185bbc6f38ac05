#include "cpu/adapter.h"

#include <fstream>

namespace pmod {

void check_device(const char* op, const char* argument, const Tensor& t) {
  check(t.is_cpu(), "pmod_ops.", op, ": ", argument, ": expected a CPU tensor");
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
  return allocate_on(aoti_torch_device_type_cpu(), 0, sizes, type);
}

}  // namespace pmod

namespace pmod::cpu {
namespace {

// Of the cache that the cores of a cluster share. sysconf would sum the clusters of an AMD socket.
int64_t shared_cache_bytes() {
  constexpr int64_t kUsual = 32 << 20;
  int64_t kilobytes = 0;
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
  return file >> kilobytes && kilobytes > 0 ? kilobytes << 10 : kUsual;
}

}  // namespace

bool worth_streaming(const Tensor& rows) {
  static const int64_t enough = shared_cache_bytes() / 16;
  const int64_t hidden = rows.size(1),
                bytes = rows.numel() * static_cast<int64_t>(rows.element_size());
  const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
  return bytes > enough && hidden % kLanes == 0 && address % kCacheLine == 0;
}

}  // namespace pmod::cpu
