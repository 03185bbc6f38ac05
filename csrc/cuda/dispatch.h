// From run-time types and addresses to template arguments, and the sizes of blocks. Host code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "cuda/launchers.h"
#include "cuda/weight.cuh"

namespace pmod::cuda {

template <typename T>
constexpr RowType kRowType = RowType::kFloat;
template <>
constexpr RowType kRowType<Bf16> = RowType::kBf16;
template <>
constexpr RowType kRowType<F16> = RowType::kF16;

using Pointers = std::initializer_list<const void*>;

// Whether rows of T, which begin at `pointers`, are made of whole vectors at aligned addresses. A
// null pointer is in nobody's way.
template <typename T>
bool is_aligned(int64_t hidden, Pointers pointers) {
  constexpr uintptr_t kVectorBytes = 16;
  return hidden % Access<T, true>::kSize == 0 &&
         std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
           return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
         });
}

// Calls f<T>().
template <typename F>
Status dispatch_type(RowType type, const F& f) {
  switch (type) {
    case RowType::kBf16:
      return f.template operator()<Bf16>();
    case RowType::kF16:
      return f.template operator()<F16>();
    default:
      return f.template operator()<float>();
  }
}

// Calls f<T, kAligned>(); `pointers`: of everything that is read or written in vectors.
template <typename F>
Status dispatch_rows(const Rows& rows, Pointers pointers, const F& f) {
  return dispatch_type(rows.type, [&]<typename T>() {
    return is_aligned<T>(rows.hidden, pointers) ? f.template operator()<T, true>()
                                                : f.template operator()<T, false>();
  });
}

// Calls f<S>() with the share of a row that a thread of a streaming kernel has.
template <typename F>
Status dispatch_streamed(const Rows& rows, Pointers pointers, const F& f) {
  return dispatch_rows(rows, pointers, [&]<typename T, bool kAligned>() {
    return f.template operator()<Streamed<T, kAligned>>();
  });
}

// The same for a kernel that sums parameter gradients. Rows that are not aligned are rare: they
// count as long.
template <typename F>
Status dispatch_summed(const Rows& rows, Pointers pointers, const F& f) {
  return dispatch_rows(rows, pointers, [&]<typename T, bool kAligned>() {
    if constexpr (kAligned) {
      using Short = Summed<T, true, false>;
      if (rows.hidden <= Short::kMostElements) return f.template operator()<Short>();
    }
    return f.template operator()<Summed<T, kAligned, true>>();
  });
}

// Calls f<W>() with the type of a weight that rows of T meet: T or float.
template <typename T, typename F>
Status dispatch_weight(const Parameter& weight, const F& f) {
  return weight.type == kRowType<T> ? f.template operator()<T>() : f.template operator()<float>();
}

// The same for rows in shares S; without vectors the kernel finds the type out, which costs it less
// than another kernel costs the library.
template <typename S, typename F>
Status dispatch_weight_of(const Parameter& weight, const F& f) {
  using T = typename S::T;
  if constexpr (S::kSize == 1) {
    return f.template operator()<Either<T>>();
  } else {
    return dispatch_weight<T>(weight, f);
  }
}

// The same for a weight that may be missing: f<Absent>() then.
template <typename S, typename F>
Status dispatch_optional_weight_of(const Parameter& weight, const F& f) {
  return weight.data == nullptr ? f.template operator()<Absent>()
                                : dispatch_weight_of<S>(weight, f);
}

// The threads of a block that works on one row at a time: enough to have the row in registers, as
// far as there are as many. It depends on nothing else, and so do sums over a row.
template <typename S>
unsigned block_size(int64_t hidden) {
  constexpr int64_t kLeastWarps = 2, kMostWarps = S::kBlock / kWarp;
  constexpr int64_t kElements = int64_t{kWarp} * S::kVectors * S::kSize;  // of a warp
  const int64_t warps = (hidden + kElements - 1) / kElements;
  return static_cast<unsigned>(kWarp * std::clamp(warps, kLeastWarps, kMostWarps));
}

// Blocks that work on rows in shares S; no launch if there are none.
template <typename S, typename Arguments>
Status launch_blocks(void (*kernel)(Arguments, int), int64_t blocks, const Rows& rows,
                     const Arguments& arguments, bool overlap = false) {
  if (blocks == 0) return kSuccess;
  return launch(kernel, static_cast<unsigned>(blocks), block_size<S>(rows.hidden), rows.stream,
                overlap, arguments, static_cast<int>(rows.hidden));
}

}  // namespace pmod::cuda
