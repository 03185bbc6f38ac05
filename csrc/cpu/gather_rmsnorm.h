// What route_gather shares with gather_rmsnorm.
#pragma once

#include <tuple>

#include "cpu/adapter.h"

namespace pmod::cpu {

// (rows, rstd) of pmod::gather_rmsnorm; x and index are checked.
std::tuple<Tensor, Tensor> normalise_rows(const char* op, const Tensor& x, const Tensor& index,
                                          const Tensor& norm_weight, double eps);

}  // namespace pmod::cpu
