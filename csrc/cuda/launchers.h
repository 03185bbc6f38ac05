// The launchers: one function per kernel family, plain pointers and a stream. Host code without
// torch; adapters (csrc/cuda/X.cpp) call them with checked arguments, after they have allocated
// every output and all scratch. A launcher neither allocates nor waits.
//
// N rows of x, K slots (kept rows, and filler whose index is -1), D = hidden. Null means absent
// where that is said. All pointers are to device memory.
#pragma once

#include <cstdint>

#include "common/gate.h"
#include "cuda/platform.h"

namespace pmod::cuda {

enum class RowType : uint8_t { kFloat, kBf16, kF16 };

// A parameter vector [D] in the type of rows or in float. Null data: no such parameter.
struct Parameter {
  const void* data = nullptr;
  RowType type = RowType::kFloat;
};

// One number in the type of rows or in float; null data: 0.
using Number = Parameter;

// What all launchers of one call share.
struct Rows {
  RowType type;
  int64_t hidden;
  Stream stream;
};

struct Gate {
  float scale;
  float bias;
  Activation activation;
};

// ---- route.cu

struct Score {
  const void* x = nullptr;  // [N, D]
  Parameter weight = {};
  Number bias = {};
  const uint8_t* kind = nullptr;  // [N]
  float* logits = nullptr;        // [N], 0 on rows that are not routable
  int64_t rows = 0;
};
Status launch_score(const Rows& rows, const Score& score);

// d loss / d logit of every row, 0 where it is not routable.
struct LogitGradient {
  const float* grad_logits = nullptr;  // [N] or null
  const float* grad_gate = nullptr;    // [N] or null
  const float* logits = nullptr;       // [N]
  const uint8_t* kind = nullptr;
  const int32_t* cu_seqlens = nullptr;  // [B + 1]
  float* out = nullptr;                 // [N]
  int64_t rows = 0, sequences = 0;
};
Status launch_logit_gradient(const Gate& gate, const LogitGradient& gradient, Stream stream);

// ---- select.cu

struct Select {
  const float* logits = nullptr;  // [N]
  const uint8_t* kind = nullptr;
  const int32_t* cu_seqlens = nullptr;  // [B + 1]
  const int32_t* pool_id = nullptr;     // [N], or null: one pool per sequence
  const int32_t* k = nullptr;           // [P]
  const int32_t* slot_start = nullptr;  // [B], ascending
  float* gate = nullptr;                // [N]
  int32_t* index = nullptr;             // [slots]
  int32_t* inverse = nullptr;           // [N]
  void* scratch = nullptr;              // select_scratch_bytes(...), may be null if that is 0
  int64_t rows = 0, sequences = 0, pools = 0, slots = 0;
  int64_t max_length = 0;  // rows of the longest sequence, or more
};
// Sequences of at most this many rows are selected by one block each, without scratch.
constexpr int64_t kOneBlockRows = 16384;
int64_t select_scratch_bytes(int64_t rows, int64_t sequences, int64_t pools, int64_t max_length);
Status launch_select(const Gate& gate, const Select& select, Stream stream);
// launch_select's way to select from longer sequences.
Status launch_select_long(const Gate& gate, const Select& select, Stream stream);

// ---- gather.cu

struct Gather {
  const void* x = nullptr;
  const int32_t* index = nullptr;  // [K]
  void* out = nullptr;             // [K, D], zeros in filler
  int64_t rows = 0, slots = 0;
};
Status launch_gather(const Rows& rows, const Gather& gather);

struct GatherBackward {
  const void* grad_rows = nullptr;  // [K, D]
  const int32_t* index = nullptr;
  void* grad_x = nullptr;  // [N, D]
  int64_t rows = 0, slots = 0;
  bool accumulate = false;
};
Status launch_gather_backward(const Rows& rows, const GatherBackward& backward);

// ---- gather_rmsnorm.cu

struct GatherRmsnorm {
  const void* x = nullptr;
  const int32_t* index = nullptr;
  Parameter weight = {};
  float eps = 0;
  void* out = nullptr;    // [K, D]
  float* rstd = nullptr;  // [K], 0 in filler
  int64_t rows = 0, slots = 0;
  bool after_select = false;  // the kernel before it is launch_select's: may overlap with its end
};
Status launch_gather_rmsnorm(const Rows& rows, const GatherRmsnorm& gather);

// ---- gather_add_rmsnorm.cu

struct GatherAddRmsnorm {
  const void* x = nullptr;
  const void* attn_out = nullptr;  // [K, D]
  const int32_t* index = nullptr;
  Parameter weight = {};
  float eps = 0;
  void* residual = nullptr;  // [K, D], zeros in filler whatever attn_out holds there
  void* out = nullptr;       // [K, D]
  float* rstd = nullptr;     // [K]
  int64_t rows = 0, slots = 0;
};
Status launch_gather_add_rmsnorm(const Rows& rows, const GatherAddRmsnorm& gather);

struct GatherAddRmsnormBackward {
  const void* grad_residual = nullptr;  // [K, D] or null
  const void* grad_out =
      nullptr;  // [N, D] or null: its kept rows are gradients of the residual too
  const void* grad_rows = nullptr;  // [K, D] or null
  const void* residual = nullptr;   // [K, D]
  const int32_t* index = nullptr;
  Parameter weight = {};
  const float* rstd = nullptr;
  void* grad_attn_out = nullptr;  // [K, D], zeros in filler
  void* grad_x = nullptr;         // [N, D] or null
  float* grad_weight = nullptr;   // [D]
  float* partials = nullptr;      // parameter_partials(slots) * D
  int64_t rows = 0, slots = 0;
  bool accumulate = false;  // add to grad_x, or overwrite its kept rows
};
Status launch_gather_add_rmsnorm_backward(const Rows& rows,
                                          const GatherAddRmsnormBackward& backward);

// ---- route_gather.cu: the backward of everything that gathers, normalises or scores x, one visit
// per row of x. As cpu/rows/route_gather.h.
struct ReadersBackward {
  const void* x = nullptr;
  const void* grad_rows = nullptr;  // [K, D] or null
  const void* grad_kept =
      nullptr;                  // [K, D] or null: gradients that reached the kept rows another way
  const float* rstd = nullptr;  // [K], with a norm weight
  const float* grad_logits = nullptr;   // [N], or null: no router
  const int32_t* inverse = nullptr;     // [N], or null: visit the rows of `index` only
  const int32_t* index = nullptr;       // [K]
  Parameter router_weight = {};         // with grad_logits
  Parameter norm_weight = {};           // null: the rows were copied
  void* grad_x = nullptr;               // [N, D]
  float* grad_router_weight = nullptr;  // [D], with grad_logits
  float* grad_router_bias = nullptr;    // [1], with grad_logits
  float* grad_norm_weight = nullptr;    // [D], with a norm weight
  float* partials = nullptr;  // parameter_partials(visited rows) * D for each of the two [D] sums
  int64_t rows = 0, slots = 0;
  bool overwrite = false;  // kept rows of grad_x hold nothing yet
};
Status launch_readers_backward(const Rows& rows, const ReadersBackward& backward);

// ---- weighted_scatter_add.cu

struct WeightedScatterAdd {
  const void* x = nullptr;
  const void* residual = nullptr;  // [K, D]
  const void* update = nullptr;    // [K, D]
  const float* gate = nullptr;     // [N]
  const int32_t* inverse = nullptr;
  const uint8_t* kind = nullptr;
  void* out = nullptr;         // [N, D]; x itself: in place
  Parameter next_weight = {};  // null: do not score
  Number next_bias = {};
  float* next_logits = nullptr;  // [N] with next_weight
  bool* finite = nullptr;        // [1] or null; the launcher sets it, kernels clear it
  int64_t rows = 0, slots = 0;
  bool gate_mlp = false, scale_skipped = false;
};
Status launch_weighted_scatter_add(const Rows& rows, const WeightedScatterAdd& scatter);

struct WeightedScatterAddBackward {
  const void* grad_out = nullptr;  // [N, D]
  const void* x = nullptr;
  const void* update = nullptr;
  const float* gate = nullptr;
  const int32_t* inverse = nullptr;
  const int32_t* index = nullptr;  // [K]: which slots are filler, whose gradients are zero
  const uint8_t* kind = nullptr;
  Parameter router_weight = {};         // null: the gate of skipped rows gets a gradient instead
  const float* logits = nullptr;        // [N] with router_weight
  Gate router_gate = {};                // with router_weight; never softmax
  void* grad_x = nullptr;               // [N, D]
  void* grad_residual = nullptr;        // [K, D] or null
  void* grad_update = nullptr;          // [K, D]
  float* grad_gate = nullptr;           // [N]
  float* grad_router_weight = nullptr;  // [D] with router_weight
  float* grad_router_bias = nullptr;    // [1] with router_weight
  float* grad_logits = nullptr;         // scratch [N] with router_weight
  float* partials = nullptr;            // parameter_partials(rows) * D with router_weight
  int64_t rows = 0, slots = 0;
  bool gate_mlp = false, scale_skipped = false;
  bool zero_kept = false;  // write zeros to the kept rows of grad_x, or leave them as they are
};
Status launch_weighted_scatter_add_backward(const Rows& rows,
                                            const WeightedScatterAddBackward& backward);

// ---- parameter_sum.cu

// Partial sums of a parameter's gradient over so many rows: it depends on their number alone, so
// that every GPU adds in the same order.
int64_t parameter_partials(int64_t rows);

// out[i] = the sum of partials[., i] in order.
Status launch_sum_partials(const float* partials, int64_t count, int64_t hidden, float* out,
                           Stream stream);

// out[0] = the sum of values[rows] in a fixed order.
Status launch_sum(const float* values, int64_t rows, float* out, Stream stream);

}  // namespace pmod::cuda
