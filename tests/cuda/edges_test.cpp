// What row kernels do with numbers that are not finite, how scores keep their bits, and how many
// rows each op reads and writes.

#include <doctest.h>

#include <cmath>

#include "cuda/dispatch.h"
#include "cuda/dot.cuh"
#include "device.h"

namespace pmod::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What one entry of a row that is not kept does to the flag, and to the entries beside it.
template <typename T>
bool finite_with(double entry, uint8_t kind, int64_t hidden, int64_t i) {
  Buffer<T> x(3 * hidden, 0), out(3 * hidden, 0);
  std::fill_n(x.data(), 3 * hidden, nearest<T>(1.0));
  x[hidden + i] = nearest<T>(entry);
  const float gate[] = {1, 1, 1};
  const int32_t inverse[] = {-1, -1, -1};
  const uint8_t kinds[] = {kRoutable, kind, kRoutable};
  bool finite = false;
  cuda::launch_weighted_scatter_add({kTypeOf<T>, hidden, nullptr}, {.x = x.data(),
                                                                    .gate = gate,
                                                                    .inverse = inverse,
                                                                    .kind = kinds,
                                                                    .out = out.data(),
                                                                    .finite = &finite,
                                                                    .rows = 3,
                                                                    .gate_mlp = true,
                                                                    .scale_skipped = true});
  for (int64_t j = 0; j < 3 * hidden; ++j) {
    if (j != hidden + i) REQUIRE(value(out[j]) == 1.0);
  }
  return finite;
}

TEST_CASE_TEMPLATE("the finite flag sees every entry but those of padding", T, float, Bf16, F16) {
  for (const int64_t hidden : {40, 41}) {
    for (int64_t i = 0; i < hidden; ++i) {
      for (const double entry : {kInfinity, -kInfinity, std::nan("")}) {
        CHECK_FALSE(finite_with<T>(entry, kRoutable, hidden, i));
        CHECK_FALSE(finite_with<T>(entry, kAlways, hidden, i));
        CHECK(finite_with<T>(entry, kPadding, hidden, i));
      }
      CHECK(finite_with<T>(60000.0, kRoutable, hidden, i));
    }
  }
}

// Of the elements: what is not finite in `actual` is that in `expected`, and the other way round.
template <typename T, typename F>
void check_special(const char* what, const T* actual, int64_t size, const F& expected) {
  int64_t different = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double is = value(actual[i]), should = value(nearest<T>(expected(i)));
    const bool same = std::isfinite(is) ? std::isfinite(should)
                                        : is == should || (std::isnan(is) && std::isnan(should));
    different += same ? 0 : 1;
  }
  INFO(what);
  CHECK(different == 0);
}

