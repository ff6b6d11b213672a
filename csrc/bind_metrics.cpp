#include "checks.h"
#include "phase_energy.h"
#include "window_information.h"

namespace fuse {
namespace {

const double* map(const char* name, const py::array& a) {
    require<double>(name, a, "float64");
    require_contiguous(name, a);
    if (a.ndim() != 2 || a.shape(0) < 3 || a.shape(1) < 3) {
        refuse(name, a, "shape (H, W), at least (3, 3)");
    }
    return static_cast<const double*>(a.data());
}

void bind_window_information(const py::array& x, const py::array& f, py::array out) {
    const double* from = map("x", x);
    const double* other = map("f", f);
    if (!same_shape(x, f, 2)) refuse("f", f, "the shape of x, " + describe(x));
    require<double>("out", out, "float64");
    require_contiguous("out", out);
    require_writeable("out", out);
    const py::ssize_t height = x.shape(0), width = x.shape(1);
    if (out.ndim() != 2 || out.shape(0) != height - 2 || out.shape(1) != width - 2) {
        refuse("out", out, "two rows and two columns less than x, " + describe(x));
    }
    require_apart("out", out, "x", x, false);
    require_apart("out", out, "f", f, false);
    auto* to = static_cast<double*>(out.mutable_data());
    py::gil_scoped_release release;
    window_information(from, other, height, width, to);
}

double* map_out(const char* name, py::array& out, const py::array& like) {
    require<double>(name, out, "float64");
    require_contiguous(name, out);
    require_writeable(name, out);
    if (out.ndim() != 2 || out.shape(0) != like.shape(1) || out.shape(1) != like.shape(2)) {
        refuse(name, out, "a map of real, " + describe(like));
    }
    return static_cast<double*>(out.mutable_data());
}

void bind_phase_energy(const py::array& real, const py::array& imaginary, py::array energy,
                       py::array spread, py::array amplitude, py::array power, double tiny) {
    require<double>("real", real, "float64");
    require_contiguous("real", real);
    if (real.ndim() != 3 || real.shape(0) < 1) refuse("real", real, "shape (scales, H, W)");
    require<double>("imaginary", imaginary, "float64");
    require_contiguous("imaginary", imaginary);
    if (!same_shape(real, imaginary, 3)) {
        refuse("imaginary", imaginary, "the shape of real, " + describe(real));
    }
    if (!(tiny > 0.0)) {
        throw py::value_error("tiny: got " + std::to_string(tiny) + ", expected > 0");
    }
    PhaseEnergy a{};
    a.energy = map_out("energy", energy, real);
    a.spread = map_out("spread", spread, real);
    a.amplitude = map_out("amplitude", amplitude, real);
    a.power = map_out("power", power, real);
    const char* names[] = {"energy", "spread", "amplitude", "power"};
    const py::array* maps[] = {&energy, &spread, &amplitude, &power};
    for (int i = 0; i < 4; ++i) {
        require_apart(names[i], *maps[i], "real", real, false);
        require_apart(names[i], *maps[i], "imaginary", imaginary, false);
        for (int k = 0; k < i; ++k) {
            require_apart(names[i], *maps[i], names[k], *maps[k], false);
        }
    }
    a.real = static_cast<const double*>(real.data());
    a.imaginary = static_cast<const double*>(imaginary.data());
    a.scales = real.shape(0);
    a.pixels = real.shape(1) * real.shape(2);
    a.tiny = tiny;
    py::gil_scoped_release release;
    phase_energy(a);
}

}  // namespace

void register_metrics(py::module_& m) {
    using py::arg;
    m.def("phase_energy", &bind_phase_energy, arg("real"), arg("imaginary"), arg("energy"),
          arg("spread"), arg("amplitude"), arg("power"), py::kw_only(), arg("tiny"),
          "How much the scales of one orientation's filters agree in phase, pixel by pixel.");
    m.def("window_information", &bind_window_information, arg("x"), arg("f"), arg("out"),
          "2 I / (H + H) of every pair of 3 x 3 windows of two maps.");
}

}  // namespace fuse
