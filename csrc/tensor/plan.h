// The arguments of pmod::select that come from a routing plan: types and shapes, not contents.
#pragma once

#include "tensor/arguments.h"

namespace pmod {

struct Plan {
  Tensor kind;             // [N]
  Tensor cu_seqlens;       // [B + 1]
  OptionalTensor pool_id;  // [N]
  Tensor k;                // [P]
  Tensor slot_start;       // [B]
  int64_t num_slots;
  int64_t max_length;  // rows of the longest sequence, or more
};

inline Tensor check_kind(const char* op, const Tensor& kind, int64_t rows) {
  return vector(op, "kind", kind, ScalarType::Byte, rows);
}

inline Tensor check_bounds(const char* op, const Tensor& cu_seqlens) {
  Tensor bounds = vector(op, "cu_seqlens", cu_seqlens, ScalarType::Int, -1);
  check(bounds.numel() >= 1, "pmod_ops.", op, ": cu_seqlens: expected B + 1 entries, got none");
  return bounds;
}

inline Plan check_shapes(const char* op, const Tensor& kind, const Tensor& cu_seqlens,
                         const OptionalTensor& pool_id, const Tensor& k, const Tensor& slot_start,
                         int64_t num_slots, int64_t max_length, int64_t rows) {
  const Tensor bounds = check_bounds(op, cu_seqlens);
  const int64_t batch = bounds.numel() - 1;
  check(num_slots >= 0, "pmod_ops.", op, ": num_slots: expected >= 0, got ", num_slots);
  check(max_length >= 0, "pmod_ops.", op, ": max_length: expected >= 0, got ", max_length);
  return {.kind = check_kind(op, kind, rows),
          .cu_seqlens = bounds,
          .pool_id = vector(op, "pool_id", pool_id, ScalarType::Int, rows),
          .k = vector(op, "k", k, ScalarType::Int, pool_id ? -1 : batch),
          .slot_start = vector(op, "slot_start", slot_start, ScalarType::Int, batch),
          .num_slots = num_slots,
          .max_length = max_length};
}

}  // namespace pmod
