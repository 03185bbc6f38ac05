// pmod_emulated: loading it registers the emulated ops under pmod_emulated::; its functions set the
// schedule of the emulator and read its counters.

#include <pybind11/pybind11.h>

#include "cuda/launchers.h"

namespace py = pybind11;

PYBIND11_MODULE(pmod_emulated, m) {
  m.def(
      "set_schedule",
      [](uint64_t seed, unsigned os_threads) {
        simt::Options options = simt::Options::from_environment();
        options.seed = seed;
        if (os_threads > 0) options.os_threads = os_threads;
        simt::set_options(options);
      },
      py::arg("seed"), py::arg("os_threads") = 0,
      "Seed of a random order of blocks, warps and threads, 0 = in order; and on how many OS "
      "threads.");
  m.def("select_scratch_bytes", &pmod::cuda::select_scratch_bytes, py::arg("rows"),
        py::arg("sequences"), py::arg("pools"), py::arg("max_length"),
        "What the kernels ask for, to be compared with the fake of the op.");
  m.def("reset_traffic", &simt::reset_traffic, "Forget the bytes counted so far.");
  m.def(
      "traffic",
      [] {
        const simt::Traffic total = simt::traffic();
        return py::make_tuple(total.read, total.written);
      },
      "Bytes of rows read and written since the last reset.");
}
