#include <complex>

#include "checks.h"
#include "wiener.h"

namespace fuse {
namespace {

void bind_wiener_filter(const py::array& x, const py::array& spectrum, py::array out) {
    require<float>("x", x, "float32");
    require_contiguous("x", x);
    if (x.ndim() != 3) refuse("x", x, "shape (B, H, W)");
    const bool real = holds<float>(spectrum);
    if (!real && !holds<std::complex<float>>(spectrum)) {
        refuse("spectrum", spectrum, "aligned complex64 or float32 in native byte order");
    }
    require_contiguous("spectrum", spectrum);
    if (spectrum.ndim() != 2 || spectrum.shape(0) != x.shape(1) ||
        spectrum.shape(1) != x.shape(2) / 2 + 1) {
        refuse("spectrum", spectrum, "shape (H, W // 2 + 1) for x " + describe(x));
    }
    require<float>("out", out, "float32");
    require_contiguous("out", out);
    require_writeable("out", out);
    bool same = out.ndim() == 3;
    for (py::ssize_t d = 0; same && d < 3; ++d) same = out.shape(d) == x.shape(d);
    if (!same) refuse("out", out, "the shape of x, " + describe(x));
    require_apart("out", out, "x", x, true);
    require_apart("out", out, "spectrum", spectrum, false);
    Wiener a{};
    a.x = static_cast<const float*>(x.data());
    a.spectrum = static_cast<const float*>(spectrum.data());
    a.out = static_cast<float*>(out.mutable_data());
    a.h = x.shape(1);
    a.w = x.shape(2);
    a.complex_spectrum = !real;
    const std::ptrdiff_t pictures = x.shape(0);
    if (x.size() == 0) return;
    py::gil_scoped_release release;
    wiener_filter(a, pictures);
}

}  // namespace

void register_spectral(py::module_& m) {
    using py::arg;
    m.def("wiener_filter", &bind_wiener_filter, arg("x"), arg("spectrum"), arg("out"),
          "out = irfft2(spectrum * rfft2(x)) for a half spectrum; out may be x itself.");
}

}  // namespace fuse
