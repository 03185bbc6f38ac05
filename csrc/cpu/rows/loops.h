// The row loops of every op, as a table of functions: one table per row type and instruction set.
//
// A loop works on a range of rows or slots, so that the caller can spread ranges over threads. No
// two ranges write the same memory. Arguments are plain pointers, checked by the caller; null means
// absent where that is said. T is the type of rows, Acc<T> that of logits, gates and sums.
#pragma once

#include <cstdint>

#include "common/gate.h"
#include "common/row_types.h"

namespace pmod::cpu {

// Elements of a row that are worked on together. Rows of whole blocks, aligned to a cache line, can
// be written past the cache (`streaming`).
constexpr int kLanes = 64;
constexpr int kCacheLine = 64;

// Parameter sums, and weights that are wider than rows, fill whole blocks, and are kept in the
// order of RowLoops::arrange.
constexpr int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// A weight, padded with zeros to whole blocks and aligned to a cache line: as rows are held, which
// takes the least of the cache, or else in the type of sums, in block order. Neither: no weight.
template <typename T>
struct Weight {
  const T* packed = nullptr;
  const Acc<T>* blocks = nullptr;

  explicit operator bool() const { return packed != nullptr || blocks != nullptr; }
};

// The gradient of a parameter, padded, over one range of rows: `block` adds up kBlockRows rows,
// `total` the blocks. The loop sets both; what was in them does not matter.
template <typename A>
struct ParameterSum {
  A* block = nullptr;
  double* total = nullptr;
};
constexpr int64_t kBlockRows = 8;  // more would lose precision, fewer time

template <typename T>
struct Score {
  const T* x;
  Weight<T> weight;
  Acc<T> bias;
  const uint8_t* kind;
  Acc<T>* logits;  // 0 on rows that are not routable
  int64_t hidden;
};

template <typename T>
struct Gather {
  const T* x;
  const int32_t* index;
  T* rows;
  int64_t hidden;
  bool streaming;
};

template <typename T>
struct GatherBackward {
  const T* grad_rows;
  const int32_t* index;
  T* grad_x;
  int64_t hidden;
  bool accumulate;
};

template <typename T>
struct GatherRmsnorm {
  const T* x;
  const int32_t* index;
  Weight<T> weight;
  Acc<T> eps;
  T* rows;
  Acc<T>* rstd;
  int64_t hidden;
  bool streaming;
};

template <typename T>
struct GatherAddRmsnorm {
  const T* x;
  const T* attn_out;
  const int32_t* index;
  Weight<T> weight;
  Acc<T> eps;
  T* residual;
  T* rows;
  Acc<T>* rstd;
  int64_t hidden;
  bool streaming;
};

template <typename T>
struct GatherAddRmsnormBackward {
  const T* grad_residual;  // null: none came
  const T* grad_out;       // null, or gradients of all rows: the kept ones are of the residual too
  const T* grad_rows;      // null: none came
  const T* residual;
  const int32_t* index;
  Weight<T> weight;
  const Acc<T>* rstd;
  T* grad_attn_out;
  T* grad_x;  // null: the caller takes grad_attn_out for the gradient of the kept rows
  int64_t hidden;
  bool accumulate, streaming;
  ParameterSum<Acc<T>> norm;
};

// The backward loop of every op that gathers, normalises or scores x, row by row of x.
template <typename T>
struct ReadersBackward {
  const T* x;
  const T* grad_rows = nullptr;         // null: no gradient of gathered rows
  const T* grad_kept = nullptr;         // gradients that reached the kept rows another way
  const Acc<T>* rstd = nullptr;         // with a norm_weight
  const Acc<T>* grad_logits = nullptr;  // null: no router
  const int32_t* inverse = nullptr;     // null: visit the rows of `index`
  const int32_t* index = nullptr;       // with grad_rows
  int64_t slots = 0;
  Weight<T> router_weight = {};
  Weight<T> norm_weight = {};  // none: the rows were copied
  T* grad_x;
  bool overwrite = false;  // kept rows of grad_x hold nothing yet
  int64_t hidden;
  ParameterSum<Acc<T>> router = {};  // with grad_logits
  ParameterSum<Acc<T>> norm = {};    // with a norm_weight
};

template <typename T>
struct WeightedScatterAdd {
  const T* x;
  const T* residual;
  const T* update;
  const Acc<T>* gate;
  const int32_t* inverse;
  const uint8_t* kind;
  T* out;                 // x itself: in place
  Weight<T> next_weight;  // none: do not score
  Acc<T> next_bias;
  Acc<T>* next_logits;
  int64_t hidden;
  bool gate_mlp, scale_skipped, check_finite, streaming;
};

template <typename T>
struct WeightedScatterAddBackward {
  const T* grad_out;
  const T* x;
  const T* update;
  const Acc<T>* gate;
  const int32_t* inverse;
  const uint8_t* kind;
  Weight<T> router_weight;  // none: the gate of skipped rows gets a gradient instead
  const Acc<T>* slope;      // d gate / d logit of every row, with router_weight
  T* grad_x;
  T* grad_residual;  // null: the caller reads grad_out in its place
  T* grad_update;
  Acc<T>* grad_gate;
  Acc<T>* grad_logits;  // with router_weight
  int64_t hidden;
  bool gate_mlp, scale_skipped, streaming;
  bool zero_kept;  // write zeros to the kept rows of grad_x, or leave them as they are
  ParameterSum<Acc<T>> router;
};

template <typename T>
struct RowLoops {
  // A weight of type T in the type of sums.
  void (*widen)(const T* from, Acc<T>* to, int64_t size);
  // From element order to the order in which rows of T meet weights and sums, and back. Whole
  // blocks.
  void (*arrange)(const Acc<T>* elements, Acc<T>* blocks, int64_t padded_size);
  void (*restore)(const Acc<T>* blocks, Acc<T>* elements, int64_t padded_size);
  void (*activate)(const Acc<T>* logits, Acc<T>* out, int64_t size, Activation activation);
  void (*score)(const Score<T>&, int64_t begin, int64_t end);
  void (*gather)(const Gather<T>&, int64_t begin, int64_t end);
  void (*gather_backward)(const GatherBackward<T>&, int64_t begin, int64_t end);
  void (*gather_rmsnorm)(const GatherRmsnorm<T>&, int64_t begin, int64_t end);
  void (*gather_add_rmsnorm)(const GatherAddRmsnorm<T>&, int64_t begin, int64_t end);
  void (*gather_add_rmsnorm_backward)(const GatherAddRmsnormBackward<T>&, int64_t begin,
                                      int64_t end);
  void (*readers_backward)(const ReadersBackward<T>&, int64_t begin, int64_t end);
  // Whether every entry written is finite; true if that is not asked for.
  bool (*weighted_scatter_add)(const WeightedScatterAdd<T>&, int64_t begin, int64_t end);
  void (*weighted_scatter_add_backward)(const WeightedScatterAddBackward<T>&, int64_t begin,
                                        int64_t end);
};

// The table of the instruction set in use (cpu/isa/dispatch.h).
template <typename T>
const RowLoops<T>& row_loops();

}  // namespace pmod::cpu
