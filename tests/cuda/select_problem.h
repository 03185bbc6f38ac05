// A batch to select from, what launch_select makes of it, and what a stable sort does: the same,
// whatever the order in which threads, warps and blocks run.
#pragma once

#include <doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "buffer.h"
#include "cuda/launchers.h"
#include "simt.h"

namespace pmod::test {

struct SelectProblem {
  std::vector<int32_t> cu_seqlens = {0};
  std::vector<float> logits;
  std::vector<uint8_t> kind;
  std::vector<int32_t> pool_id;  // empty: one pool per sequence
  std::vector<int32_t> k;
  std::vector<int32_t> slot_start;
  int64_t slots = 0;
  cuda::Gate gate = {.scale = 0.25F, .bias = 1.0F, .activation = Activation::kTanh};
  int64_t max_length = 0;

  int64_t rows() const { return static_cast<int64_t>(kind.size()); }
  int64_t sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  int64_t pools() const { return static_cast<int64_t>(k.size()); }
  bool routable(int64_t r) const { return kind[r] == kRoutable; }

  void add_sequence(int64_t length) {
    cu_seqlens.push_back(static_cast<int32_t>(cu_seqlens.back() + length));
    logits.resize(cu_seqlens.back());
    kind.resize(cu_seqlens.back(), kRoutable);
    max_length = std::max(max_length, length);
  }
};

// NaN is largest; -0 equals +0.
inline bool ranks_above(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

inline std::vector<uint8_t> expected_keep(const SelectProblem& p) {
  std::vector<uint8_t> keep(p.rows());
  std::vector<std::vector<int32_t>> pools(p.pools());
  for (int64_t b = 0; b < p.sequences(); ++b) {
    for (int32_t r = p.cu_seqlens[b]; r < p.cu_seqlens[b + 1]; ++r) {
      keep[r] = p.kind[r] == kAlways ? 1 : 0;
      const int64_t pool = p.pool_id.empty() ? b : p.pool_id[r];
      if (p.routable(r) && pool >= 0 && pool < p.pools()) pools[pool].push_back(r);
    }
  }
  for (int64_t pool = 0; pool < p.pools(); ++pool) {
    std::vector<int32_t>& rows = pools[pool];
    std::stable_sort(rows.begin(), rows.end(),
                     [&](int32_t a, int32_t b) { return ranks_above(p.logits[a], p.logits[b]); });
    const auto n = std::clamp<int64_t>(p.k[pool], 0, static_cast<int64_t>(rows.size()));
    for (int64_t i = 0; i < n; ++i) keep[rows[i]] = 1;
  }
  return keep;
}

inline std::vector<int32_t> kept_per_sequence(const SelectProblem& p) {
  const std::vector<uint8_t> keep = expected_keep(p);
  std::vector<int32_t> kept;
  for (int64_t b = 0; b < p.sequences(); ++b) {
    kept.push_back(static_cast<int32_t>(
        std::count(keep.begin() + p.cu_seqlens[b], keep.begin() + p.cu_seqlens[b + 1], 1)));
  }
  return kept;
}

// Slots as a plan lays them out: one sequence after the other, or all as long as the longest and
// filled from the right.
inline void lay_out(SelectProblem& p, bool padded) {
  const std::vector<int32_t> kept = kept_per_sequence(p);
  const int32_t longest = kept.empty() ? 0 : *std::max_element(kept.begin(), kept.end());
  p.slot_start.clear();
  p.slots = 0;
  for (const int32_t n : kept) {
    p.slots += padded ? longest : n;
    p.slot_start.push_back(static_cast<int32_t>(p.slots - n));
  }
}

struct Selection {
  std::vector<int32_t> index, inverse;
  std::vector<float> gate;
  cuda::Status status;
};

inline Selection expected_selection(const SelectProblem& p) {
  const std::vector<uint8_t> keep = expected_keep(p);
  Selection out{.index = std::vector<int32_t>(p.slots, -1),
                .inverse = std::vector<int32_t>(p.rows(), -1),
                .gate = {},
                .status = cuda::kSuccess};
  for (int64_t b = 0; b < p.sequences(); ++b) {
    int32_t slot = p.slot_start[b];
    for (int32_t r = p.cu_seqlens[b]; r < p.cu_seqlens[b + 1]; ++r) {
      if (keep[r] == 0) continue;
      out.index[slot] = r;
      out.inverse[r] = slot++;
    }
  }
  return out;
}

template <typename T>
Buffer<T> buffer_of(const std::vector<T>& values) {
  Buffer<T> buffer(static_cast<int64_t>(values.size()), 1);
  std::copy(values.begin(), values.end(), buffer.data());
  return buffer;
}

template <typename T>
std::vector<T> values_of(const Buffer<T>& buffer) {
  return {buffer.data(), buffer.data() + buffer.size()};
}

// Threads, warps and blocks in order with seed 0, else in a random order.
inline Selection selected(const SelectProblem& p, uint64_t seed = 0) {
  const simt::ScopedOptions options({.os_threads = 1, .seed = seed});
  const auto logits = buffer_of(p.logits);
  const auto kind = buffer_of(p.kind);
  const auto cu_seqlens = buffer_of(p.cu_seqlens), pool_id = buffer_of(p.pool_id);
  const auto k = buffer_of(p.k), slot_start = buffer_of(p.slot_start);
  Buffer<float> gate(p.rows(), 1);
  Buffer<int32_t> index(p.slots, 1), inverse(p.rows(), 1);
  const int64_t bytes =
      cuda::select_scratch_bytes(p.rows(), p.sequences(), p.pools(), p.max_length);
  Buffer<uint64_t> scratch((bytes + 7) / 8, 0);
  // what another op left there must not matter
  if (seed != 0) std::fill_n(scratch.data(), scratch.size(), 0);
  const simt::AllowedMemory allowed[] = {
      simt::allow(scratch.data(), bytes, true, "scratch"),
      simt::allow(index.data(), p.slots * sizeof(int32_t), true, "index")};
  const cuda::Status status =
      cuda::launch_select(p.gate,
                          {.logits = logits.data(),
                           .kind = kind.data(),
                           .cu_seqlens = cu_seqlens.data(),
                           .pool_id = p.pool_id.empty() ? nullptr : pool_id.data(),
                           .k = k.data(),
                           .slot_start = slot_start.data(),
                           .gate = gate.data(),
                           .index = index.data(),
                           .inverse = inverse.data(),
                           .scratch = bytes == 0 ? nullptr : scratch.data(),
                           .rows = p.rows(),
                           .sequences = p.sequences(),
                           .pools = p.pools(),
                           .slots = p.slots,
                           .max_length = p.max_length},
                          nullptr);
  return {.index = values_of(index),
          .inverse = values_of(inverse),
          .gate = values_of(gate),
          .status = status};
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](float x, float y) { return bits_of(x) == bits_of(y); });
}

