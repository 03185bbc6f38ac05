// From stable-ABI tensors to pointers and sizes: dispatch on the row type, checks, scratch.
// Messages name the op, the argument, what was expected and what came; nothing is written before.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/row_ops.h"

namespace pmod::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws with the concatenated parts as message. (STD_TORCH_CHECK would put the build path first.)
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A row type and its accumulate type, as a value that a generic lambda can take.
template <typename Row>
struct RowType {
  using T = Row;
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
};

template <typename F>
auto dispatch_rows(const char* op, const char* argument, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(RowType<float>{});
    case ScalarType::BFloat16:
      return f(RowType<torch::headeronly::BFloat16>{});
    case ScalarType::Half:
      return f(RowType<torch::headeronly::Half>{});
    default:
      check(x.scalar_type() == ScalarType::Double, "pmod_ops.", op, ": ", argument,
            ": expected float32, bfloat16, float16 or float64");
      return f(RowType<double>{});
  }
}

inline ScalarType acc_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_cpu(const char* op, const char* argument, const Tensor& t) {
  check(t.is_cpu(), "pmod_ops.", op, ": ", argument, ": expected a CPU tensor");
}

// A contiguous matrix of the given type; -1 leaves a size open.
inline Tensor matrix(const char* op, const char* argument, const Tensor& t, ScalarType type,
                     int64_t rows, int64_t columns) {
  check_cpu(op, argument, t);
  check(t.dim() == 2, "pmod_ops.", op, ": ", argument, ": expected 2 dimensions, got ", t.dim());
  check(t.scalar_type() == type, "pmod_ops.", op, ": ", argument,
        ": expected the dtype of the rows, got another");
  check(rows < 0 || t.size(0) == rows, "pmod_ops.", op, ": ", argument, ": expected ", rows,
        " rows, got ", t.size(0));
  check(columns < 0 || t.size(1) == columns, "pmod_ops.", op, ": ", argument, ": expected ",
        columns, " columns, got ", t.size(1));
  check(t.size(1) >= 1, "pmod_ops.", op, ": ", argument, ": expected at least 1 column");
  return torch::stable::contiguous(t);
}

inline Tensor vector(const char* op, const char* argument, const Tensor& t, ScalarType type,
                     int64_t size) {
  check_cpu(op, argument, t);
  check(t.dim() == 1 && (size < 0 || t.size(0) == size), "pmod_ops.", op, ": ", argument,
        ": expected ", size < 0 ? "1 dimension" : std::to_string(size) + " entries", ", got ",
        t.numel(), " entries in ", t.dim(), " dimension(s)");
  check(t.scalar_type() == type, "pmod_ops.", op, ": ", argument, ": got an unexpected dtype");
  return torch::stable::contiguous(t);
}

// A matrix shaped like `like`. It is written in place, so a contiguous copy would not do.
inline void check_mutable(const char* op, const char* argument, const Tensor& t,
                          const Tensor& like) {
  matrix(op, argument, t, like.scalar_type(), like.size(0), like.size(1));
  check(t.is_contiguous(), "pmod_ops.", op, ": ", argument,
        ": expected a contiguous tensor, because it is written in place");
}

inline void check_range(const char* op, const char* argument, const Tensor& t, int64_t end) {
  const int32_t* values = t.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < t.numel(); ++i) {
    check(values[i] >= -1 && values[i] < end, "pmod_ops.", op, ": ", argument, "[", i,
          "]: expected -1 or 0..", end - 1, ", got ", values[i]);
  }
}

inline Tensor index_vector(const char* op, const char* argument, const Tensor& t, int64_t size,
                           int64_t end) {
  Tensor index = vector(op, argument, t, ScalarType::Int, size);
  check_range(op, argument, index, end);
  return index;
}

// A weight in any row type, converted to the accumulate type once.
template <typename A>
std::vector<A> weights(const char* op, const char* argument, const Tensor& t, int64_t size) {
  check_cpu(op, argument, t);
  check(t.dim() == 1 && t.size(0) == size, "pmod_ops.", op, ": ", argument, ": expected ", size,
        " entries, got ", t.numel());
  const Tensor flat = torch::stable::contiguous(t);
  return dispatch_rows(op, argument, flat, [&](auto type) {
    using W = typename decltype(type)::T;
    const W* values = flat.const_data_ptr<W>();
    std::vector<A> out(size);
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<A>(values[i]);
    return out;
  });
}

template <typename A>
std::vector<A> weights(const char* op, const char* argument, const OptionalTensor& t,
                       int64_t size) {
  return t ? weights<A>(op, argument, *t, size) : std::vector<A>();
}

// Rows per task: 64 KB, enough to pay for starting one.
inline int64_t grain(int64_t row_bytes) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, row_bytes));
}

template <typename F>
void for_rows(int64_t rows, int64_t row_bytes, const F& f) {
  torch::stable::parallel_for(0, rows, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

// f(chunk, first row, end row) for every chunk of the rows; chunks do not depend on threads.
template <typename F>
void for_chunks(int64_t rows, const F& f) {
  torch::stable::parallel_for(0, kChunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c, c * rows / kChunks, (c + 1) * rows / kChunks);
  });
}

}  // namespace pmod::cpu
