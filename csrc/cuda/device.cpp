// Device, stream and failures, for a real GPU. The emulated build has its own: tests/emulator.

#include <torch/csrc/stable/accelerator.h>

#include "cuda/adapter.h"

namespace accelerator = torch::stable::accelerator;

namespace pmod {

void check_device(const char* op, const char* argument, const Tensor& t) {
  check(t.is_cuda(), "pmod_ops.", op, ": ", argument, ": expected a CUDA tensor");
  const int32_t current = accelerator::getCurrentDeviceIndex();
  check(t.get_device_index() == current, "pmod_ops.", op, ": ", argument,
        ": expected device cuda:", current,
        " like the other arguments, got cuda:", t.get_device_index());
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
  const int32_t current = accelerator::getCurrentDeviceIndex();
  return allocate_on(aoti_torch_device_type_cuda(), current, sizes, type);
}

namespace cuda {

struct OnDevice::State {
  accelerator::DeviceGuard guard;
};

OnDevice::OnDevice(const char* op, const char* argument, const Tensor& t) {
  check(t.is_cuda(), "pmod_ops.", op, ": ", argument, ": expected a CUDA tensor");
  const int32_t index = t.get_device_index();
  state_ = std::make_unique<State>(State{accelerator::DeviceGuard(index)});
  stream_ = static_cast<Stream>(accelerator::getCurrentStream(index).nativeHandle());
}

OnDevice::~OnDevice() = default;

void check_launch(const char* op, Status status) {
  if (status == kSuccess) return;
  // the error stays with the CUDA context until it is read, and would be blamed on another call
  static_cast<void>(cudaGetLastError());
  check(false, "pmod_ops.", op, ": ", explain(status));
}

std::string explain(Status status) {
  const std::string said = cudaGetErrorString(status);
  switch (status) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidDeviceFunction:
      return "no kernel for this GPU (" + said +
             "): built for architectures " PMOD_CUDA_ARCHS
             "; set PMOD_CUDA_IMPL=triton to use the Triton kernels, or rebuild with "
             "PMOD_CUDA_ARCHS=<compute capability without the dot> pip install .";
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
      return "the NVIDIA driver is too old for CUDA " PMOD_CUDA_VERSION " or is missing (" + said +
             "): update it, or rebuild with an older CUDA toolkit";
    default:
      return "the launch failed: " + said;
  }
}

}  // namespace cuda
}  // namespace pmod
