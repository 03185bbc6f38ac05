#include "cuda/adapter.h"

namespace pmod::cuda {

RowType row_type(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return RowType::kFloat;
    case ScalarType::BFloat16:
      return RowType::kBf16;
    default:
      check(t.scalar_type() == ScalarType::Half, "pmod_ops.", op, ": ", argument,
            ": expected float32, bfloat16 or float16 on a GPU; float64 rows are for the CPU");
      return RowType::kF16;
  }
}

ParameterTensor::ParameterTensor(const char* op, const char* argument, const OptionalTensor& t,
                                 const Tensor& like, int64_t size) {
  if (!t) return;
  const ScalarType type = t->scalar_type();
  check(type == like.scalar_type() || type == ScalarType::Float, "pmod_ops.", op, ": ", argument,
        ": expected the dtype of the rows or float32");
  kept_ = vector(op, argument, *t, type, size);
  parameter_ = {.data = kept_->const_data_ptr(), .type = row_type(op, argument, *kept_)};
}

}  // namespace pmod::cuda
