// The table of row loops of one instruction set. Included once by each file of this folder, which
// CMakeLists.txt compiles for that instruction set under the name PMOD_ISA.

#include "cpu/isa/dispatch.h"
#include "cpu/rows/gather.h"
#include "cpu/rows/gather_add_rmsnorm.h"
#include "cpu/rows/gather_rmsnorm.h"
#include "cpu/rows/route.h"
#include "cpu/rows/route_gather.h"
#include "cpu/rows/weighted_scatter_add.h"

namespace pmod::cpu::PMOD_ISA {

template <typename T>
const RowLoops<T>& row_loops() {
  static constexpr RowLoops<T> kLoops = {
      .widen = widen_weight<T>,
      .arrange = arrange<T>,
      .restore = restore<T>,
      .activate = activate_rows,
      .score = score<T>,
      .gather = gather<T>,
      .gather_backward = gather_backward<T>,
      .gather_rmsnorm = gather_rmsnorm<T>,
      .gather_add_rmsnorm = gather_add_rmsnorm<T>,
      .gather_add_rmsnorm_backward = gather_add_rmsnorm_backward<T>,
      .readers_backward = readers_backward<T>,
      .weighted_scatter_add = weighted_scatter_add<T>,
      .weighted_scatter_add_backward = weighted_scatter_add_backward<T>,
  };
  return kLoops;
}

template const RowLoops<float>& row_loops<float>();
template const RowLoops<double>& row_loops<double>();
template const RowLoops<Bf16>& row_loops<Bf16>();
template const RowLoops<F16>& row_loops<F16>();

}  // namespace pmod::cpu::PMOD_ISA