// Both ways to select must do it, in several orders, to the same bits.
inline void check_selection(const SelectProblem& problem) {
  const Selection expected = expected_selection(problem);
  SelectProblem p = problem;
  const int64_t longest = p.max_length;
  for (const bool long_way : {false, true}) {
    p.max_length = long_way ? std::max(longest, cuda::kOneBlockRows + 1) : longest;
    const Selection first = selected(p);
    for (const uint64_t seed : {0, 1, 2}) {
      INFO("long way ", long_way, " rows ", p.rows(), " seed ", seed);
      const Selection out = seed == 0 ? first : selected(p, seed);
      REQUIRE(out.status == cuda::kSuccess);
      REQUIRE(out.index == expected.index);
      REQUIRE(out.inverse == expected.inverse);
      REQUIRE(same_bits(out.gate, first.gate));
    }
    if (longest > cuda::kOneBlockRows) break;
  }
}

inline void check_both_layouts(SelectProblem p) {
  for (const bool padded : {false, true}) {
    lay_out(p, padded);
    check_selection(p);
  }
}

inline void set_random_kinds(SelectProblem& p, Random& random) {
  for (uint8_t& kind : p.kind) {
    const int64_t die = random.below(10);
    kind = die == 0 ? kPadding : die == 1 ? kAlways : kRoutable;
  }
}

inline void set_random_logits(SelectProblem& p, Random& random) {
  for (float& logit : p.logits) logit = static_cast<float>(random.normal());
}

inline SelectProblem one_sequence(int64_t rows, Random& random) {
  SelectProblem p;
  p.add_sequence(rows);
  set_random_kinds(p, random);
  set_random_logits(p, random);
  return p;
}

}  // namespace pmod::test
