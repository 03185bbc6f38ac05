// The CPU's part of the adapters: dispatch on the row type, checks of contents, scratch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "common/row_types.h"
#include "cpu/rows/loops.h"
#include "tensor/arguments.h"

namespace pmod::cpu {

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
    check_device(op, argument, t);
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
  check_device(op, argument, *t);
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
