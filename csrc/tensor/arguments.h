// From stable-ABI tensors to checked arguments: what the adapters of every backend share.
// Messages name the op, the argument, what was expected and what came; nothing is written before.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/gate.h"

namespace pmod {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Each backend's library defines these two for its device.
void check_device(const char* op, const char* argument, const Tensor& t);
Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type);  // not initialised

// Throws with the concatenated parts as message. (STD_TORCH_CHECK would put the build path first.)
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline ScalarType acc_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// torch::stable::contiguous looks its op up by name, a microsecond each time.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The same for torch::stable::empty. `device` is what aoti_torch_device_type_*() gives.
inline Tensor allocate_on(int32_t device, int32_t index, std::initializer_list<int64_t> sizes,
                          ScalarType type) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2 && sizes.begin()[1] > 1) strides[0] = sizes.begin()[1];
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device, index,
      &tensor));
  return Tensor(tensor);
}

// A contiguous matrix of the given type; -1 leaves a size open.
inline Tensor matrix(const char* op, const char* argument, const Tensor& t, ScalarType type,
                     int64_t rows, int64_t columns) {
  check_device(op, argument, t);
  check(t.dim() == 2, "pmod_ops.", op, ": ", argument, ": expected 2 dimensions, got ", t.dim());
  check(t.scalar_type() == type, "pmod_ops.", op, ": ", argument,
        ": expected the dtype of the rows, got another");
  check(rows < 0 || t.size(0) == rows, "pmod_ops.", op, ": ", argument, ": expected ", rows,
        " rows, got ", t.size(0));
  check(columns < 0 || t.size(1) == columns, "pmod_ops.", op, ": ", argument, ": expected ",
        columns, " columns, got ", t.size(1));
  check(t.size(1) >= 1, "pmod_ops.", op, ": ", argument, ": expected at least 1 column");
  return as_contiguous(t);
}

inline OptionalTensor matrix(const char* op, const char* argument, const OptionalTensor& t,
                             ScalarType type, int64_t rows, int64_t columns) {
  if (!t) return std::nullopt;
  return matrix(op, argument, *t, type, rows, columns);
}

inline Tensor vector(const char* op, const char* argument, const Tensor& t, ScalarType type,
                     int64_t size) {
  check_device(op, argument, t);
  check(t.dim() == 1 && (size < 0 || t.size(0) == size), "pmod_ops.", op, ": ", argument,
        ": expected ", size < 0 ? "1 dimension" : std::to_string(size) + " entries", ", got ",
        t.numel(), " entries in ", t.dim(), " dimension(s)");
  check(t.scalar_type() == type, "pmod_ops.", op, ": ", argument, ": got an unexpected dtype");
  return as_contiguous(t);
}

inline OptionalTensor vector(const char* op, const char* argument, const OptionalTensor& t,
                             ScalarType type, int64_t size) {
  if (!t) return std::nullopt;
  return vector(op, argument, *t, type, size);
}

// A matrix shaped like `like`. It is written in place, so a contiguous copy would not do.
inline void check_mutable(const char* op, const char* argument, const Tensor& t,
                          const Tensor& like) {
  matrix(op, argument, t, like.scalar_type(), like.size(0), like.size(1));
  check(t.is_contiguous(), "pmod_ops.", op, ": ", argument,
        ": expected a contiguous tensor, because it is written in place");
}

inline Activation check_activation(const char* op, int64_t activation) {
  check(activation >= 0 && activation <= 3, "pmod_ops.", op, ": activation: expected 0..3, got ",
        activation);
  return static_cast<Activation>(activation);
}

// The elements; null if there is no tensor.
template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* data(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace pmod
