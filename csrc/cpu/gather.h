// What route_gather shares with gather.
#pragma once

#include "cpu/adapter.h"

namespace pmod::cpu {

// x[index], zeros where the index is -1; x and index are checked.
Tensor copy_rows(const char* op, const Tensor& x, const Tensor& index);

}  // namespace pmod::cpu