TEST_CASE_TEMPLATE("infinities and NaN go where the equations put them", T, float, Bf16, F16) {
  for (const int64_t hidden : {64, 65}) {
    INFO("hidden ", hidden);
    Problem<T> p(43, hidden, 0);
    p.sprinkle(false);
    const Device<T> d(p, false);
    Buffer<T> out = d.matrix(p.rows, 0), residual = d.matrix(p.slots, 0);
    Buffer<T> rows = d.matrix(p.slots, 0);
    std::vector<float> rstd(p.slots);
    Allowed none;
    cuda::launch_weighted_scatter_add(d.rows(), {.x = none.read(p.x, "x"),
                                                 .residual = none.read(p.residual, "residual"),
                                                 .update = none.read(p.update, "update"),
                                                 .gate = p.gate.data(),
                                                 .inverse = d.inverse.data(),
                                                 .kind = p.kind.data(),
                                                 .out = none.write(out, "out"),
                                                 .rows = p.rows,
                                                 .slots = p.slots,
                                                 .gate_mlp = true,
                                                 .scale_skipped = true});
    cuda::launch_gather_add_rmsnorm(d.rows(), {.x = p.x.data(),
                                               .attn_out = none.read(p.attn_out, "attn_out"),
                                               .index = d.index.data(),
                                               .weight = d.norm_weight(none),
                                               .eps = p.eps,
                                               .residual = none.write(residual, "residual"),
                                               .out = none.write(rows, "rows"),
                                               .rstd = rstd.data(),
                                               .rows = p.rows,
                                               .slots = p.slots});
    for (int64_t r = 0; r < p.rows; ++r) {
      if (!p.kept(r)) {
        check_special("skipped", p.row(out, r), hidden, [&](int64_t i) {
          return p.routable(r) ? static_cast<float>(p.gate[r] * value(p.row(p.x, r)[i]))
                               : value(p.row(p.x, r)[i]);
        });
        continue;
      }
      const int64_t s = p.inverse[r];
      check_special("kept", p.row(out, r), hidden, [&](int64_t i) {
        return static_cast<float>(value(p.row(p.residual, s)[i]) +
                                  p.gate[r] * value(p.row(p.update, s)[i]));
      });
      const T* sum = p.row(residual, s);
      check_special("residual", sum, hidden, [&](int64_t i) {
        return static_cast<float>(value(p.row(p.x, r)[i]) + value(p.row(p.attn_out, s)[i]));
      });
      double squares = 0;
      for (int64_t i = 0; i < hidden; ++i) squares += value(sum[i]) * value(sum[i]);
      const bool lost = std::isnan(squares);
      CHECK(std::isnan(rstd[s]) == lost);
      for (int64_t i = 0; i < hidden && lost; ++i) CHECK(std::isnan(value(p.row(rows, s)[i])));
    }
  }
}

template <typename S, typename W>
__global__ void dot_kernel(const typename S::T* rows, const W* weight, float* out, int hidden,
                           int threads) {
  const auto* row = rows + int64_t{blockIdx.x} * hidden;
  const float dot = cuda::dot_product_like_block<S>(row, weight, hidden, threads);
  if (threadIdx.x == 0) out[blockIdx.x] = dot;
}

TEST_CASE_TEMPLATE("a warp scores a row as the block does that writes it", T, float, Bf16, F16) {
  for (const int64_t hidden : {1, 65, 200, 1032, 4096, 4099, 16392}) {
    const Problem<T> p(hidden > 10000 ? 5 : 11, hidden, 0);
    for (const bool wide : {false, true}) {
      INFO("hidden ", hidden, " float weights ", wide);
      const Device<T> d(p, wide);
      Buffer<T> out = d.matrix(p.rows, 0);
      std::vector<float> logits = d.numbers(p.rows), again = d.numbers(p.rows);
      Allowed none;
      cuda::launch_weighted_scatter_add(d.rows(), {.x = none.read(p.x, "x"),
                                                   .residual = none.read(p.residual, "residual"),
                                                   .update = none.read(p.update, "update"),
                                                   .gate = p.gate.data(),
                                                   .inverse = d.inverse.data(),
                                                   .kind = p.kind.data(),
                                                   .out = none.write(out, "out"),
                                                   .next_weight = d.router_weight(none),
                                                   .next_logits = logits.data(),
                                                   .rows = p.rows,
                                                   .slots = p.slots,
                                                   .gate_mlp = true,
                                                   .scale_skipped = true});
      cuda::dispatch_rows(d.rows(), {}, [&]<typename Row, bool kAligned>() {
        if constexpr (std::is_same_v<Row, T>) {
          using S = cuda::Streamed<T, kAligned>;
          const auto count = static_cast<unsigned>(p.rows);
          const auto threads = static_cast<int>(cuda::block_size<S>(hidden));
          const auto size = static_cast<int>(hidden);
          if (wide) {
            cuda::launch(dot_kernel<S, float>, count, 32, nullptr, false, out.data(),
                         d.wide_router.data(), again.data(), size, threads);
          } else {
            cuda::launch(dot_kernel<S, T>, count, 32, nullptr, false, out.data(), d.router.data(),
                         again.data(), size, threads);
          }
        }
        return cuda::kSuccess;
      });
      for (int64_t r = 0; r < p.rows; ++r) {
        if (p.routable(r)) CHECK(bits_of(logits[r]) == bits_of(again[r]));
      }
    }
  }
}

}  // namespace
}  // namespace pmod::test
