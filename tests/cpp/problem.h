// The arguments of every row loop, made up: rows of all kinds, in slots of no order, with filler.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "buffer.h"
#include "cpu/rows/loops.h"
#include "values.h"

namespace pmod::test {

template <typename T>
struct Problem {
  using A = Acc<T>;

  int64_t rows, hidden, offset, slots;
  std::vector<uint8_t> kind;
  std::vector<int32_t> index, inverse;  // -1: filler, and rows that are not kept
  std::vector<A> gate, slope, grad_logits, rstd;
  std::vector<A> router, norm;  // weights, in element order, padded
  A bias = A(0.25), eps = A(1e-6);
  Buffer<T> x, grad_out, grad_x;                                              // of all rows
  Buffer<T> attn_out, residual, update, grad_rows, grad_residual, grad_kept;  // of kept rows

  // `offset`: of the buffers, in elements behind a cache line; 0 or 1.
  Problem(int64_t num_rows, int64_t row_size, int64_t row_offset)
      : rows(num_rows), hidden(row_size), offset(row_offset), random_(row_size * 8 + row_offset) {
    make_routing();
    for (int64_t r = 0; r < rows; ++r) {
      const bool routable = kind[r] == kRoutable;
      gate.push_back(routable ? static_cast<A>(random_.uniform(0.5, 1.5)) : A(1));
      slope.push_back(static_cast<A>(random_.uniform(-1, 1)));
      grad_logits.push_back(routable && r % 3 != 0 ? static_cast<A>(random_.normal()) : A(0));
    }
    for (int64_t s = 0; s < slots; ++s) {
      rstd.push_back(index[s] < 0 ? A(0) : static_cast<A>(random_.uniform(0.5, 2)));
    }
    for (std::vector<A>* weight : {&router, &norm}) {
      for (int64_t i = 0; i < hidden; ++i)
        weight->push_back(static_cast<A>(value(nearest<T>(random_.normal()))));
      weight->resize(cpu::padded(hidden));
    }
    const auto is_padding = [&](int64_t r) { return kind[r] == kPadding; };
    const auto is_filler = [&](int64_t s) { return index[s] < 0; };
    for (Buffer<T>* all : {&x, &grad_out, &grad_x}) *all = make_rows(rows, is_padding);
    for (Buffer<T>* kept :
         {&attn_out, &residual, &update, &grad_rows, &grad_residual, &grad_kept}) {
      *kept = make_rows(slots, is_filler);
    }
  }

  bool kept(int64_t r) const { return inverse[r] >= 0; }
  bool routable(int64_t r) const { return kind[r] == kRoutable; }

  // A row of x or its like; and what a kept row has in its slot, null if it is not kept.
  const T* row(const Buffer<T>& all, int64_t r) const { return all.data() + r * hidden; }
  const T* slot_of(const Buffer<T>& kept_rows, int64_t r) const {
    return kept(r) ? row(kept_rows, inverse[r]) : nullptr;
  }

  // Puts infinities, NaN and the largest numbers into some rows, and denormal ones if wanted.
  void sprinkle(bool denormals) {
    const double tiny = std::ldexp(3.0, Format<T>::kLeast - Format<T>::kDigits + 1);
    const double most = std::ldexp(1.5, Format<T>::kMost);
    const double infinity = std::numeric_limits<double>::infinity();
    for (Buffer<T>* rows : {&x, &grad_out, &grad_x, &attn_out, &residual, &update, &grad_rows,
                            &grad_residual, &grad_kept}) {
      for (int64_t i = random_.below(97); i < rows->size(); i += 1 + random_.below(97)) {
        const double specials[] = {infinity, -infinity, infinity - infinity, most, -most};
        const double small = random_.below(2) == 0 ? tiny : -tiny;
        const int64_t which = random_.below(denormals ? 10 : 5);
        (*rows)[i] = nearest<T>(which < 5 ? specials[which] : small);
      }
    }
  }

 private:
  Random random_;

  void make_routing() {
    constexpr uint8_t kKinds[] = {kRoutable, kRoutable, kPadding,  kAlways, kRoutable,
                                  kRoutable, kPadding,  kRoutable, kAlways, kRoutable};
    std::vector<int32_t> chosen;
    for (int64_t r = 0; r < rows; ++r) {
      kind.push_back(kKinds[r % std::size(kKinds)]);
      const bool keep = kind[r] == kAlways || (kind[r] == kRoutable && random_.below(2) == 0);
      if (keep) chosen.push_back(static_cast<int32_t>(r));
    }
    for (size_t i = chosen.size(); i > 1; --i) {
      std::swap(chosen[i - 1], chosen[random_.below(static_cast<int64_t>(i))]);
    }
    inverse.assign(rows, -1);
    for (size_t i = 0; i < chosen.size(); ++i) {
      if (i % 5 == 2) index.push_back(-1);
      inverse[chosen[i]] = static_cast<int32_t>(index.size());
      index.push_back(chosen[i]);
    }
    index.push_back(-1);
    slots = static_cast<int64_t>(index.size());
  }

  // Rows that nobody may look into are NaN with a payload, every second one signalling.
  template <typename F>
  Buffer<T> make_rows(int64_t number, const F& is_void) {
    Buffer<T> out(number * hidden, offset * (1 + 2 * random_.below(3)));
    constexpr int kFraction = Format<T>::kDigits - 1;
    const uint64_t quiet = bits_of(quiet_nan<T>());
    for (int64_t r = 0; r < number; ++r) {
      for (int64_t i = 0; i < hidden; ++i) {
        const uint64_t nan = (quiet | 5U) ^ (uint64_t(r % 2) << (kFraction - 1));
        out[r * hidden + i] = is_void(r) ? of_bits<T>(nan) : nearest<T>(random_.normal());
      }
    }
    return out;
  }
};

}  // namespace pmod::test
