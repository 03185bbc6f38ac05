// The gate of every row and the gradient of every logit: reference.activate and its derivative.
//
// A few numbers per row; rows in parallel, sequences in parallel for softmax, whose rows depend on
// each other. Derivatives come from the saved logits.

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/route.h"

namespace pmod::cpu {
namespace {

// Softmax of the routable rows of one sequence.
template <typename A>
void softmax(const A* logits, const uint8_t* kind, int64_t begin, int64_t end, A* out) {
  A largest = -std::numeric_limits<A>::infinity();
  for (int64_t r = begin; r < end; ++r) {
    if (kind[r] == kRoutable && logits[r] > largest) largest = logits[r];
  }
  A sum = 0;
  for (int64_t r = begin; r < end; ++r) {
    if (kind[r] == kRoutable) sum += out[r] = std::exp(logits[r] - largest);
  }
  for (int64_t r = begin; r < end; ++r) {
    if (kind[r] == kRoutable) out[r] /= sum;
  }
}

template <typename F>
void for_sequences(const Tensor& cu_seqlens, const F& f) {
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t batch = cu_seqlens.numel() - 1;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(int64_t{bounds[b]}, int64_t{bounds[b + 1]});
  });
}

}  // namespace

Tensor gate_of(const Tensor& logits, const Tensor& kind, const Tensor& cu_seqlens,
               const Gate& gate) {
  const int64_t rows = logits.numel();
  Tensor out = allocate({rows}, logits.scalar_type());
  dispatch_rows("route", "logits", logits, [&](auto type) {
    using A = typename decltype(type)::A;
    const A* in = data<A>(logits);
    const uint8_t* kinds = data<uint8_t>(kind);
    A* weight = mutable_data<A>(out);
    const A scale = static_cast<A>(gate.scale), bias = static_cast<A>(gate.bias);
    if (gate.activation == Activation::kSoftmax) {
      for_sequences(cu_seqlens,
                    [&](int64_t begin, int64_t end) { softmax(in, kinds, begin, end, weight); });
    }
    for_ranges(rows, sizeof(A), [&](int64_t begin, int64_t end) {
      if (gate.activation != Activation::kSoftmax) {
        row_loops<A>().activate(in + begin, weight + begin, end - begin, gate.activation);
      }
      for (int64_t r = begin; r < end; ++r) {
        weight[r] = kinds[r] == kRoutable ? scale * weight[r] + bias : A(1);
      }
    });
  });
  return out;
}

template <typename A>
std::vector<A> gate_slope(const Tensor& logits, const Gate& gate) {
  const int64_t rows = logits.numel();
  const A scale = static_cast<A>(gate.scale);
  std::vector<A> slope(rows, scale);
  if (gate.activation == Activation::kNone) return slope;
  for_ranges(rows, sizeof(A), [&](int64_t begin, int64_t end) {
    A* at = slope.data() + begin;
    row_loops<A>().activate(data<A>(logits) + begin, at, end - begin, gate.activation);
    for (int64_t i = 0; i < end - begin; ++i) {
      at[i] = scale * (gate.activation == Activation::kTanh ? A(1) - at[i] * at[i]
                                                            : at[i] * (A(1) - at[i]));
    }
  });
  return slope;
}

template <typename A>
std::vector<A> logit_gradient(const OptionalTensor& grad_logits, const OptionalTensor& grad_gate,
                              const Tensor& logits, const Tensor& kind, const Tensor& cu_seqlens,
                              const Gate& gate) {
  const int64_t rows = logits.numel();
  const A* z = data<A>(logits);
  const uint8_t* kinds = data<uint8_t>(kind);
  const A scale = static_cast<A>(gate.scale);
  std::vector<A> out(rows);
  if (grad_gate && gate.activation == Activation::kSoftmax) {
    const A* grad = data<A>(grad_gate);
    std::vector<A> soft(rows);
    for_sequences(cu_seqlens, [&](int64_t begin, int64_t end) {
      softmax(z, kinds, begin, end, soft.data());
      A mean = 0;
      for (int64_t r = begin; r < end; ++r) {
        if (kinds[r] == kRoutable) mean += soft[r] * grad[r];
      }
      for (int64_t r = begin; r < end; ++r) {
        if (kinds[r] == kRoutable) out[r] = scale * soft[r] * (grad[r] - mean);
      }
    });
  } else if (grad_gate) {
    const A* grad = data<A>(grad_gate);
    const std::vector<A> slope = gate_slope<A>(logits, gate);
    for (int64_t r = 0; r < rows; ++r) {
      out[r] = kinds[r] == kRoutable ? slope[r] * grad[r] : A(0);
    }
  }
  if (grad_logits) {
    const A* grad = data<A>(grad_logits);
    for (int64_t r = 0; r < rows; ++r) out[r] += kinds[r] == kRoutable ? grad[r] : A(0);
  }
  return out;
}

template std::vector<float> gate_slope<float>(const Tensor&, const Gate&);
template std::vector<double> gate_slope<double>(const Tensor&, const Gate&);
template std::vector<float> logit_gradient<float>(const OptionalTensor&, const OptionalTensor&,
                                                  const Tensor&, const Tensor&, const Tensor&,
                                                  const Gate&);
template std::vector<double> logit_gradient<double>(const OptionalTensor&, const OptionalTensor&,
                                                    const Tensor&, const Tensor&, const Tensor&,
                                                    const Gate&);

}  // namespace pmod::cpu
