// Every row loop, row type and instruction set against a scalar reference, and all of them against
// each other, bit by bit.

#include <doctest.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <string>

#include "expect.h"
#include "ops.h"

namespace pmod::test {
namespace {

// One element, parts of a block, blocks with and without a rest, and the size of a real model.
constexpr int64_t kHiddenSizes[] = {1, 17, 63, 64, 65, 128, 200, 4096};
bool thorough(int64_t hidden) { return hidden == 64 || hidden == 65; }  // with all flags

int64_t rows_for(int64_t hidden) { return hidden > 1000 ? 11 : 43; }

template <typename T>
void check_same(const Outputs<T>& a, const Outputs<T>& b) {
  CHECK(a.finite == b.finite);
  REQUIRE(a.rows.size() == b.rows.size());
  for (const auto& [name, rows] : a.rows) {
    INFO(name);
    const Buffer<T>& others = b.rows.at(name);
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

// A hash of numbers (FNV-1a), for processors that cannot be compared in one process.
class Digest {
 public:
  template <typename T>
  void add(const Outputs<T>& out) {
    for (const auto& [name, rows] : out.rows) add(rows.data(), rows.size());
    for (const auto& [name, values] : out.values) {
      add(values.data(), static_cast<int64_t>(values.size()));
    }
  }

  // In the file that PMOD_BITS_FILE names, if any: one line per row type.
  void record(const std::string& name) const {
    static std::map<std::string, uint64_t> digests;
    digests[name] = state_;
    const char* path = std::getenv("PMOD_BITS_FILE");
    if (path == nullptr) return;
    std::ofstream file(path);
    for (const auto& [of, digest] : digests) file << of << " " << std::hex << digest << "\n";
    CHECK(file.good());
  }

 private:
  template <typename T>
  void add(const T* numbers, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      const bool nan = std::isnan(value(numbers[i]));
      state_ = (state_ ^ (nan ? 1 : bits_of(numbers[i]))) * 0x100000001B3U;
    }
  }

  uint64_t state_ = 0xCBF29CE484222325U;
};

TEST_CASE_TEMPLATE("every loop equals its reference at every level", T, float, double, Bf16, F16) {
  largest_share = 0;
  Digest digest;
  for (const int64_t hidden : kHiddenSizes) {
    for (const int64_t offset : {0, 1}) {
      const Problem<T> problem(rows_for(hidden), hidden, offset);
      for_variants<T>(thorough(hidden), [&](const Op<T>& op, Flags flags) {
        Outputs<T> first;
        for (const cpu::Isa isa : cpu::available_isas()) {
          INFO("hidden ", hidden, " offset ", offset, " ", cpu::isa_name(isa));
          const Setting<T> setting{.loops = loops_of<T>(isa), .p = problem};
          Outputs<T> out = op.run(setting, flags);
          op.check(problem, flags, out);
          if (isa == cpu::Isa::kBase) {
            digest.add(out);
            first = std::move(out);
          } else {
            check_same(first, out);
          }
        }
      });
    }
  }
  digest.record(Format<T>::name);
  MESSAGE(Format<T>::name, ": the largest error is ", largest_share, " of its bound");
}

TEST_CASE_TEMPLATE("stores past the cache change nothing", T, float, double, Bf16, F16) {
  for (const int64_t hidden : {64, 256}) {
    const Problem<T> problem(43, hidden, 0);
    for (const cpu::Isa isa : cpu::available_isas()) {
      INFO("hidden ", hidden, " ", cpu::isa_name(isa));
      for_variants<T>(hidden == 64, [&](const Op<T>& op, Flags flags) {
        Setting<T> setting{.loops = loops_of<T>(isa), .p = problem};
        const Outputs<T> usual = op.run(setting, flags);
        setting.streaming = true;
        check_same(usual, op.run(setting, flags));
      });
    }
  }
}

TEST_CASE_TEMPLATE("a weight gives the same bits in either form", T, float, double, Bf16, F16) {
  for (const int64_t hidden : {65, 256}) {
    const Problem<T> problem(43, hidden, 0);
    for (const cpu::Isa isa : cpu::available_isas()) {
      INFO("hidden ", hidden, " ", cpu::isa_name(isa));
      for_variants<T>(false, [&](const Op<T>& op, Flags flags) {
        Setting<T> setting{.loops = loops_of<T>(isa), .p = problem};
        const Outputs<T> packed = op.run(setting, flags);
        setting.packed_weights = false;
        check_same(packed, op.run(setting, flags));
      });
    }
  }
}

TEST_CASE_TEMPLATE("an empty range touches nothing", T, float, double, Bf16, F16) {
  const Problem<T> problem(43, 64, 0);
  for (const cpu::Isa isa : cpu::available_isas()) {
    for_variants<T>(false, [&](const Op<T>& op, Flags flags) {
      Setting<T> setting{.loops = loops_of<T>(isa), .p = problem, .streaming = true};
      setting.cover = Cover::kNothing;
      const Outputs<T> nothing = op.run(setting, flags);
      setting.cover = Cover::kEmptyRanges;
      check_same(nothing, op.run(setting, flags));
    });
  }
}

TEST_CASE_TEMPLATE("threads change nothing", T, float, double, Bf16, F16) {
  for (const int64_t hidden : {64, 65}) {
    const Problem<T> problem(150, hidden, hidden % 2);
    for (const cpu::Isa isa : cpu::available_isas()) {
      INFO("hidden ", hidden, " ", cpu::isa_name(isa));
      for_variants<T>(false, [&](const Op<T>& op, Flags flags) {
        Setting<T> setting{.loops = loops_of<T>(isa), .p = problem, .streaming = hidden == 64};
        const Outputs<T> alone = op.run(setting, flags);
        for (const int threads : {2, 8}) {
          setting.threads = threads;
          check_same(alone, op.run(setting, flags));
        }
      });
    }
  }
}

// Products of denormal numbers are too small for a float, so a bfloat16 denormal comes from one
// that went in.
TEST_CASE_TEMPLATE("special numbers give the same bits at every level", T, float, double, Bf16,
                   F16) {
  for (const bool denormals : {false, true}) {
    Problem<T> problem(43, 65, 1);
    problem.sprinkle(denormals);
    for_variants<T>(true, [&](const Op<T>& op, Flags flags) {
      const Outputs<T> base = op.run({.loops = loops_of<T>(cpu::Isa::kBase), .p = problem}, flags);
      for (const cpu::Isa isa : cpu::available_isas()) {
        // this one takes them for zero: codec_test.cpp
        const bool flushes = std::is_same_v<T, Bf16> && isa == cpu::Isa::kAvx512Bf16;
        if (denormals && flushes) continue;
        INFO(cpu::isa_name(isa), " denormals ", denormals);
        check_same(base, op.run({.loops = loops_of<T>(isa), .p = problem}, flags));
      }
    });
  }
}

// What one entry of a row that is not kept does to the flag, and to the entries beside it.
template <typename T>
bool finite_with(cpu::Isa isa, double entry, uint8_t kind, int64_t i) {
  constexpr int64_t kHidden = 100;
  Buffer<T> x(3 * kHidden, 0), out(3 * kHidden, 0);
  std::fill_n(x.data(), 3 * kHidden, nearest<T>(1.0));
  x[kHidden + i] = nearest<T>(entry);
  const Acc<T> gate[] = {1, 1, 1};
  const int32_t inverse[] = {-1, -1, -1};
  const uint8_t kinds[] = {kRoutable, kind, kRoutable};
  const cpu::WeightedScatterAdd<T> loop{.x = x.data(),
                                        .residual = nullptr,
                                        .update = nullptr,
                                        .gate = gate,
                                        .inverse = inverse,
                                        .kind = kinds,
                                        .out = out.data(),
                                        .next_weight = {},
                                        .next_bias = 0,
                                        .next_logits = nullptr,
                                        .hidden = kHidden,
                                        .gate_mlp = true,
                                        .scale_skipped = true,
                                        .check_finite = true,
                                        .streaming = false};
  const bool finite = loops_of<T>(isa).weighted_scatter_add(loop, 0, 3);
  for (int64_t j = 0; j < 3 * kHidden; ++j) {
    if (j != kHidden + i) REQUIRE(value(out[j]) == 1.0);
  }
  return finite;
}

TEST_CASE_TEMPLATE("the finite flag sees every entry but those of padding", T, float, double, Bf16,
                   F16) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const cpu::Isa isa : cpu::available_isas()) {
    INFO(cpu::isa_name(isa));
    for (int64_t i = 0; i < 100; ++i) {
      for (const double entry : {infinity, -infinity, std::nan("")}) {
        CHECK_FALSE(finite_with<T>(isa, entry, kRoutable, i));
        CHECK_FALSE(finite_with<T>(isa, entry, kAlways, i));
        CHECK(finite_with<T>(isa, entry, kPadding, i));
      }
      CHECK(finite_with<T>(isa, 60000.0, kRoutable, i));
    }
  }
}

TEST_CASE_TEMPLATE("arrange and restore are inverse, block by block", T, float, double, Bf16, F16) {
  constexpr int64_t kSize = 3 * cpu::kLanes;
  for (const cpu::Isa isa : cpu::available_isas()) {
    INFO(cpu::isa_name(isa));
    std::vector<Acc<T>> elements(kSize), blocks(kSize), back(kSize), sorted(kSize);
    for (int64_t i = 0; i < kSize; ++i) elements[i] = static_cast<Acc<T>>(i);
    loops_of<T>(isa).arrange(elements.data(), blocks.data(), kSize);
    loops_of<T>(isa).restore(blocks.data(), back.data(), kSize);
    CHECK(back == elements);
    for (auto block = blocks.begin(); block != blocks.end(); block += cpu::kLanes) {
      std::sort(block, block + cpu::kLanes);
    }
    CHECK(blocks == elements);
  }
}

}  // namespace
}  // namespace pmod::test
