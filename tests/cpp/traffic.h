// The rows that a loop reads and writes, counted in cache lines.
#pragma once

#include <doctest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "cpu/isa/dispatch.h"
#include "cpu/rows/loops.h"

namespace pmod::test {

struct Traffic {
  double read = 0, written = 0;  // rows
};

// The lines of one matrix, and which of them were touched.
struct Region {
  const char* begin;
  int64_t bytes;
  std::vector<bool> read, written;
};

class Counter {
 public:
  void add(const void* begin, int64_t bytes) {
    const size_t lines = (bytes + cpu::kCacheLine - 1) / cpu::kCacheLine;
    const std::vector<bool> none(lines);
    regions_.push_back({static_cast<const char*>(begin), bytes, none, none});
  }

  void touch(const void* at, int64_t bytes, std::vector<bool> Region::* lines) {
    for (Region& region : regions_) {
      const int64_t first = static_cast<const char*>(at) - region.begin;
      if (first < 0 || first + bytes > region.bytes) continue;
      for (int64_t i = first / cpu::kCacheLine; i <= (first + bytes - 1) / cpu::kCacheLine; ++i) {
        (region.*lines)[i] = true;
      }
      return;
    }
    ++elsewhere_;
  }

  Traffic rows(int64_t row_bytes) const {
    CHECK(elsewhere_ == 0);
    Traffic lines;
    for (const Region& region : regions_) {
      lines.read += static_cast<double>(std::count(region.read.begin(), region.read.end(), true));
      lines.written +=
          static_cast<double>(std::count(region.written.begin(), region.written.end(), true));
    }
    const double per_row = static_cast<double>(row_bytes) / cpu::kCacheLine;
    return {lines.read / per_row, lines.written / per_row};
  }

 private:
  std::vector<Region> regions_;
  int64_t elsewhere_ = 0;  // accesses to rows that nobody added
};

// What the loops report to.
inline Counter* counter = nullptr;

struct Size {
  int64_t rows, kept, hidden;
};

// One call of one op, of a layer with `rows` rows that keeps `kept` of them, spread evenly.
template <typename T>
struct Layer : Size {
  using A = Acc<T>;
  std::vector<int32_t> index, inverse;
  std::vector<uint8_t> kind;
  std::vector<A> weight, gate, rstd, of_rows, more_of_rows;
  const cpu::RowLoops<T>& loops = cpu::base::row_loops<T>();

  explicit Layer(const Size& size)
      : Size(size),
        inverse(rows, -1),
        kind(rows, kRoutable),
        weight(cpu::padded(hidden), A(1)),
        gate(rows, A(1)),
        rstd(kept, A(1)),
        of_rows(rows),
        more_of_rows(rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if ((r + 1) * kept / rows == r * kept / rows) continue;
      inverse[r] = static_cast<int32_t>(index.size());
      index.push_back(static_cast<int32_t>(r));
    }
  }

  // Rows that count.
  T* matrix(int64_t number) {
    matrices_.emplace_back(number * hidden, 0);
    T* data = matrices_.back().data();
    std::fill_n(data, number * hidden, nearest<T>(1.0));
    counter_.add(data, number * hidden * int64_t{sizeof(T)});
    return data;
  }

  cpu::ParameterSum<A> sum() {
    blocks_.emplace_back(cpu::padded(hidden));
    totals_.emplace_back(cpu::padded(hidden));
    return {.block = blocks_.back().data(), .total = totals_.back().data()};
  }

  template <typename F>
  Traffic count(const F& call) {
    counter = &counter_;
    call();
    counter = nullptr;
    return counter_.rows(hidden * int64_t{sizeof(T)});
  }

 private:
  Counter counter_;
  std::vector<Buffer<T>> matrices_;
  std::vector<std::vector<A>> blocks_;
  std::vector<std::vector<double>> totals_;
};

}  // namespace pmod::test
