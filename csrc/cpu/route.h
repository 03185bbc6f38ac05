// The parts of route that route_gather and weighted_scatter_add share.
#pragma once

#include <tuple>
#include <vector>

#include "common/gate.h"
#include "cpu/adapter.h"
#include "tensor/plan.h"

namespace pmod::cpu {

struct Gate {
  double scale;
  double bias;
  Activation activation;
};

// The contents of cu_seqlens are checked as well.
Plan check_plan(const char* op, const Tensor& kind, const Tensor& cu_seqlens,
                const OptionalTensor& pool_id, const Tensor& k, const Tensor& slot_start,
                int64_t num_slots, int64_t max_length, int64_t rows);

Tensor check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t rows);
Gate check_gate(const char* op, double scale, double bias, int64_t activation);

// x . weight + bias on routable rows, 0 elsewhere.
Tensor score(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const Tensor& kind);

// scale * act(logit) + bias on routable rows, exactly 1 elsewhere.
Tensor gate_of(const Tensor& logits, const Tensor& kind, const Tensor& cu_seqlens,
               const Gate& gate);

// What a GPU would need of device memory.
inline Tensor no_scratch() { return allocate({0}, ScalarType::Byte); }

// (index [num_slots], inverse [N])
std::tuple<Tensor, Tensor> select_rows(const char* op, const Tensor& logits, const Plan& plan);

// d gate / d logit of every row, routable or not; not for a softmax gate, which couples rows.
template <typename A>
std::vector<A> gate_slope(const Tensor& logits, const Gate& gate);

// d loss / d logit of every row, 0 where it is not routable.
template <typename A>
std::vector<A> logit_gradient(const OptionalTensor& grad_logits, const OptionalTensor& grad_gate,
                              const Tensor& logits, const Tensor& kind, const Tensor& cu_seqlens,
                              const Gate& gate);

}  // namespace pmod::cpu
