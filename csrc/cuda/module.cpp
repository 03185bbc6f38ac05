// pmod_ops._C_cuda: an empty Python module, like pmod_ops._C. A library of its own: where it cannot
// be loaded, the CPU ops still work.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <sstream>
#include <string>

#include "cuda/adapter.h"

namespace {

// JSON. Asks the driver, but does not make a context on a GPU.
std::string cuda_info() {
  int devices = 0;
  const pmod::cuda::Status status = cudaGetDeviceCount(&devices);
  std::ostringstream info;
  info << R"({"archs": ")" PMOD_CUDA_ARCHS R"(", "cuda": ")" PMOD_CUDA_VERSION R"(", "devices": )"
       << devices << R"(, "problem": )";
  if (status == pmod::cuda::kSuccess) {
    info << "null}";
  } else {
    info << '"' << pmod::cuda::explain(status) << "\"}";
  }
  return info.str();
}

PyModuleDef module_definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_C_cuda",
    .m_doc = nullptr,
    .m_size = 0,
    .m_methods = nullptr,
    .m_slots = nullptr,
    .m_traverse = nullptr,
    .m_clear = nullptr,
    .m_free = nullptr,
};

// What an op says of an error of the CUDA runtime.
std::string cuda_error(int64_t status) {
  return pmod::cuda::explain(static_cast<pmod::cuda::Status>(status));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pmod, CompositeExplicitAutograd, m) {
  m.impl("cuda_info", TORCH_BOX(&cuda_info));
  m.impl("cuda_error", TORCH_BOX(&cuda_error));
}

PyMODINIT_FUNC PyInit__C_cuda() { return PyModuleDef_Init(&module_definition); }
