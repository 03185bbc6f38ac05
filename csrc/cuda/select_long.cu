// Launches of select_long.cuh, and the scratch that they need.

#include <algorithm>
#include <bit>

#include "cuda/select_long.cuh"

namespace pmod::cuda {
namespace {

constexpr int kMostPasses = 2 * kLogitBits / kDigitBits;
constexpr int kOpenCounts = 16;  // more than the passes, and a whole number of PoolStates
static_assert(kOpenCounts > kMostPasses);

int64_t parts_of(int64_t rows, int64_t sequences) { return rows / kPartRows + sequences; }

// Of the memory at the start, which must be 0.
int64_t counter_bytes(int64_t pools) {
  return (pools * kDigits + kOpenCounts) * int64_t{sizeof(int32_t)};
}

LongSelect on_scratch(const Select& select) {
  auto* bytes = static_cast<unsigned char*>(select.scratch);
  auto* counts = reinterpret_cast<int32_t*>(bytes);
  auto* states = reinterpret_cast<PoolState*>(bytes + counter_bytes(select.pools));
  const auto last = static_cast<uint64_t>(std::max<int64_t>(select.rows - 1, 0));
  const int digits = (std::bit_width(last) + kDigitBits - 1) / kDigitBits;
  return {.select = select,
          .counts = counts,
          .open = counts + select.pools * kDigits,
          .states = states,
          .kept = reinterpret_cast<int32_t*>(states + select.pools),
          .parts = parts_of(select.rows, select.sequences),
          .row_bits = digits * kDigitBits};
}

// Launches one kernel after the other, until one fails.
class Launches {
 public:
  explicit Launches(Stream stream) : stream_(stream) {}

  template <typename Kernel, typename... Arguments>
  void launch(Kernel kernel, int64_t grid, unsigned block, const Arguments&... arguments) {
    if (status_ != kSuccess || grid == 0) return;
    status_ =
        cuda::launch(kernel, static_cast<unsigned>(grid), block, stream_, false, arguments...);
  }
  void set_bytes(void* to, int value, int64_t bytes) {
    if (status_ != kSuccess || bytes == 0) return;
    status_ = cuda::set_bytes(to, value, bytes, stream_);
  }
  [[nodiscard]] Status status() const { return status_; }

 private:
  Stream stream_;
  Status status_ = kSuccess;
};

template <bool kPools>
void launch_selection(const LongSelect& a, Launches& kernels) {
  for (int pass = 0, shift = kLogitBits + a.row_bits; shift > 0; ++pass) {
    shift -= kDigitBits;
    kernels.launch(count_digits_kernel<kPools>, a.parts, kPartThreads, a, pass, shift);
    kernels.launch(pick_digits_kernel, a.select.pools, kDigits, a, pass, shift);
  }
  kernels.launch(count_kept_kernel<kPools>, a.parts, kPartThreads, a);
  kernels.launch(add_up_kept_kernel, a.select.sequences, kPartThreads, a);
  kernels.launch(write_slots_kernel<kPools>, a.parts, kPartThreads, a);
}

}  // namespace

int64_t select_scratch_bytes(int64_t rows, int64_t sequences, int64_t pools, int64_t max_length) {
  if (max_length <= kOneBlockRows) return 0;
  return counter_bytes(pools) + pools * int64_t{sizeof(PoolState)} +
         parts_of(rows, sequences) * int64_t{sizeof(int32_t)};
}

Status launch_select_long(const Gate& gate, const Select& select, Stream stream) {
  const LongSelect a = on_scratch(select);
  Launches kernels(stream);
  kernels.set_bytes(select.index, 0xFF, select.slots * int64_t{sizeof(int32_t)});
  kernels.set_bytes(a.counts, 0, counter_bytes(select.pools));
  if (select.pool_id != nullptr) {
    launch_selection<true>(a, kernels);
  } else {
    launch_selection<false>(a, kernels);
  }
  if (gate.activation == Activation::kSoftmax) {
    kernels.launch(gate_kernel, select.sequences, 1024, gate, select);
  } else {
    kernels.launch(gate_kernel, (select.rows + kGateRows - 1) / kGateRows, 256, gate, select);
  }
  return kernels.status();
}

}  // namespace pmod::cuda
