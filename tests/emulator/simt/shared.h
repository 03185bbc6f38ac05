// The shared memory of a block: its arrays, each between two red zones.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "simt/sanitizers.h"

namespace simt {

class SharedMemory {
 public:
  // What nvcc allows a block to declare.
  static constexpr size_t kAlignment = 16;
  static constexpr size_t kCapacity = size_t{48} << 10;
  // NaN in float, bf16, f16 and double; large as an integer.
  static constexpr uint32_t kUnwritten = 0x7FFAFFFAU;

  SharedMemory() : memory_(std::make_unique<std::byte[]>(kMemory)) {}
  ~SharedMemory() { unpoison(memory_.get(), kMemory); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // A new block begins.
  void reset() {
    unpoison(memory_.get(), used_);
    // what is new was not accessed by the threads of an earlier block
    if (kThreadSanitizer) memory_ = std::make_unique<std::byte[]>(kMemory);
    count_ = used_ = declared_ = 0;
  }

  // The array that `key` stands for in this block. The first who asks makes it.
  void* array(const void* key, size_t bytes, const char* name) {
    for (size_t i = 0; i < count_; ++i) {
      if (arrays_[i].key == key) return arrays_[i].begin;
    }
    return add(key, bytes, name);
  }

  [[nodiscard]] bool holds(const void* at) const {
    const auto* address = static_cast<const std::byte*>(at);
    return address >= memory_.get() && address < memory_.get() + used_;
  }

  // Throws if something was written beside an array.
  void check_red_zones() {
    unpoison(memory_.get(), used_);
    for (size_t i = 0; i < count_; ++i) {
      const Array& array = arrays_[i];
      const std::byte* end = array.begin + array.bytes;
      check(array, array.begin - kRedZone, kRedZone, "before");
      check(array, end, kRedZone + padding(array.bytes), "beyond the end of");
    }
  }

 private:
  struct Array {
    const void* key;
    const char* name;
    std::byte* begin;
    size_t bytes;
  };

  static constexpr size_t kMaxArrays = 64, kRedZone = 64;
  static constexpr size_t kMemory = kCapacity + kMaxArrays * (2 * kRedZone + kAlignment);
  static constexpr std::byte kGuard{0xA7};

  static size_t padding(size_t bytes) { return (kAlignment - bytes % kAlignment) % kAlignment; }

  void* add(const void* key, size_t bytes, const char* name) {
    declared_ += bytes;
    if (declared_ > kCapacity || count_ == kMaxArrays) {
      throw std::runtime_error(std::string("shared memory is full: no space for ") + name + " of " +
                               std::to_string(bytes) + " bytes");
    }
    std::byte* red_zone = memory_.get() + used_;
    std::byte* begin = red_zone + kRedZone;
    const size_t after = padding(bytes) + kRedZone;
    std::memset(red_zone, static_cast<int>(kGuard), kRedZone);
    for (size_t i = 0; i < bytes; ++i) begin[i] = std::byte(kUnwritten >> (8 * (i % 4)));
    std::memset(begin + bytes, static_cast<int>(kGuard), after);
    poison(red_zone, kRedZone);
    poison(begin + bytes, after);
    used_ += kRedZone + bytes + after;
    arrays_[count_++] = {key, name, begin, bytes};
    return begin;
  }

  static void check(const Array& array, const std::byte* zone, size_t bytes, const char* where) {
    for (size_t i = 0; i < bytes; ++i) {
      if (zone[i] != kGuard) {
        throw std::runtime_error(std::string("shared memory was written ") + where + " " +
                                 array.name);
      }
    }
  }

  std::unique_ptr<std::byte[]> memory_;
  std::array<Array, kMaxArrays> arrays_{};
  size_t count_ = 0, used_ = 0, declared_ = 0;
};

}  // namespace simt
