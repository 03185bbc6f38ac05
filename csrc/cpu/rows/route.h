// Scores and gates. One row at a time; reads every routable row once.
#pragma once

#include "cpu/rows/block.h"
#include "cpu/rows/loops.h"

namespace pmod::cpu::PMOD_ISA {

// Element order, no padding; T is the type of the weight, which may differ from that of the rows.
template <typename T>
void widen_weight(const T* from, Acc<T>* to, int64_t size) {
  for_blocks(size, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
    Acc<T> block[kLanes], elements[kLanes];
    store_block(block, load(from + i, lanes));
    restore_block<T>(block, elements);
    write(to + i, read(elements, All{}), lanes);
  });
}

template <typename T>
void arrange(const Acc<T>* elements, Acc<T>* blocks, int64_t padded_size) {
  for (int64_t i = 0; i < padded_size; i += kLanes) arrange_block<T>(elements + i, blocks + i);
}

template <typename T>
void restore(const Acc<T>* blocks, Acc<T>* elements, int64_t padded_size) {
  for (int64_t i = 0; i < padded_size; i += kLanes) restore_block<T>(blocks + i, elements + i);
}

template <typename T>
void score(const Score<T>& a, int64_t begin, int64_t end) {
  const Weight<T> weight = a.weight;
  for (int64_t r = begin; r < end; ++r) {
    if (a.kind[r] != kRoutable) {
      a.logits[r] = 0;
      continue;
    }
    const T* row = a.x + r * a.hidden;
    const T* next = r + 1 < end ? row + a.hidden : row;
    Block<Acc<T>> dot{};
    for_blocks(a.hidden, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
      prefetch(next + i);
      dot = dot + load(row + i, lanes) * load_weight(weight, i);
    });
    a.logits[r] = sum<T>(dot) + a.bias;
  }
}

// e^v for v in [-87, 88], within 2 units in the last place; NaN stays NaN. (Cephes: v = n ln 2 +
// r.)
PMOD_INLINE Floats exponential(Floats v) {
  const Floats shift = Floats{} + 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  // NOLINTBEGIN(modernize-use-std-numbers): ln 2 comes in two parts
  const Floats n = (v * 1.44269504F + shift) - shift;
  const Floats r = (v - n * 0.693359375F) + n * 2.12194440e-4F;
  // NOLINTEND(modernize-use-std-numbers)
  Floats p = Floats{} + 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const Floats e = p * (r * r) + r + 1.0F;
  using Ints = Vector<int32_t>;
  const Ints exponent = __builtin_convertvector(n, Ints);
  return e * (Floats)((exponent + 127) << 23);
}

PMOD_INLINE Floats hyperbolic_tangent(Floats v) {
  const Words sign = (Words)v & 0x80000000U;
  const Floats size = (Floats)((Words)v ^ sign);
  // from 9.02 on the result rounds to 1
  const Floats bounded = choose((Words)(size > 10.0F), Floats{} + 10.0F, size);
  const Floats large = 1.0F - 2.0F / (exponential(bounded + bounded) + 1.0F);
  const Floats z = bounded * bounded;  // near 0, where 1 - ... would cancel: a polynomial (Cephes)
  Floats p = Floats{} + -5.70498872745e-3F;
  p = p * z + 2.06390887954e-2F;
  p = p * z - 5.37397155531e-2F;
  p = p * z + 1.33314422036e-1F;
  p = p * z - 3.33332819422e-1F;
  const Floats small = p * z * size + size;
  return (Floats)((Words)choose((Words)(size < 0.625F), small, large) | sign);
}

PMOD_INLINE Floats logistic(Floats v) {
  Floats t = 0.0F - v;
  t = choose((Words)(t > 88.0F), Floats{} + 88.0F, t);
  t = choose((Words)(t < -87.0F), Floats{} - 87.0F, t);
  return 1.0F / (1.0F + exponential(t));
}

inline void activate_rows(const float* logits, float* out, int64_t size, Activation activation) {
  for_blocks(size, [&](int64_t i, auto lanes) PMOD_INLINE_LAMBDA {
    Packed<float> block = read(logits + i, lanes);
    for (Floats& v : block.v) {
      if (activation == Activation::kTanh) v = hyperbolic_tangent(v);
      if (activation == Activation::kSigmoid) v = logistic(v);
    }
    write(out + i, block, lanes);
  });
}

inline void activate_rows(const double* logits, double* out, int64_t size, Activation activation) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = logits[i];
    if (activation == Activation::kTanh) out[i] = __builtin_tanh(logits[i]);
    if (activation == Activation::kSigmoid) out[i] = 1.0 / (1.0 + __builtin_exp(-logits[i]));
  }
}

}  // namespace pmod::cpu::PMOD_ISA
