// Accesses of kernels to memory: checked against the registry, and counted; and atomics.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "simt/warp.h"

namespace simt {

// Throws unless the running thread may access these bytes. Returns the number of their range.
inline size_t check_access(Thread& me, const void* at, size_t bytes, bool write) {
  if (!me.waited) throw std::runtime_error("accesses memory before wait_for_predecessor()");
  if (bytes != 0 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(at) % bytes != 0) {
    throw std::runtime_error("misaligned: " + detail::registry().describe(at, bytes, write));
  }
  const detail::Registry& registry = detail::registry();
  if (registry.size() == 0) return 0;
  const size_t range = registry.find(at, bytes, write, me.range_hint);
  if (range == registry.size()) {
    throw std::runtime_error("out of bounds: " + registry.describe(at, bytes, write));
  }
  me.range_hint = range;
  return range;
}

// Also outside of kernels, where there is nothing to check, for helpers that are called there.
inline void count_access(const void* at, size_t bytes, bool write) {
  if (current == nullptr) return;
  const Unwatched quiet;
  Traffic& traffic = (*current->block->tally)[check_access(*current, at, bytes, write)];
  (write ? traffic.written : traffic.read) += static_cast<int64_t>(bytes);
}

// Of shared memory or not.
inline void check_atomic(const void* at, size_t bytes) {
  const Unwatched quiet;
  Thread& me = this_thread();
  if (!me.block->shared.holds(at)) check_access(me, at, bytes, true);
  me.block->engine->maybe_yield(me);
}

// What CUDA adds to atomically, but for floats: the order of additions would show in the sum.
template <typename T>
concept Atomic =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <typename T>
concept AtomicOrdered = Atomic<T> || std::is_same_v<T, long long>;

// Replaces *at by what `next` makes of it; returns what was there.
template <AtomicOrdered T, typename Next>
T atomic_update(T* at, Next next) {
  check_atomic(at, sizeof(T));
  T before = __atomic_load_n(at, __ATOMIC_ACQUIRE);
  while (!__atomic_compare_exchange_n(at, &before, next(before), false, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE)) {
  }
  return before;
}

template <typename T>
const T& load_read_only(const T* at) {
  if (current != nullptr) {
    const Unwatched quiet;
    check_access(*current, at, sizeof(T), false);
  }
  return *at;
}

}  // namespace simt

template <simt::Atomic T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  simt::check_atomic(at, sizeof(T));
  return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
}
template <simt::Atomic T>
T atomicSub(T* at, std::type_identity_t<T> value) {
  simt::check_atomic(at, sizeof(T));
  return __atomic_fetch_sub(at, value, __ATOMIC_ACQ_REL);
}
template <simt::Atomic T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  simt::check_atomic(at, sizeof(T));
  return __atomic_fetch_or(at, value, __ATOMIC_ACQ_REL);
}
template <simt::Atomic T>
T atomicAnd(T* at, std::type_identity_t<T> value) {
  simt::check_atomic(at, sizeof(T));
  return __atomic_fetch_and(at, value, __ATOMIC_ACQ_REL);
}
template <simt::AtomicOrdered T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return simt::atomic_update(at, [=](T before) { return before < value ? value : before; });
}
template <simt::AtomicOrdered T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  return simt::atomic_update(at, [=](T before) { return value < before ? value : before; });
}
template <simt::Atomic T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  simt::check_atomic(at, sizeof(T));
  return __atomic_exchange_n(at, value, __ATOMIC_ACQ_REL);
}
template <simt::Atomic T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  simt::check_atomic(at, sizeof(T));
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

// Orders nothing here that the atomics do not, but others may come first.
inline void __threadfence() {
  {
    const simt::Unwatched quiet;
    simt::Thread& me = simt::this_thread();
    me.block->engine->maybe_yield(me);
  }
  if constexpr (!simt::kThreadSanitizer) __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() { __threadfence(); }

template <typename T>
T __ldg(const T* at) {
  return simt::load_read_only(at);
}
