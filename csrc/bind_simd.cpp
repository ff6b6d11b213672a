#include <pybind11/pybind11.h>

#include <string>

#include "simd.h"

namespace fuse {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

void bind_set_simd_level(const std::string& name) {
    for (int i = 0; i < 3; ++i) {
        if (name == kNames[i] && set_simd_level(static_cast<SimdLevel>(i))) return;
    }
    throw pybind11::value_error("level: got '" + name + "', expected baseline, avx2 or avx512, at most '" +
                                kNames[static_cast<int>(best_simd_level())] + "' on this processor");
}

}  // namespace

void register_simd(pybind11::module_& m) {
    m.def(
        "simd_level", [] { return kNames[static_cast<int>(simd_level())]; },
        "Instruction set of the kernels that choose one: 'baseline', 'avx2' or 'avx512'.");
    m.def("set_simd_level", &bind_set_simd_level, pybind11::arg("level"),
          "Use this instruction set from now on, in this process; for tests and measurements.");
}

}  // namespace fuse
