// Every row kernel, run on the CPU, against a scalar reference.

#include <doctest.h>

#include <cmath>

#include "cuda/dispatch.h"
#include "cuda/dot.cuh"
#include "device.h"

namespace pmod::test {
namespace {

// One element, parts of a vector and of a warp, a real model, and rows that are too long for the
// registers of a block, with and without vectors.
constexpr int64_t kHiddenSizes[] = {1, 17, 64, 65, 200, 4096, 4099, 16392};
bool thorough(int64_t hidden) { return hidden == 64 || hidden == 65; }  // with all flags

int64_t rows_for(int64_t hidden) { return hidden > 1000 ? 11 : 43; }

template <typename T, typename F>
void for_variants(bool all, const F& f) {
  std::vector<DeviceOp<T>> ops;
  append_forward(ops);
  append_backward(ops);
  append_scatter(ops);
  for (const DeviceOp<T>& op : ops) {
    const unsigned end = 1U << op.num_flags;
    for (unsigned bits = 0; bits < end; ++bits) {
      if (!all && bits != 0 && bits % 11 != 5 && bits != end - 1) continue;
      INFO(Format<T>::name, " ", op.name, " flags ", bits);
      f(op, Flags{bits});
    }
  }
}

template <typename T>
void check_same(const Outputs<T>& a, const Outputs<T>& b) {
  CHECK(a.finite == b.finite);
  for (const auto& [name, rows] : a.rows) {
    INFO(name);
    const Buffer<T>& others = b.rows.at(name);
    REQUIRE(rows.size() == others.size());
    int64_t different = 0;
    for (int64_t i = 0; i < rows.size(); ++i) different += same_number(rows[i], others[i]) ? 0 : 1;
    CHECK(different == 0);
  }
  for (const auto& [name, values] : a.values) {
    INFO(name);
    const auto& others = b.values.at(name);
    REQUIRE(values.size() == others.size());
    int64_t different = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      different += same_number(values[i], others[i]) ? 0 : 1;
    }
    CHECK(different == 0);
  }
}

TEST_CASE_TEMPLATE("every row kernel equals its reference", T, float, Bf16, F16) {
  largest_share = 0;
  for (const int64_t hidden : kHiddenSizes) {
    for (const int64_t offset : {0, 1}) {
      if (hidden > 10000 && offset == 1) continue;
      const Problem<T> problem(rows_for(hidden), hidden, offset);
      for (const bool wide : {false, true}) {
        const Device<T> device(problem, wide);
        for_variants<T>(thorough(hidden), [&](const DeviceOp<T>& op, Flags flags) {
          INFO("hidden ", hidden, " offset ", offset, " float weights ", wide);
          op.check(problem, flags, op.run(device, flags));
        });
      }
    }
  }
  MESSAGE(Format<T>::name, ": the largest error is ", largest_share, " of its bound");
}

TEST_CASE_TEMPLATE("the order of threads and blocks changes nothing", T, float, Bf16, F16) {
  for (const int64_t hidden : {200, 65}) {
    const Problem<T> problem(70, hidden, 0);
    const Device<T> device(problem, false);
    for_variants<T>(false, [&](const DeviceOp<T>& op, Flags flags) {
      const Outputs<T> in_order = op.run(device, flags);
      for (const uint64_t seed : {1, 2, 3}) {
        INFO("hidden ", hidden, " seed ", seed);
        const simt::ScopedOptions random({.os_threads = 1, .seed = seed, .resident_blocks = 4});
        check_same(in_order, op.run(device, flags));
      }
    });
  }
}

TEST_CASE_TEMPLATE("no rows and no slots are no work", T, float, Bf16, F16) {
  const Problem<T> problem(0, 64, 0);
  Problem<T> no_slots(43, 64, 0);
  no_slots.slots = 0;
  no_slots.index.clear();
  std::fill(no_slots.inverse.begin(), no_slots.inverse.end(), -1);
  for (const Problem<T>* p : {&problem, static_cast<const Problem<T>*>(&no_slots)}) {
    const Device<T> device(*p, false);
    for_variants<T>(true, [&](const DeviceOp<T>& op, Flags flags) {
      op.check(*p, flags, op.run(device, flags));
    });
  }
}

}  // namespace
}  // namespace pmod::test
