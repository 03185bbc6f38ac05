// Memory that kernels may touch, by name, and how many bytes of it they did. While no memory is
// allowed explicitly, all is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace simt {

struct Traffic {
  int64_t read = 0, written = 0;  // bytes, each as often as it was accessed

  Traffic& operator+=(const Traffic& other) {
    read += other.read;
    written += other.written;
    return *this;
  }
  bool operator==(const Traffic&) const = default;
};

namespace detail {

struct Range {
  const std::byte* begin;
  size_t bytes;
  bool writable;
  std::string name;
  uint64_t id;

  [[nodiscard]] bool holds(const void* at, size_t size, bool write) const {
    const auto offset = static_cast<size_t>(static_cast<const std::byte*>(at) - begin);
    return offset <= bytes && size <= bytes - offset && (writable || !write);
  }
};

class Registry {
 public:
  uint64_t add(const void* begin, size_t bytes, bool writable, std::string name) {
    ranges_.push_back(
        {static_cast<const std::byte*>(begin), bytes, writable, std::move(name), ++last_id_});
    return last_id_;
  }
  void remove(uint64_t id) {
    std::erase_if(ranges_, [&](const Range& range) { return range.id == id; });
  }

  [[nodiscard]] size_t size() const { return ranges_.size(); }

  // The number of a range that holds the access, or size() if none does. `hint` is looked at first.
  [[nodiscard]] size_t find(const void* at, size_t bytes, bool write, size_t hint) const {
    if (hint < ranges_.size() && ranges_[hint].holds(at, bytes, write)) return hint;
    size_t i = 0;
    while (i < ranges_.size() && !ranges_[i].holds(at, bytes, write)) ++i;
    return i;
  }

  // Where an access lies that no range holds.
  [[nodiscard]] std::string describe(const void* at, size_t bytes, bool write) const {
    std::ostringstream text;
    text << (write ? "writes " : "reads ") << bytes << " bytes at ";
    const auto* address = static_cast<const std::byte*>(at);
    const Range* nearest = nullptr;  // of those that begin before it, or of all
    for (const Range& range : ranges_) {
      if (range.begin <= address && (nearest == nullptr || range.begin > nearest->begin)) {
        nearest = &range;
      }
    }
    if (nearest == nullptr) {
      text << at << ", before all allowed memory";
    } else {
      text << "\"" << nearest->name << "\" + " << address - nearest->begin << ", which has "
           << nearest->bytes << " bytes"
           << (write && !nearest->writable ? " and is read-only" : "");
    }
    return text.str();
  }

  // Adds what was counted for each range and, last, outside of all.
  void count(const std::vector<Traffic>& tally) {
    for (size_t i = 0; i < tally.size(); ++i) {
      total_ += tally[i];
      if (i < ranges_.size()) by_name_[ranges_[i].name] += tally[i];
    }
  }
  void reset_traffic() {
    by_name_.clear();
    total_ = {};
  }
  [[nodiscard]] Traffic total() const { return total_; }
  [[nodiscard]] Traffic of(const std::string& name) const {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? Traffic{} : found->second;
  }

 private:
  std::vector<Range> ranges_;
  uint64_t last_id_ = 0;
  std::map<std::string, Traffic> by_name_;
  Traffic total_;
};

inline Registry& registry() {
  static Registry registry;
  return registry;
}

}  // namespace detail

// While it lives, kernels may access these bytes. Not to be made or destroyed during a launch.
class [[nodiscard]] AllowedMemory {
 public:
  AllowedMemory(const void* begin, size_t bytes, bool writable, std::string name)
      : id_(detail::registry().add(begin, bytes, writable, std::move(name))) {}
  ~AllowedMemory() {
    if (id_ != 0) detail::registry().remove(id_);
  }
  AllowedMemory(AllowedMemory&& other) noexcept : id_(std::exchange(other.id_, 0)) {}
  AllowedMemory& operator=(AllowedMemory&& other) noexcept {
    std::swap(id_, other.id_);
    return *this;
  }

 private:
  uint64_t id_;
};

inline AllowedMemory allow(const void* begin, size_t bytes, bool writable,
                           std::string name = "unnamed") {
  return {begin, bytes, writable, std::move(name)};
}

// Bytes counted since the last reset: of everything, or of the allowed memory of that name.
inline Traffic traffic() { return detail::registry().total(); }
inline Traffic traffic(const std::string& name) { return detail::registry().of(name); }
inline void reset_traffic() { detail::registry().reset_traffic(); }

}  // namespace simt
