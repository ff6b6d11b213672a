#include <pybind11/pybind11.h>

namespace fuse {
void register_attention(pybind11::module_& m);
void register_frames(pybind11::module_& m);
void register_metrics(pybind11::module_& m);
void register_norm(pybind11::module_& m);
void register_parallel(pybind11::module_& m);
void register_random(pybind11::module_& m);
void register_sampler(pybind11::module_& m);
void register_shm(pybind11::module_& m);
void register_simd(pybind11::module_& m);
void register_spectral(pybind11::module_& m);
void register_thermal(pybind11::module_& m);
void register_warp(pybind11::module_& m);
void register_yuv(pybind11::module_& m);
}  // namespace fuse

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of FuseEngine. Arrays are checked, never converted or copied.";
    fuse::register_attention(m);
    fuse::register_frames(m);
    fuse::register_metrics(m);
    fuse::register_norm(m);
    fuse::register_parallel(m);
    fuse::register_random(m);
    fuse::register_sampler(m);
    fuse::register_shm(m);
    fuse::register_simd(m);
    fuse::register_spectral(m);
    fuse::register_thermal(m);
    fuse::register_warp(m);
    fuse::register_yuv(m);
}
