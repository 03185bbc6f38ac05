// Memory of rows, as unaligned as one likes, that notices a write beyond its ends.
#pragma once

#include <doctest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>

#include "cpu/rows/loops.h"
#include "values.h"

namespace pmod::test {

// Starts `offset` elements behind a cache line. What nobody has written is NaN, all bits set.
template <typename T>
class Buffer {
 public:
  Buffer() : Buffer(0, 0) {}
  Buffer(int64_t size, int64_t offset)
      : size_(size),
        offset_(offset),
        memory_(static_cast<unsigned char*>(::operator new(bytes(), kAlignment))) {
    std::memset(memory_.get(), kGuard, bytes());
    if (size > 0) std::memset(data(), 0xFF, size * sizeof(T));
  }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;
  ~Buffer() {
    if (memory_) CHECK_MESSAGE(intact(), "a write beyond the ends of a buffer");
  }

  Buffer clone() const {
    Buffer copy(size_, offset_);
    if (size_ > 0) std::memcpy(copy.data(), data(), size_ * sizeof(T));
    return copy;
  }

  T* data() { return reinterpret_cast<T*>(memory_.get()) + offset_; }
  const T* data() const { return reinterpret_cast<const T*>(memory_.get()) + offset_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kAlignment{cpu::kCacheLine};
  static constexpr unsigned char kGuard = 0xA5;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGuardBytes = 0;  // the sanitizer sees reads beyond the end as well
#else
  static constexpr int64_t kGuardBytes = 256;
#endif

  int64_t bytes() const { return (offset_ + size_) * int64_t{sizeof(T)} + kGuardBytes; }

  bool intact() const {
    for (int64_t i = 0; i < bytes(); ++i) {
      const int64_t at = i - offset_ * int64_t{sizeof(T)};
      const bool inside = at >= 0 && at < size_ * int64_t{sizeof(T)};
      if (!inside && memory_.get()[i] != kGuard) return false;
    }
    return true;
  }

  struct Delete {
    void operator()(unsigned char* memory) const { ::operator delete(memory, kAlignment); }
  };
  int64_t size_, offset_;
  std::unique_ptr<unsigned char, Delete> memory_;
};

// The same numbers on every machine, which the distributions of the standard do not promise.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint64_t bits() { return engine_(); }
  int64_t below(int64_t end) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end));
  }
  double uniform(double low, double high) {
    return low + (high - low) * std::ldexp(static_cast<double>(engine_() >> 11), -53);
  }
  // Bell-shaped, of variance 1 or so, with zeros of both signs among them.
  double normal() {
    const double v = uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1);
    return engine_() % 32 == 0 ? std::copysign(0.0, v) : v;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace pmod::test
