// Every row loop as a function from a problem to buffers, with a check against a scalar reference.
#pragma once

#include <doctest.h>

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "bounded.h"
#include "buffer.h"
#include "cpu/isa/dispatch.h"
#include "cpu/rows/loops.h"
#include "problem.h"

namespace pmod::test {

// The switches of an op, which has names for them.
struct Flags {
  unsigned bits;
  bool operator[](int i) const { return ((bits >> i) & 1) != 0; }
};

enum class Cover : uint8_t { kAll, kEmptyRanges, kNothing };

// How a loop is called: from which table, on what, and with the rows cut into which ranges.
template <typename T>
struct Setting {
  using A = Acc<T>;
  const cpu::RowLoops<T>& loops;
  const Problem<T>& p;
  bool streaming = false;
  int threads = 1;
  Cover cover = Cover::kAll;
  bool packed_weights = true;

  // As many ranges as threads, one each.
  template <typename F>
  void for_ranges(int64_t count, const F& f) const {
    if (cover == Cover::kNothing) return;
    if (cover == Cover::kEmptyRanges) {
      f(int64_t{0}, int64_t{0});
      return f(count, count);
    }
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) {
      others.emplace_back(
          [&f, t, count, this] { f(t * count / threads, (t + 1) * count / threads); });
    }
    f(int64_t{0}, count / threads);
    for (std::thread& other : others) other.join();
  }

  // Chunks of a fixed size, however many threads there are: a parameter's sum depends on them.
  static constexpr int64_t kChunkRows = 2 * cpu::kBlockRows + 3;
  static int64_t chunks(int64_t count) { return (count + kChunkRows - 1) / kChunkRows; }
  template <typename F>
  void for_chunks(int64_t count, const F& f) const {
    if (cover != Cover::kAll) {
      return for_ranges(count, [&](int64_t begin, int64_t end) { f(int64_t{0}, begin, end); });
    }
    for_ranges(chunks(count), [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        f(c, c * kChunkRows, std::min(count, (c + 1) * kChunkRows));
      }
    });
  }

  // Owns what a loop reads of a weight, whose entries are those of some T.
  struct OwnedWeight {
    std::vector<T> packed;
    std::vector<A> blocks;
    cpu::Weight<T> get() const {
      if (!packed.empty()) return {.packed = packed.data()};
      return {.blocks = blocks.data()};
    }
  };
  OwnedWeight weight(const std::vector<A>& elements) const {
    OwnedWeight out;
    if (packed_weights) {
      for (const A element : elements) out.packed.push_back(nearest<T>(element));
    } else {
      out.blocks.resize(elements.size());
      loops.arrange(elements.data(), out.blocks.data(), static_cast<int64_t>(elements.size()));
    }
    return out;
  }
};

// A parameter's gradient: a sum per chunk, then those in order. None at all if it is not `wanted`.
template <typename T>
class ParameterGradient {
 public:
  using A = Acc<T>;

  ParameterGradient(const Setting<T>& setting, int64_t rows, bool wanted)
      : setting_(setting),
        size_(wanted ? cpu::padded(setting.p.hidden) : 0),
        blocks_(size_ * setting.chunks(rows), static_cast<A>(start())),
        totals_(size_ * setting.chunks(rows), start()) {}

  cpu::ParameterSum<A> chunk(int64_t c) {
    if (size_ == 0) return {};
    return {.block = blocks_.data() + c * size_, .total = totals_.data() + c * size_};
  }

  std::vector<A> elements() const {
    std::vector<double> sum(size_);
    for (size_t i = 0; i < totals_.size(); ++i) sum[i % size_] += totals_[i];
    const std::vector<A> blocks(sum.begin(), sum.end());
    std::vector<A> out(size_);
    setting_.loops.restore(blocks.data(), out.data(), size_);
    if (size_ > 0) out.resize(setting_.p.hidden);
    return out;
  }

 private:
  // What was in a sum does not matter, unless nothing is added.
  double start() const {
    return setting_.cover == Cover::kAll ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  }

  const Setting<T>& setting_;
  int64_t size_;
  std::vector<A> blocks_;
  std::vector<double> totals_;
};

// A term of a parameter's gradient is added to a block of rows, and the block to a float64 total.
template <typename T>
int64_t column_depth(int64_t rows) {
  const int64_t chunks = Setting<T>::chunks(rows), blocks = rows / cpu::kBlockRows + chunks;
  return cpu::kBlockRows + blocks + chunks + 1;
}

template <typename T>
struct Outputs {
  std::map<std::string, Buffer<T>> rows;
  std::map<std::string, std::vector<Acc<T>>> values;
  bool finite = true;
};

template <typename T>
struct Op {
  std::string name;
  int num_flags;
  Outputs<T> (*run)(const Setting<T>&, Flags);
  void (*check)(const Problem<T>&, Flags, const Outputs<T>&);

  // Every combination of flags, or some, among them none and all.
  std::vector<Flags> variants(bool all) const {
    std::vector<Flags> out;
    const unsigned end = 1U << num_flags;
    for (unsigned bits = 0; bits < end; ++bits) {
      if (all || bits == 0 || bits % 11 == 5 || bits == end - 1) out.push_back({bits});
    }
    return out;
  }
};

template <typename T>
void append_gathers(std::vector<Op<T>>& ops);
template <typename T>
void append_norm_backwards(std::vector<Op<T>>& ops);
template <typename T>
void append_scatters(std::vector<Op<T>>& ops);

// Calls f for every pair of op and flags.
template <typename T, typename F>
void for_variants(bool all, const F& f) {
  std::vector<Op<T>> ops;
  append_gathers(ops);
  append_norm_backwards(ops);
  append_scatters(ops);
  for (const Op<T>& op : ops) {
    for (const Flags flags : op.variants(all)) {
      INFO(Format<T>::name, " ", op.name, " flags ", flags.bits);
      f(op, flags);
    }
  }
}

template <typename T>
const cpu::RowLoops<T>& loops_of(cpu::Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case cpu::Isa::kAvx512Bf16:
      return cpu::avx512_bf16::row_loops<T>();
    case cpu::Isa::kAvx512:
      return cpu::avx512::row_loops<T>();
    case cpu::Isa::kAvx2:
      return cpu::avx2::row_loops<T>();
#endif
    default:
      return cpu::base::row_loops<T>();
  }
}

}  // namespace pmod::test
