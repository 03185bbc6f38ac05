// Device, stream and failures of the emulated GPU, which is the CPU.

#include "cuda/adapter.h"

namespace pmod {

void check_device(const char* op, const char* argument, const Tensor& t) {
  check(t.is_cpu(), "pmod_ops.", op, ": ", argument, ": expected a CPU tensor");
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
  return allocate_on(aoti_torch_device_type_cpu(), 0, sizes, type);
}

namespace cuda {

struct OnDevice::State {};

OnDevice::OnDevice(const char* op, const char* argument, const Tensor& t) {
  check_device(op, argument, t);
}

OnDevice::~OnDevice() = default;

std::string explain(Status status) { return "status " + std::to_string(static_cast<int>(status)); }

void check_launch(const char* op, Status status) {
  check(status == kSuccess, "pmod_ops.", op, ": ", explain(status));
}

}  // namespace cuda
}  // namespace pmod
