// How many rows the loops read and write, where rows are whole cache lines.
//
// A program of its own: the loops are compiled with counters here, for the lowest instruction set.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "cpu/rows/traffic.h"

#include <doctest.h>

#include <utility>

#include "traffic.h"

namespace pmod::cpu {

void count_read(const void* from, int64_t bytes) {
  test::counter->touch(from, bytes, &test::Region::read);
}
void count_write(const void* to, int64_t bytes) {
  test::counter->touch(to, bytes, &test::Region::written);
}

}  // namespace pmod::cpu

namespace pmod::test {
namespace {

template <typename T>
Traffic gather_rmsnorm(const Size& size) {
  Layer<T> a(size);
  const cpu::GatherRmsnorm<T> loop{.x = a.matrix(a.rows),
                                   .index = a.index.data(),
                                   .weight = {.blocks = a.weight.data()},
                                   .eps = 0,
                                   .rows = a.matrix(a.kept),
                                   .rstd = a.rstd.data(),
                                   .hidden = a.hidden,
                                   .streaming = true};
  return a.count([&] { a.loops.gather_rmsnorm(loop, 0, a.kept); });
}

template <typename T>
Traffic gather_add_rmsnorm(const Size& size) {
  Layer<T> a(size);
  const cpu::GatherAddRmsnorm<T> loop{.x = a.matrix(a.rows),
                                      .attn_out = a.matrix(a.kept),
                                      .index = a.index.data(),
                                      .weight = {.blocks = a.weight.data()},
                                      .eps = 0,
                                      .residual = a.matrix(a.kept),
                                      .rows = a.matrix(a.kept),
                                      .rstd = a.rstd.data(),
                                      .hidden = a.hidden,
                                      .streaming = true};
  return a.count([&] { a.loops.gather_add_rmsnorm(loop, 0, a.kept); });
}

template <typename T>
Traffic gather_add_rmsnorm_backward(const Size& size) {
  Layer<T> a(size);
  const cpu::GatherAddRmsnormBackward<T> loop{.grad_residual = nullptr,
                                              .grad_out = a.matrix(a.rows),
                                              .grad_rows = a.matrix(a.kept),
                                              .residual = a.matrix(a.kept),
                                              .index = a.index.data(),
                                              .weight = {.blocks = a.weight.data()},
                                              .rstd = a.rstd.data(),
                                              .grad_attn_out = a.matrix(a.kept),
                                              .grad_x = nullptr,
                                              .hidden = a.hidden,
                                              .accumulate = false,
                                              .streaming = true,
                                              .norm = a.sum()};
  return a.count([&] { a.loops.gather_add_rmsnorm_backward(loop, 0, a.kept); });
}

// Scores the next layer and looks for NaN on the way: that reads no more.
template <typename T>
Traffic weighted_scatter_add(const Size& size, bool in_place, bool scale_skipped) {
  Layer<T> a(size);
  T* x = a.matrix(a.rows);
  const cpu::WeightedScatterAdd<T> loop{
      .x = x,
      .residual = a.matrix(a.kept),
      .update = a.matrix(a.kept),
      .gate = a.gate.data(),
      .inverse = a.inverse.data(),
      .kind = a.kind.data(),
      .out = in_place ? x : a.matrix(a.rows),
      .next_weight = in_place ? cpu::Weight<T>{} : cpu::Weight<T>{.blocks = a.weight.data()},
      .next_bias = 0,
      .next_logits = a.more_of_rows.data(),
      .hidden = a.hidden,
      .gate_mlp = true,
      .scale_skipped = scale_skipped,
      .check_finite = !in_place,
      .streaming = !in_place};
  return a.count([&] { a.loops.weighted_scatter_add(loop, 0, a.rows); });
}

// As in training: the kept rows of the gradient of x are left to readers_backward, and the gradient
// of the residual is the one that came in.
template <typename T>
Traffic weighted_scatter_add_backward(const Size& size) {
  Layer<T> a(size);
  const cpu::WeightedScatterAddBackward<T> loop{.grad_out = a.matrix(a.rows),
                                                .x = a.matrix(a.rows),
                                                .update = a.matrix(a.kept),
                                                .gate = a.gate.data(),
                                                .inverse = a.inverse.data(),
                                                .kind = a.kind.data(),
                                                .router_weight = {.blocks = a.weight.data()},
                                                .slope = a.gate.data(),
                                                .grad_x = a.matrix(a.rows),
                                                .grad_residual = nullptr,
                                                .grad_update = a.matrix(a.kept),
                                                .grad_gate = a.of_rows.data(),
                                                .grad_logits = a.more_of_rows.data(),
                                                .hidden = a.hidden,
                                                .gate_mlp = true,
                                                .scale_skipped = true,
                                                .streaming = true,
                                                .zero_kept = false,
                                                .router = a.sum()};
  return a.count([&] { a.loops.weighted_scatter_add_backward(loop, 0, a.rows); });
}

template <typename T>
Traffic readers_backward(const Size& size) {
  Layer<T> a(size);
  for (const int32_t row : a.index) a.of_rows[row] = 1;  // the logits of the others are done with
  const cpu::ReadersBackward<T> loop{.x = a.matrix(a.rows),
                                     .grad_rows = a.matrix(a.kept),
                                     .grad_kept = a.matrix(a.kept),
                                     .rstd = a.rstd.data(),
                                     .grad_logits = a.of_rows.data(),
                                     .inverse = a.inverse.data(),
                                     .index = a.index.data(),
                                     .slots = a.kept,
                                     .router_weight = {.blocks = a.weight.data()},
                                     .norm_weight = {.blocks = a.weight.data()},
                                     .grad_x = a.matrix(a.rows),
                                     .overwrite = true,
                                     .hidden = a.hidden,
                                     .router = a.sum(),
                                     .norm = a.sum()};
  return a.count([&] { a.loops.readers_backward(loop, 0, a.rows); });
}

void check(const Traffic& traffic, int64_t read, int64_t written) {
  CHECK(traffic.read == static_cast<double>(read));
  CHECK(traffic.written == static_cast<double>(written));
}

double rows_moved(std::initializer_list<Traffic> calls) {
  double sum = 0;
  for (const Traffic& call : calls) sum += call.read + call.written;
  return sum;
}

TEST_CASE_TEMPLATE("the loops move the rows that the documentation says", T, float, double, Bf16,
                   F16) {
  for (const int64_t hidden : {256, 4096, 4160}) {
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{40, 20}, {33, 7}, {12, 12}, {9, 1}}) {
      INFO("hidden ", hidden, " N ", n, " K ", k);
      const Size size{n, k, hidden};
      REQUIRE(static_cast<int64_t>(Layer<T>(size).index.size()) == k);
      check(gather_rmsnorm<T>(size), k, k);
      check(gather_add_rmsnorm<T>(size), 2 * k, 2 * k);
      check(weighted_scatter_add<T>(size, false, true), n + k, n);
      check(weighted_scatter_add<T>(size, true, true), n + k, n);
      check(weighted_scatter_add<T>(size, true, false), 2 * k, k);
      CHECK(rows_moved({gather_rmsnorm<T>(size), weighted_scatter_add<T>(size, false, true)}) ==
            static_cast<double>(2 * n + 3 * k));

      check(weighted_scatter_add_backward<T>(size), 2 * n, n);
      check(readers_backward<T>(size), 3 * k, k);
      CHECK(rows_moved({weighted_scatter_add_backward<T>(size), readers_backward<T>(size)}) ==
            static_cast<double>(3 * n + 4 * k));
      check(gather_add_rmsnorm_backward<T>(size), 3 * k, k);
    }
  }
}

}  // namespace
}  // namespace pmod::test
