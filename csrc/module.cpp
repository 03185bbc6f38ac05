// pmod_ops._C: an empty Python module. Importing it loads this library, and loading the library
// runs the static registrations (STABLE_TORCH_LIBRARY_IMPL) of every op linked into it. Only
// Python's limited API is used, so one binary serves every CPython from 3.10 on.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa/dispatch.h"

namespace {

// JSON, so that fields can be added without a change of the op's schema. PMOD_COMPILER and
// PMOD_TORCH_TARGET are string literals written by CMakeLists.txt.
std::string build_info() {
  std::string levels;
  for (const pmod::cpu::Isa isa : pmod::cpu::available_isas()) {
    levels += (levels.empty() ? "\"" : ", \"") + pmod::cpu::isa_name(isa) + "\"";
  }
  return R"({"compiler": ")" PMOD_COMPILER R"(", "isa": [)" + levels + R"(], "active_isa": ")" +
         pmod::cpu::isa_name(pmod::cpu::active_isa()) +
         R"(", "torch_target": ")" PMOD_TORCH_TARGET R"("})";
}

PyModuleDef module_definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_C",
    .m_doc = nullptr,
    .m_size = 0,
    .m_methods = nullptr,
    .m_slots = nullptr,
    .m_traverse = nullptr,
    .m_clear = nullptr,
    .m_free = nullptr,
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pmod, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&module_definition); }
