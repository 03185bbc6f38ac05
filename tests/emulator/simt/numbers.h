// Conversions between float and the 16-bit types, to nearest with ties to even, by their bits. NaN
// becomes the one NaN that the GPU's instructions give.
#pragma once

#include <bit>
#include <cstdint>

namespace simt {

inline uint16_t bf16_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

inline uint16_t f16_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  uint32_t half = 0;
  if (magnitude > 0x7F800000U) {
    return 0x7FFF;
  } else if (magnitude >= 0x477FF000U) {  // 65520, half way to the first that is too large
    half = 0x7C00;
  } else if (magnitude >= 0x38800000U) {  // 2^-14, the smallest normal number
    const uint32_t rebiased = magnitude - 0x38000000U;
    half = (rebiased + 0x0FFFU + ((rebiased >> 13) & 1U)) >> 13;
  } else {  // units of 2^-24, which is also the spacing of floats from 0.5 on
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3F000000U;
  }
  return static_cast<uint16_t>(sign | half);
}

inline float from_f16_bits(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t magnitude = half & 0x7FFFU;
  if (magnitude > 0x7C00U) return std::bit_cast<float>(0x7FFFFFFFU);
  if (magnitude == 0x7C00U) return std::bit_cast<float>(sign | 0x7F800000U);
  if (magnitude >= 0x0400U) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000U));
  return std::bit_cast<float>(sign |
                              std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24F));
}

}  // namespace simt
