// Conversions of 16-bit numbers against references that search for the nearest.

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.h"

namespace pmod::cuda {
namespace {

// What a 16-bit number of so many exponent bits stands for.
double value_of(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7FFF) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// The nearest, and of two the even one. Beyond the largest the next would be 2^(bias + 1).
uint16_t nearest(float value, int exponent_bits) {
  if (std::isnan(value)) return 0x7FFF;
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const auto infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  const double magnitude = std::abs(static_cast<double>(value));
  uint16_t below = 0;  // the largest that is not above
  for (int bit = 14; bit >= 0; --bit) {
    const auto candidate = static_cast<uint16_t>(below | (1 << bit));
    if (candidate <= infinity && value_of(candidate, exponent_bits) <= magnitude) below = candidate;
  }
  uint16_t bits = below;
  if (below != infinity) {
    const auto above = static_cast<uint16_t>(below + 1);
    const double high =
        above == infinity ? std::ldexp(1.0, bias + 1) : value_of(above, exponent_bits);
    const double to_low = magnitude - value_of(below, exponent_bits);
    const double to_high = high - magnitude;
    if (to_high < to_low || (to_high == to_low && below % 2 != 0)) bits = above;
  }
  return static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
}

constexpr int kF16 = 5;
constexpr int kBf16 = 8;

void check_rounding(float value) {
  const uint32_t f16 = pack_f16(value, 1.0F);
  const uint32_t bf16 = pack_bf16(1.0F, value);
  if (f16 != (nearest(value, kF16) | 0x3C000000U)) FAIL("f16 of ", value, ": ", f16);
  if (bf16 != (static_cast<uint32_t>(nearest(value, kBf16)) << 16 | 0x3F80U)) {
    FAIL("bf16 of ", value, ": ", bf16);
  }
}

TEST_CASE("all halves become the floats they stand for, and back") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = unpack_f16(bits | 0x3C000000U).x;
    const double expected = value_of(half, kF16);
    if (std::isnan(expected)) {
      if (std::bit_cast<uint32_t>(value) != 0x7FFFFFFFU) FAIL("NaN ", bits);
      continue;
    }
    if (value != expected || std::signbit(value) != std::signbit(expected)) FAIL("f16 ", bits);
    if (unpack_f16(bits << 16).y != value) FAIL("upper f16 ", bits);
    if (pack_f16(value, value) != (bits | bits << 16)) FAIL("f16 and back ", bits);
  }
}

TEST_CASE("around all halves and all bf16, and half way between them") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    for (const float value : {unpack_f16(bits).x, __uint_as_float(bits << 16)}) {
      check_rounding(value);
      if (!std::isfinite(value)) continue;
      // half way to the next of either kind, and the floats beside
      const auto raw = std::bit_cast<uint32_t>(value);
      for (const uint32_t half_way : {0x8000U, 0x1000U}) {
        for (const uint32_t beside : {~0U, 0U, 1U}) {
          check_rounding(__uint_as_float(raw + half_way + beside));
        }
      }
    }
  }
  for (uint32_t units = 0; units < 4096; ++units) {  // of a quarter of the smallest f16
    check_rounding(std::ldexp(static_cast<float>(units), -26));
    check_rounding(-std::ldexp(static_cast<float>(units), -26));
  }
}

TEST_CASE("random floats") {
  simt::Random random(1);
  for (int i = 0; i < 300'000; ++i) {
    check_rounding(__uint_as_float(static_cast<uint32_t>(random.next())));
    check_rounding(std::ldexp(static_cast<float>(random.below(1U << 24)),
                              static_cast<int>(random.below(45)) - 50));
  }
}

TEST_CASE("special numbers") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(pack_bf16(infinity, -infinity) == 0xFF807F80U);
  CHECK(pack_f16(infinity, -infinity) == 0xFC007C00U);
  for (const uint32_t nan : {0x7F800001U, 0x7FC00000U, 0xFFC00000U, 0xFFFFFFFFU, 0x7FFFFFFFU}) {
    const float value = __uint_as_float(nan);
    CHECK(pack_bf16(value, 0.0F) == 0x7FFFU);
    CHECK(pack_f16(value, -0.0F) == 0x80007FFFU);
  }
  CHECK(pack_f16(65519.0F, 65520.0F) == 0x7C007BFFU);
  CHECK(pack_bf16(std::numeric_limits<float>::max(), 0x1.FEFEp127F) == 0x7F7F7F80U);
}

}  // namespace
}  // namespace pmod::cuda
