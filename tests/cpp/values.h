// Row elements as numbers, and numbers as row elements: one at a time, with no tricks.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "common/row_types.h"

namespace pmod::test {

// kDigits: of the significand, with the leading one. kLeast, kMost: exponents of normal numbers.
template <typename T>
struct Format;
template <>
struct Format<float> {
  static inline const std::string name = "float32";
  static constexpr int kDigits = 24, kLeast = -126, kMost = 127;
};
template <>
struct Format<double> {
  static inline const std::string name = "float64";
  static constexpr int kDigits = 53, kLeast = -1022, kMost = 1023;
};
template <>
struct Format<Bf16> {
  static inline const std::string name = "bfloat16";
  static constexpr int kDigits = 8, kLeast = -126, kMost = 127;
};
template <>
struct Format<F16> {
  static inline const std::string name = "float16";
  static constexpr int kDigits = 11, kLeast = -14, kMost = 15;
};

template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;

// From sign, exponent and significand; NaN for NaN.
template <typename T>
double half_value(uint16_t bits) {
  constexpr int kFraction = Format<T>::kDigits - 1;
  const int exponent = (bits & 0x7FFF) >> kFraction;
  const int fraction = bits & ((1 << kFraction) - 1);
  double size = std::ldexp(fraction, Format<T>::kLeast - kFraction);
  if (exponent > 0) {
    const int significand = fraction + (1 << kFraction);
    size = std::ldexp(significand, exponent - 1 + Format<T>::kLeast - kFraction);
  }
  if (exponent == Format<T>::kMost - Format<T>::kLeast + 2) {
    size = fraction == 0 ? std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  return (bits & 0x8000) == 0 ? size : -size;
}

inline double value(float v) { return v; }
inline double value(double v) { return v; }
inline double value(Bf16 v) { return half_value<Bf16>(v.bits); }
inline double value(F16 v) { return half_value<F16>(v.bits); }

// The distance between neighbours of the row type around v is 2^exponent_of_ulp.
template <typename T>
int exponent_of_ulp(double v) {
  const int exponent = v == 0 ? Format<T>::kLeast : std::max(std::ilogb(v), Format<T>::kLeast);
  return exponent - (Format<T>::kDigits - 1);
}

// How far rounding to the row type can move v.
template <typename T>
double half_ulp(double v) {
  return std::ldexp(1.0, exponent_of_ulp<T>(v) - 1);
}

// The row element nearest to v, of two the one with an even significand. NaN becomes quiet.
template <typename T>
T nearest(double v) {
  if constexpr (!kIsHalf<T>) {
    return static_cast<T>(v);
  } else {
    constexpr int kFraction = Format<T>::kDigits - 1;
    constexpr uint16_t kInfinite = (Format<T>::kMost - Format<T>::kLeast + 2) << kFraction;
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    if (std::isnan(v)) return T{static_cast<uint16_t>(sign | kInfinite | 1 << (kFraction - 1))};
    if (std::abs(v) >= std::ldexp(1.0, Format<T>::kMost + 1)) {
      return T{static_cast<uint16_t>(sign | kInfinite)};
    }
    const int ulp = exponent_of_ulp<T>(v);
    const auto significand = static_cast<int>(std::nearbyint(std::ldexp(std::abs(v), -ulp)));
    // the leading one of a normal number, or a significand that was rounded up to the next power of
    // two, carries into the exponent; so does the largest finite number into infinity
    const int exponent = ulp + kFraction - Format<T>::kLeast;
    return T{static_cast<uint16_t>(sign | ((exponent << kFraction) + significand))};
  }
}

template <typename T>
T quiet_nan() {
  return nearest<T>(std::numeric_limits<double>::quiet_NaN());
}

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <typename T>
Bits<T> bits_of(T v) {
  return std::bit_cast<Bits<T>>(v);
}

template <typename T>
T of_bits(uint64_t bits) {
  return std::bit_cast<T>(static_cast<Bits<T>>(bits));
}

// The same bits, or NaN twice: which NaN comes out of an operation on NaN is up to the processor.
template <typename T>
bool same_number(T a, T b) {
  return bits_of(a) == bits_of(b) || (std::isnan(value(a)) && std::isnan(value(b)));
}

}  // namespace pmod::test
