// CUDA's names for barriers, shuffles, votes and reductions.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "simt/warp.h"

namespace simt {

template <typename T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// Sections of `width` lanes shuffle apart from each other.
struct Section {
  int first, last;

  Section(unsigned lane, int width) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
      throw std::runtime_error("the width of a shuffle must be a power of two up to 32");
    }
    first = static_cast<int>(lane) & ~(width - 1);
    last = first + width - 1;
  }
};

template <Shuffled T>
T shuffle(uint32_t mask, T value, int source, const Place& place) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(Operation::kShuffle, mask, bits, static_cast<unsigned>(source), place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint32_t vote(Operation operation, uint32_t mask, uint64_t value, const Place& place) {
  return static_cast<uint32_t>(collective(operation, mask, value, 0, place));
}

}  // namespace simt

inline void __syncthreads(simt::Place place = simt::Place::current()) {
  simt::barrier(false, place);
}
inline int __syncthreads_or(int vote, simt::Place place = simt::Place::current()) {
  return simt::barrier(vote != 0, place).any ? 1 : 0;
}
inline int __syncthreads_and(int vote, simt::Place place = simt::Place::current()) {
  return simt::barrier(vote != 0, place).all ? 1 : 0;
}
inline int __syncthreads_count(int vote, simt::Place place = simt::Place::current()) {
  return simt::barrier(vote != 0, place).count;
}
inline void __syncwarp(unsigned mask = ~0U, simt::Place place = simt::Place::current()) {
  simt::collective(simt::Operation::kSyncWarp, mask, 0, 0, place);
}

template <simt::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              simt::Place place = simt::Place::current()) {
  const simt::Section section(simt::this_thread().lane, width);
  return simt::shuffle(mask, value, section.first + (source & (width - 1)), place);
}
template <simt::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 simt::Place place = simt::Place::current()) {
  const auto lane = static_cast<int>(simt::this_thread().lane);
  const simt::Section section(lane, width);
  const int source = lane - static_cast<int>(delta);
  return simt::shuffle(mask, value, source < section.first ? lane : source, place);
}
template <simt::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   simt::Place place = simt::Place::current()) {
  const auto lane = static_cast<int>(simt::this_thread().lane);
  const simt::Section section(lane, width);
  const int source = lane + static_cast<int>(delta);
  return simt::shuffle(mask, value, source > section.last ? lane : source, place);
}
// A lane can read from an earlier section, but not from a later one.
template <simt::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  simt::Place place = simt::Place::current()) {
  const auto lane = static_cast<int>(simt::this_thread().lane);
  const simt::Section section(lane, width);
  const int source = (lane ^ lanes) & 31;
  return simt::shuffle(mask, value, source > section.last ? lane : source, place);
}

inline unsigned __ballot_sync(unsigned mask, int vote, simt::Place place = simt::Place::current()) {
  return simt::vote(simt::Operation::kBallot, mask, vote != 0 ? 1 : 0, place);
}
inline int __any_sync(unsigned mask, int vote, simt::Place place = simt::Place::current()) {
  return static_cast<int>(simt::vote(simt::Operation::kAny, mask, vote != 0 ? 1 : 0, place));
}
inline int __all_sync(unsigned mask, int vote, simt::Place place = simt::Place::current()) {
  return static_cast<int>(simt::vote(simt::Operation::kAll, mask, vote != 0 ? 1 : 0, place));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value,
                                  simt::Place place = simt::Place::current()) {
  return simt::vote(simt::Operation::kReduceAdd, mask, value, place);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value,
                                  simt::Place place = simt::Place::current()) {
  return simt::vote(simt::Operation::kReduceMin, mask, value, place);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value,
                                  simt::Place place = simt::Place::current()) {
  return simt::vote(simt::Operation::kReduceMax, mask, value, place);
}
template <simt::Shuffled T>
unsigned __match_any_sync(unsigned mask, T value, simt::Place place = simt::Place::current()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return simt::vote(simt::Operation::kMatchAny, mask, bits, place);
}
