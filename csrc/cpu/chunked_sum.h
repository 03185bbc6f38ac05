// The gradient of a parameter: a sum over rows, in an order that does not depend on the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/adapter.h"

namespace pmod::cpu {

// How rows are cut for such sums; it depends on their number alone.
class Chunks {
 public:
  explicit Chunks(int64_t rows)
      : rows_(rows), count_(std::min<int64_t>((rows + kLeastRows - 1) / kLeastRows, kMost)) {}

  [[nodiscard]] int64_t count() const { return count_; }

  // Calls f(chunk, first row, end row), chunks in parallel.
  template <typename F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c, c * rows_ / count_, (c + 1) * rows_ / count_);
    });
  }

 private:
  static constexpr int64_t kLeastRows = 128;  // a chunk costs as much as a few rows
  static constexpr int64_t kMost = 64;
  int64_t rows_, count_;
};

// `size` entries per chunk, for rows of T; none at all for a parameter that is absent (size 0).
template <typename T>
class ChunkedSum {
 public:
  using A = Acc<T>;

  ChunkedSum(const Chunks& chunks, int64_t size)
      : count_(chunks.count()),
        size_(size),
        blocks_(count_ * padded(size)),
        totals_(count_ * padded(size)) {}

  ParameterSum<A> chunk(int64_t c) {
    if (size_ == 0) return {};
    const int64_t at = c * padded(size_);
    return {.block = blocks_.data() + at, .total = totals_.data() + at};
  }

  void write(A* out) const {
    const int64_t size = padded(size_);
    std::vector<double> sum(size);
    for (int64_t c = 0; c < count_; ++c) {
      for (int64_t i = 0; i < size; ++i) sum[i] += totals_.data()[c * size + i];
    }
    const std::vector<A> blocks(sum.begin(), sum.end());
    std::vector<A> elements(size);
    row_loops<T>().restore(blocks.data(), elements.data(), size);
    std::copy_n(elements.begin(), size_, out);
  }

 private:
  int64_t count_, size_;
  AlignedArray<A> blocks_;
  AlignedArray<double> totals_;
};

template <typename A>
A sum_of(const std::vector<A>& values) {
  double sum = 0;
  for (const A value : values) sum += value;
  return static_cast<A>(sum);
}

}  // namespace pmod::cpu
