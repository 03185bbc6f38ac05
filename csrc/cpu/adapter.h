// From stable-ABI tensors to pointers and sizes: dispatch on the row type, checks, scratch.
// Messages name the op, the argument, what was expected and what came; nothing is written before.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/row_types.h"
#include "cpu/rows/loops.h"

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
  using A = Acc<Row>;
};

template <typename F>
auto dispatch_rows(const char* op, const char* argument, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(RowType<float>{});
    case ScalarType::BFloat16:
      return f(RowType<Bf16>{});
    case ScalarType::Half:
      return f(RowType<F16>{});
    default:
      check(x.scalar_type() == ScalarType::Double, "pmod_ops.", op, ": ", argument,
            ": expected float32, bfloat16, float16 or float64");
      return f(RowType<double>{});
  }
}

inline ScalarType acc_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// torch::stable::contiguous and ::new_empty look their op up by name, a microsecond each.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Not initialised, on the CPU.
inline Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
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
  return as_contiguous(t);
}

inline Tensor vector(const char* op, const char* argument, const Tensor& t, ScalarType type,
                     int64_t size) {
  check_cpu(op, argument, t);
  check(t.dim() == 1 && (size < 0 || t.size(0) == size), "pmod_ops.", op, ": ", argument,
        ": expected ", size < 0 ? "1 dimension" : std::to_string(size) + " entries", ", got ",
        t.numel(), " entries in ", t.dim(), " dimension(s)");
  check(t.scalar_type() == type, "pmod_ops.", op, ": ", argument, ": got an unexpected dtype");
  return as_contiguous(t);
}

// A matrix shaped like `like`. It is written in place, so a contiguous copy would not do.
inline void check_mutable(const char* op, const char* argument, const Tensor& t,
                          const Tensor& like) {
  matrix(op, argument, t, like.scalar_type(), like.size(0), like.size(1));
  check(t.is_contiguous(), "pmod_ops.", op, ": ", argument,
        ": expected a contiguous tensor, because it is written in place");
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

inline void check_range(const char* op, const char* argument, const Tensor& t, int64_t end) {
  const int32_t* values = data<int32_t>(t);
  const int64_t size = t.numel();
  bool ok = true;  // one sweep without branches; only a failure looks for the place
  for (int64_t i = 0; i < size; ++i) ok = ok & (values[i] >= -1) & (values[i] < end);
  for (int64_t i = 0; !ok && i < size; ++i) {
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

// Memory for whole blocks, aligned to a cache line: a vector that crosses one takes twice as long.
template <typename A>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t size = 0)
      : size_(size),
        data_(size == 0 ? nullptr : static_cast<A*>(::operator new(size * sizeof(A), kAlignment))) {
  }

  A* data() { return data_.get(); }  // null if empty
  [[nodiscard]] const A* data() const { return data_.get(); }
  [[nodiscard]] int64_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kAlignment{kCacheLine};
  struct Delete {
    void operator()(A* data) const { ::operator delete(data, kAlignment); }
  };
  int64_t size_;
  std::unique_ptr<A, Delete> data_;
};

// The elements of a vector of any row type, in the type of sums.
template <typename A>
std::vector<A> widened(const char* op, const char* argument, const Tensor& t) {
  std::vector<A> out(t.numel());
  dispatch_rows(op, argument, t, [&](auto type) {
    using W = typename decltype(type)::T;
    if constexpr (std::is_same_v<Acc<W>, A>) {
      row_loops<W>().widen(data<W>(t), out.data(), t.numel());
    } else {
      std::vector<Acc<W>> wide(t.numel());
      row_loops<W>().widen(data<W>(t), wide.data(), t.numel());
      std::copy(wide.begin(), wide.end(), out.begin());
    }
  });
  return out;
}

// A weight that rows of T meet, as the loops want it.
template <typename T>
class PaddedWeight {
 public:
  PaddedWeight() = default;

  PaddedWeight(const char* op, const char* argument, const Tensor& t, int64_t size) {
    check_cpu(op, argument, t);
    check(t.dim() == 1 && t.size(0) == size, "pmod_ops.", op, ": ", argument, ": expected ", size,
          " entries, got ", t.numel());
    const Tensor flat = as_contiguous(t);
    if (dispatch_rows(op, argument, flat,
                      [](auto type) { return std::is_same_v<typename decltype(type)::T, T>; })) {
      packed_ = AlignedArray<T>(padded(size));
      std::copy_n(data<T>(flat), size, packed_.data());
      std::fill(packed_.data() + size, packed_.data() + padded(size), T{});
      return;
    }
    std::vector<Acc<T>> elements = widened<Acc<T>>(op, argument, flat);
    elements.resize(padded(size));
    blocks_ = AlignedArray<Acc<T>>(padded(size));
    row_loops<T>().arrange(elements.data(), blocks_.data(), padded(size));
  }

  PaddedWeight(const char* op, const char* argument, const OptionalTensor& t, int64_t size)
      : PaddedWeight(t ? PaddedWeight(op, argument, *t, size) : PaddedWeight()) {}

  [[nodiscard]] Weight<T> get() const {
    return {.packed = packed_.data(), .blocks = blocks_.data()};
  }

 private:
  AlignedArray<T> packed_;
  AlignedArray<Acc<T>> blocks_;
};

template <typename T>
Acc<T> scalar(const char* op, const char* argument, const OptionalTensor& t) {
  if (!t) return Acc<T>(0);
  check_cpu(op, argument, *t);
  check(t->numel() == 1, "pmod_ops.", op, ": ", argument, ": expected 1 entry, got ", t->numel());
  return widened<Acc<T>>(op, argument, *t)[0];
}

// Whether rows are better written past the cache: not if they take little of it. Before large ones
// are read, the weights of a matrix product have passed through the cache.
bool worth_streaming(const Tensor& rows);

// Calls f(begin, end) on ranges of rows, in parallel; a task of less than 64 KB is not worth
// starting.
template <typename F>
void for_ranges(int64_t rows, int64_t row_bytes, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, rows, grain, f);
}

}  // namespace pmod::cpu
