// The k-th largest of n logits in O(n): a radix select over keys that sort like the logits.
// Tensor-free. Equals a stable descending sort: NaN first, then +inf ... -inf, -0 equal to +0.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace pmod {

template <typename A>
using SortKey = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

template <typename A>
inline SortKey<A> sort_key(A logit) {
  using Key = SortKey<A>;
  constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);
  if (logit != logit) return ~Key(0);
  const Key bits = std::bit_cast<Key>(logit == A(0) ? A(0) : logit);
  return (bits & kSign) ? ~bits : (bits | kSign);
}

// Everything above `key` is kept, and the first `ties` entries equal to it.
template <typename Key>
struct Threshold {
  Key key;
  int64_t ties;
};

// Requires 1 <= k <= n. After the first digit few keys are left, so the cost is that of two
// sweeps over the keys.
template <typename Key>
Threshold<Key> kth_largest(const Key* keys, int64_t n, int64_t k) {
  constexpr unsigned kDigit = 11;  // 2,048 counters stay in the first-level cache
  std::array<int32_t, 1U << kDigit> count{};
  const std::unique_ptr<Key[]> candidates(new Key[n]);
  const Key* left = keys;
  Key prefix = 0;
  for (unsigned high = 8 * sizeof(Key); high > 0;) {
    const unsigned low = high > kDigit ? high - kDigit : 0;
    const Key mask = (Key(1) << (high - low)) - 1;
    count.fill(0);
    for (int64_t i = 0; i < n; ++i) ++count[(left[i] >> low) & mask];
    Key digit = mask;
    while (count[digit] < k) k -= count[digit--];
    prefix |= digit << low;
    int64_t matching = 0;
    for (int64_t i = 0; low > 0 && i < n; ++i) {
      // may be its own source: a key never moves to a later place
      candidates[matching] = left[i];
      matching += ((left[i] >> low) & mask) == digit ? 1 : 0;
    }
    left = candidates.get();
    n = matching;
    high = low;
  }
  return {.key = prefix, .ties = k};
}

}  // namespace pmod
