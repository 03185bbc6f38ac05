// The selection of pmod::route and pmod::select: reference.select.
//
// Each pool finds the key of its k-th largest logit in O(n), and keeps what is above it and the
// first rows that equal it. One sweep per sequence then hands out slots in row order. Pools run in
// parallel; no two tasks write the same row. Reads and writes a few integers per row, no rows of x.

#include <memory>
#include <tuple>
#include <vector>

#include "common/radix_select.h"
#include "cpu/route.h"

namespace pmod::cpu {
namespace {

// The routable rows of every pool, ascending: rows[first[p] .. first[p + 1]).
struct Pools {
  std::vector<int64_t> first;
  std::vector<int32_t> rows;
};

// One pool per sequence.
Pools list_sequences(const Plan& plan) {
  const uint8_t* kind = data<uint8_t>(plan.kind);
  const int32_t* bounds = data<int32_t>(plan.cu_seqlens);
  const int64_t batch = plan.cu_seqlens.numel() - 1;
  Pools pools;
  pools.first.resize(batch + 1);
  pools.rows.resize(plan.kind.numel() + 1);  // the last one may be written, and is not used
  int32_t* rows = pools.rows.data();
  int64_t n = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int32_t r = bounds[b]; r < bounds[b + 1]; ++r) {
      rows[n] = r;
      n += kind[r] == kRoutable ? 1 : 0;
    }
    pools.first[b + 1] = n;
  }
  return pools;
}

// Pools may interleave, hence a counting sort.
Pools list_pools(const char* op, const Plan& plan) {
  const uint8_t* kind = data<uint8_t>(plan.kind);
  const int32_t* pool = data<int32_t>(plan.pool_id);
  const int64_t num_rows = plan.kind.numel(), num_pools = plan.k.numel();
  Pools pools;
  pools.first.resize(num_pools + 1);
  for (int64_t r = 0; r < num_rows; ++r) {
    if (kind[r] != kRoutable) continue;
    check(pool[r] >= 0 && pool[r] < num_pools, "pmod_ops.", op, ": pool_id[", r, "]: expected 0..",
          num_pools - 1, ", got ", pool[r]);
    ++pools.first[pool[r] + 1];
  }
  for (int64_t p = 0; p < num_pools; ++p) pools.first[p + 1] += pools.first[p];
  pools.rows.resize(pools.first[num_pools]);
  std::vector<int64_t> next(pools.first.begin(), pools.first.end() - 1);
  for (int64_t r = 0; r < num_rows; ++r) {
    if (kind[r] == kRoutable) pools.rows[next[pool[r]]++] = static_cast<int32_t>(r);
  }
  return pools;
}

template <typename A>
void keep_best(const A* logits, const int32_t* rows, int64_t n, int64_t k, uint8_t* keep) {
  if (k <= 0) return;
  const std::unique_ptr<SortKey<A>[]> keys(new SortKey<A>[n]);
  for (int64_t i = 0; i < n; ++i) keys[i] = sort_key(logits[rows[i]]);
  Threshold<SortKey<A>> threshold = kth_largest(keys.get(), n, k);
  for (int64_t i = 0; i < n; ++i) {
    // no branches: whether a logit is kept cannot be predicted
    const auto tied = static_cast<int64_t>((keys[i] == threshold.key) & (threshold.ties > 0));
    threshold.ties -= tied;
    keep[rows[i]] = static_cast<uint8_t>(tied | static_cast<int64_t>(keys[i] > threshold.key));
  }
}

std::vector<uint8_t> kept_rows(const char* op, const Tensor& logits, const Plan& plan) {
  const int64_t rows = plan.kind.numel(), num_pools = plan.k.numel();
  const uint8_t* kind = data<uint8_t>(plan.kind);
  std::vector<uint8_t> keep(rows);
  uint8_t* is_kept = keep.data();
  for (int64_t r = 0; r < rows; ++r) is_kept[r] = kind[r] == kAlways ? 1 : 0;
  const Pools pools = plan.pool_id ? list_pools(op, plan) : list_sequences(plan);
  const int32_t* k = data<int32_t>(plan.k);
  // a pool of a few thousand rows takes less time than waking a thread
  const int64_t grain = std::max<int64_t>(1, 8192 * num_pools / std::max<int64_t>(1, rows));
  dispatch_rows(op, "logits", logits, [&](auto type) {
    using A = typename decltype(type)::A;
    const A* values = data<A>(logits);
    torch::stable::parallel_for(0, num_pools, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t n = pools.first[p + 1] - pools.first[p];
        const int64_t budget = std::min<int64_t>(k[p], n);
        keep_best(values, pools.rows.data() + pools.first[p], n, budget, is_kept);
      }
    });
  });
  return keep;
}

}  // namespace

std::tuple<Tensor, Tensor> select_rows(const char* op, const Tensor& logits, const Plan& plan) {
  const std::vector<uint8_t> keep = kept_rows(op, logits, plan);
  const uint8_t* is_kept = keep.data();
  const int32_t* bounds = data<int32_t>(plan.cu_seqlens);
  const int32_t* start = data<int32_t>(plan.slot_start);
  const int64_t batch = plan.slot_start.numel();
  std::vector<int64_t> kept(batch);
  for (int64_t b = 0; b < batch; ++b) {
    for (int32_t r = bounds[b]; r < bounds[b + 1]; ++r) kept[b] += is_kept[r];
    check(kept[b] == 0 || (start[b] >= 0 && start[b] + kept[b] <= plan.num_slots), "pmod_ops.", op,
          ": slot_start[", b, "]: expected room for ", kept[b], " rows in ", plan.num_slots,
          " slots, got ", start[b]);
  }
  Tensor index = allocate({plan.num_slots}, ScalarType::Int);
  Tensor inverse = allocate({plan.kind.numel()}, ScalarType::Int);
  int32_t* row_of = mutable_data<int32_t>(index);
  int32_t* slot_of = mutable_data<int32_t>(inverse);
  std::fill_n(row_of, plan.num_slots, -1);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t slot = start[b], r = bounds[b];
    const auto end = static_cast<int32_t>(slot + kept[b]);
    for (; slot < end; ++r) {
      // no branches, as above: a row that is not kept (0) leaves its slot to the next one
      row_of[slot] = r;
      slot_of[r] = (slot + 1) * is_kept[r] - 1;
      slot += is_kept[r];
    }
    std::fill(slot_of + r, slot_of + bounds[b + 1], -1);
  }
  return {index, inverse};
}

}  // namespace pmod::cpu
