// Launchers as functions from a problem to what they wrote. Memory is that of tests/cpp, with
// guards around it; kernels may touch what is allowed to them by name, and nothing else.
#pragma once

#include <doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cuda/launchers.h"
#include "expect.h"
#include "ops.h"
#include "problem.h"

namespace pmod::test {

template <typename T>
constexpr cuda::RowType kTypeOf = std::is_same_v<T, Bf16>  ? cuda::RowType::kBf16
                                  : std::is_same_v<T, F16> ? cuda::RowType::kF16
                                                           : cuda::RowType::kFloat;

// Memory that kernels may touch while this lives.
class Allowed {
 public:
  template <typename T>
  const T* read(const Buffer<T>& buffer, const char* name) {
    return add(buffer.data(), buffer.size(), false, name);
  }
  template <typename T>
  T* write(Buffer<T>& buffer, const char* name) {
    return add(buffer.data(), buffer.size(), true, name);
  }
  template <typename T>
  T* write(std::vector<T>& values, const char* name) {
    return add(values.data(), static_cast<int64_t>(values.size()), true, name);
  }

 private:
  template <typename T>
  T* add(T* begin, int64_t size, bool writable, const char* name) {
    allowed_.push_back(simt::allow(begin, size * sizeof(T), writable, name));
    return begin;
  }

  std::vector<simt::AllowedMemory> allowed_;
};

// A problem as a GPU gets it: weights in the type of rows or in float, and indices that lead
// nowhere in more ways than -1.
template <typename T>
struct Device {
  const Problem<T>& p;
  bool wide_weights;
  std::vector<int32_t> index, inverse;
  Buffer<T> router, norm;
  Buffer<float> wide_router, wide_norm;
  T bias = nearest<T>(0.25);
  float wide_bias = 0.25F;

  Device(const Problem<T>& problem, bool wide)
      : p(problem),
        wide_weights(wide),
        index(p.index),
        inverse(p.inverse),
        router(p.hidden, p.offset),
        norm(p.hidden, p.offset),
        wide_router(p.hidden, p.offset),
        wide_norm(p.hidden, p.offset) {
    replace(index, p.rows);
    replace(inverse, p.slots);
    for (int64_t i = 0; i < p.hidden; ++i) {
      router[i] = nearest<T>(wide_router[i] = p.router[i]);
      norm[i] = nearest<T>(wide_norm[i] = p.norm[i]);
    }
  }

  [[nodiscard]] cuda::Rows rows() const { return {kTypeOf<T>, p.hidden, nullptr}; }
  cuda::Parameter router_weight(Allowed& memory) const {
    return weight(memory, router, wide_router, "router");
  }
  cuda::Parameter norm_weight(Allowed& memory) const {
    return weight(memory, norm, wide_norm, "norm");
  }
  [[nodiscard]] cuda::Number next_bias() const {
    if (wide_weights) return {&wide_bias, cuda::RowType::kFloat};
    return {&bias, kTypeOf<T>};
  }

  // A matrix of so many rows that nobody has written yet, and numbers for each row of another.
  [[nodiscard]] Buffer<T> matrix(int64_t number, int64_t offset) const {
    return Buffer<T>(number * p.hidden, offset);
  }
  [[nodiscard]] std::vector<float> numbers(int64_t number) const {
    return std::vector<float>(number, std::numeric_limits<float>::quiet_NaN());
  }
  [[nodiscard]] Buffer<float> partials(int64_t rows_summed, int parameters) const {
    return {cuda::parameter_partials(rows_summed) * p.hidden * parameters, p.offset};
  }

 private:
  static void replace(std::vector<int32_t>& indices, int64_t end) {
    constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
    const int32_t nowhere[] = {-1, -2, static_cast<int32_t>(end), -kMost - 1, kMost};
    size_t next = 0;
    for (int32_t& i : indices) {
      if (i < 0) i = nowhere[next++ % std::size(nowhere)];
    }
  }

  cuda::Parameter weight(Allowed& memory, const Buffer<T>& rows_type, const Buffer<float>& wide,
                         const char* name) const {
    if (wide_weights) return {memory.read(wide, name), cuda::RowType::kFloat};
    return {memory.read(rows_type, name), kTypeOf<T>};
  }
};

template <typename T>
struct DeviceOp {
  std::string name;
  int num_flags;
  Outputs<T> (*run)(const Device<T>&, Flags);
  void (*check)(const Problem<T>&, Flags, const Outputs<T>&);
};

template <typename T>
void append_forward(std::vector<DeviceOp<T>>& ops);
template <typename T>
void append_backward(std::vector<DeviceOp<T>>& ops);
template <typename T>
void append_scatter(std::vector<DeviceOp<T>>& ops);

// A sum over a row: at most 16 elements in a thread one by one, or what 512 threads leave to
// each; 32 lanes by halves; warps one by one, of which each has at least 128 elements or there are
// two.
template <typename F>
auto device_dot_product(int64_t hidden, const F& term) {
  const int64_t elements = std::max<int64_t>(std::min<int64_t>(hidden, 16), hidden / 512 + 8);
  const int64_t warps = std::clamp<int64_t>((hidden + 127) / 128, 2, 32);
  return bounded_sum(hidden, elements + 5 + warps, term);
}

// A parameter's gradient: rows of a block one by one, blocks in double, one rounding.
template <typename F>
auto device_column_sum(int64_t count, int64_t rows, const F& term) {
  const int64_t partials = std::max<int64_t>(cuda::parameter_partials(rows), 1);
  return bounded_sum(count, (rows + partials - 1) / partials + 2, term);
}

}  // namespace pmod::test
