// Row primitives shared by the CPU ops: pointers and sizes, no tensors.
//
// T is the type of the rows, A the type of a sum over a row: double for double rows, else float. A
// row is converted on load and rounded once on store. Sums use a fixed number of partial sums,
// added in a fixed order, so that a result depends neither on the thread count nor on the
// instruction set.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace pmod::cpu {

constexpr int kLanes = 16;  // one AVX-512 register of float

template <typename A>
inline A sum_lanes(std::array<A, kLanes> part) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

// Sum of term(i) for i in [0, n).
template <typename A, typename F>
inline A reduce(int64_t n, const F& term) {
  std::array<A, kLanes> part{};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) part[lane] += term(i + lane);
  }
  for (int64_t i = whole; i < n; ++i) part[i - whole] += term(i);
  return sum_lanes<A>(part);
}

template <typename A, typename T, typename U>
inline A dot(const T* x, const U* y, int64_t n) {
  return reduce<A>(n, [=](int64_t i) { return static_cast<A>(x[i]) * static_cast<A>(y[i]); });
}

template <typename T>
inline void zero_row(T* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = T(0.0f);
}

// out = RMSNorm(x); rounds before and after the multiplication by the weight, as a Llama does.
template <typename A, typename T>
inline A rmsnorm_row(const T* x, const A* weight, A eps, T* out, int64_t n) {
  const A rstd = A(1) / std::sqrt(dot<A>(x, x, n) / static_cast<A>(n) + eps);
  for (int64_t i = 0; i < n; ++i) {
    const T normed = static_cast<T>(static_cast<A>(x[i]) * rstd);
    out[i] = static_cast<T>(static_cast<A>(normed) * weight[i]);
  }
  return rstd;
}

// grad_x = rstd * (g - n * mean(g * n)) with n = x * rstd, g = grad_out * weight; unrounded.
// grad_weight += grad_out * round(n).
template <typename A, typename T>
inline void rmsnorm_backward_row(const T* grad_out, const T* x, const A* weight, A rstd, A* grad_x,
                                 double* grad_weight, int64_t n) {
  const A projection = reduce<A>(n, [=](int64_t i) {
    return static_cast<A>(grad_out[i]) * weight[i] * (static_cast<A>(x[i]) * rstd);
  });
  const A mean = projection / static_cast<A>(n);
  for (int64_t i = 0; i < n; ++i) {
    const A normed = static_cast<A>(x[i]) * rstd;
    grad_x[i] = rstd * (static_cast<A>(grad_out[i]) * weight[i] - normed * mean);
    grad_weight[i] += static_cast<A>(grad_out[i]) * static_cast<A>(static_cast<T>(normed));
  }
}

// to = round(row), or round(to + row).
template <typename A, typename T>
inline void store_row(const A* row, bool accumulate, T* to, int64_t n) {
  if (accumulate) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(static_cast<A>(to[i]) + row[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(row[i]);
  }
}

template <typename A, typename T>
inline void add_row(const T* from, A* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] += static_cast<A>(from[i]);
}

// One row's share of the router's gradient: grad_x += z * weight, grad_weight += z * x.
template <typename A, typename T>
inline void router_backward_row(A z, const A* weight, const T* x, T* grad_x, double* grad_weight,
                                int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    grad_x[i] = static_cast<T>(static_cast<A>(grad_x[i]) + z * weight[i]);
    grad_weight[i] += z * static_cast<A>(x[i]);
  }
}

// Parameter gradients are summed over this many chunks of rows, whatever the number of threads, and
// the partial sums are added in chunk order. They are sums over all rows, hence in double.
constexpr int64_t kChunks = 16;

// One gradient of `size` entries per chunk.
class PartialSums {
 public:
  explicit PartialSums(int64_t size) : size_(size), sums_(kChunks * size) {}
  double* chunk(int64_t c) { return sums_.data() + c * size_; }

  template <typename A>
  void write(A* total) const {
    for (int64_t i = 0; i < size_; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < kChunks; ++c) sum += sums_[c * size_ + i];
      total[i] = static_cast<A>(sum);
    }
  }

 private:
  int64_t size_;
  std::vector<double> sums_;
};

}  // namespace pmod::cpu
