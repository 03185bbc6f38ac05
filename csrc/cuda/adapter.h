// The GPU's part of the adapters: what a launcher wants to know of tensors, the device and stream
// it runs on, and what to say when a launch fails.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "cuda/launchers.h"
#include "tensor/arguments.h"
#include "tensor/plan.h"

#if defined(PMOD_CUDA_RUNTIME)
#define PMOD_DEVICE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pmod, CUDA, m)
#else  // the same adapters on the CPU, over emulated kernels, for tests
#define PMOD_DEVICE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pmod_emulated, CPU, m)
#endif

namespace pmod::cuda {

// Makes the device of a tensor the current one, for as long as it lives. All other tensors of the
// call must be there, and outputs are allocated there.
class OnDevice {
 public:
  OnDevice(const char* op, const char* argument, const Tensor& t);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  [[nodiscard]] Stream stream() const { return stream_; }

 private:
  struct State;
  std::unique_ptr<State> state_;
  Stream stream_ = nullptr;
};

// What went wrong, and what to do about it.
std::string explain(Status status);

// Throws if a launch failed.
void check_launch(const char* op, Status status);

RowType row_type(const char* op, const char* argument, const Tensor& t);

inline Rows rows_of(const char* op, const Tensor& x, const OnDevice& device) {
  return {.type = row_type(op, "x", x), .hidden = x.size(1), .stream = device.stream()};
}

// A vector of `size` entries in the type of rows or in float, kept contiguous for the call.
class ParameterTensor {
 public:
  ParameterTensor(const char* op, const char* argument, const OptionalTensor& t, const Tensor& like,
                  int64_t size);

  [[nodiscard]] Parameter get() const { return parameter_; }

 private:
  OptionalTensor kept_;
  Parameter parameter_;
};

inline Gate check_gate(const char* op, double scale, double bias, int64_t activation) {
  return {.scale = static_cast<float>(scale),
          .bias = static_cast<float>(bias),
          .activation = check_activation(op, activation)};
}

// The parts of route that route_gather shares; route.cpp.
Tensor score(const char* op, const Rows& rows, const Tensor& x, const Tensor& weight,
             const OptionalTensor& bias, const Tensor& kind);

struct Selected {
  Tensor gate, index, inverse, scratch;
};
Selected select_rows(const char* op, const Tensor& logits, const Plan& plan, const Gate& gate,
                     Stream stream);

// d loss / d logit [N].
Tensor logit_gradient(const char* op, const OptionalTensor& grad_logits,
                      const OptionalTensor& grad_gate, const Tensor& logits, const Tensor& kind,
                      const Tensor& cu_seqlens, const Gate& gate, Stream stream);

// gather.cpp and gather_rmsnorm.cpp
Tensor copy_rows(const char* op, const Rows& rows, const Tensor& x, const Tensor& index);
std::tuple<Tensor, Tensor> normalise_rows(const char* op, const Rows& rows, const Tensor& x,
                                          const Tensor& index, const OptionalTensor& norm_weight,
                                          double eps, bool after_select);

// Scratch for `count` [D] sums over so many rows.
inline Tensor partials(int64_t visited, int64_t count, int64_t hidden) {
  return allocate({parameter_partials(visited) * count * hidden}, ScalarType::Float);
}

}  // namespace pmod::cuda
