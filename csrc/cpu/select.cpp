// The selection of pmod::route and pmod::select: reference.select.
//
// Rows are listed by pool (a counting sort, so that pools may interleave), each pool finds the key
// of its k-th largest logit in O(n), and keeps what is above it and the first rows that equal it.
// One sweep per sequence then hands out slots in row order. Pools run in parallel; no two tasks
// write the same row. Reads and writes a few integers per row, no rows of x.

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

// Calls f(row, pool) for every routable row, ascending.
template <typename F>
void for_routable(const Plan& plan, const F& f) {
  const uint8_t* kind = plan.kind.const_data_ptr<uint8_t>();
  const int32_t* bounds = plan.cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* pool = plan.pool_id ? plan.pool_id->const_data_ptr<int32_t>() : nullptr;
  for (int64_t b = 0; b + 1 < plan.cu_seqlens.numel(); ++b) {
    for (int32_t r = bounds[b]; r < bounds[b + 1]; ++r) {
      if (kind[r] == kRoutable) f(r, pool ? int64_t{pool[r]} : b);
    }
  }
}

Pools list_pools(const char* op, const Plan& plan) {
  const int64_t num_pools = plan.k.numel();
  Pools pools;
  pools.first.resize(num_pools + 1);
  for_routable(plan, [&](int32_t row, int64_t p) {
    check(p >= 0 && p < num_pools, "pmod_ops.", op, ": pool_id[", row, "]: expected 0..",
          num_pools - 1, ", got ", p);
    ++pools.first[p + 1];
  });
  for (int64_t p = 0; p < num_pools; ++p) pools.first[p + 1] += pools.first[p];
  pools.rows.resize(pools.first[num_pools]);
  std::vector<int64_t> next(pools.first.begin(), pools.first.end() - 1);
  for_routable(plan, [&](int32_t row, int64_t p) { pools.rows[next[p]++] = row; });
  return pools;
}

template <typename A>
void keep_best(const A* logits, const int32_t* rows, int64_t n, int64_t k, uint8_t* keep) {
  if (k <= 0) return;
  std::vector<SortKey<A>> keys(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = sort_key(logits[rows[i]]);
  Threshold<SortKey<A>> threshold = kth_largest(keys, k);
  for (int64_t i = 0; i < n; ++i) {
    const bool tied = keys[i] == threshold.key && threshold.ties > 0;
    if (tied) --threshold.ties;
    if (tied || keys[i] > threshold.key) keep[rows[i]] = 1;
  }
}

std::vector<uint8_t> kept_rows(const char* op, const Tensor& logits, const Plan& plan) {
  const int64_t rows = plan.kind.numel();
  const uint8_t* kind = plan.kind.const_data_ptr<uint8_t>();
  std::vector<uint8_t> keep(rows);
  for (int64_t r = 0; r < rows; ++r) keep[r] = kind[r] == kAlways;
  const Pools pools = list_pools(op, plan);
  const int32_t* k = plan.k.const_data_ptr<int32_t>();
  dispatch_rows(op, "logits", logits, [&](auto type) {
    using A = typename decltype(type)::A;
    const A* values = logits.const_data_ptr<A>();
    torch::stable::parallel_for(0, plan.k.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t n = pools.first[p + 1] - pools.first[p];
        const int64_t budget = std::min<int64_t>(k[p], n);
        keep_best(values, pools.rows.data() + pools.first[p], n, budget, keep.data());
      }
    });
  });
  return keep;
}

}  // namespace

std::tuple<Tensor, Tensor> select_rows(const char* op, const Tensor& logits, const Plan& plan) {
  const std::vector<uint8_t> keep = kept_rows(op, logits, plan);
  const int32_t* bounds = plan.cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* start = plan.slot_start.const_data_ptr<int32_t>();
  const int64_t batch = plan.slot_start.numel();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t kept = std::count(keep.begin() + bounds[b], keep.begin() + bounds[b + 1], 1);
    check(kept == 0 || (start[b] >= 0 && start[b] + kept <= plan.num_slots), "pmod_ops.", op,
          ": slot_start[", b, "]: expected room for ", kept, " rows in ", plan.num_slots,
          " slots, got ", start[b]);
  }
  Tensor index = torch::stable::new_empty(plan.kind, {plan.num_slots}, ScalarType::Int);
  Tensor inverse = torch::stable::new_empty(plan.kind, {plan.kind.numel()}, ScalarType::Int);
  int32_t* row_of = index.mutable_data_ptr<int32_t>();
  int32_t* slot_of = inverse.mutable_data_ptr<int32_t>();
  std::fill_n(row_of, plan.num_slots, -1);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t slot = start[b];
    for (int32_t r = bounds[b]; r < bounds[b + 1]; ++r) {
      slot_of[r] = keep[r] ? slot : -1;
      if (keep[r]) row_of[slot++] = r;
    }
  }
  return {index, inverse};
}

}  // namespace pmod::cpu
