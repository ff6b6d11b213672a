#include "checks.h"
#include "joint_ddim.h"

namespace fuse {
namespace {

void require_batch(const char* name, const py::array& a, const py::array& x, py::ssize_t channels) {
    require<float>(name, a, "float32");
    require_contiguous(name, a);
    if (a.ndim() != 4 || a.shape(0) != x.shape(0) || a.shape(1) != channels ||
        a.shape(2) != x.shape(2) || a.shape(3) != x.shape(3)) {
        refuse(name, a, "(N, " + std::to_string(channels) + ", H, W) as x has it, " + describe(x));
    }
}

void bind_joint_ddim_step(const py::array& x, const py::array& eps, const py::array& mask,
                          const py::array& y1, const py::array& y2, py::array out,
                          double sqrt_abar, double sqrt_one_minus_abar, double sqrt_abar_prev,
                          double sqrt_one_minus_abar_prev, double lam, int form) {
    if (x.ndim() != 4) refuse("x", x, "shape (N, 3, H, W)");
    require_batch("x", x, x, 3);
    require_batch("eps", eps, x, 3);
    require_batch("mask", mask, x, 1);
    require_batch("y1", y1, x, 1);
    require_batch("y2", y2, x, 1);
    require_batch("out", out, x, 3);
    require_writeable("out", out);
    require_apart("out", out, "x", x, true);
    require_apart("out", out, "eps", eps, true);
    require_apart("out", out, "mask", mask, false);
    require_apart("out", out, "y1", y1, false);
    require_apart("out", out, "y2", y2, false);
    if (!(sqrt_abar > 0.0)) {
        throw py::value_error("sqrt_abar: got " + std::to_string(sqrt_abar) + ", expected > 0");
    }
    if (form != 0 && form != 1) {
        throw py::value_error("form: got " + std::to_string(form) +
                              ", expected 0 (code) or 1 (paper)");
    }
    const JointCoefficients k{
        static_cast<float>(1.0 / sqrt_abar), static_cast<float>(sqrt_one_minus_abar),
        static_cast<float>(sqrt_abar_prev), static_cast<float>(sqrt_one_minus_abar_prev),
        static_cast<float>(lam)};
    const auto px = static_cast<const float*>(x.data()), pe = static_cast<const float*>(eps.data()),
               pm = static_cast<const float*>(mask.data()), p1 = static_cast<const float*>(y1.data()),
               p2 = static_cast<const float*>(y2.data());
    const auto po = static_cast<float*>(out.mutable_data());
    const std::ptrdiff_t images = x.shape(0), n = x.shape(2) * x.shape(3);
    const auto step = form == 0 ? joint_ddim_image<JointForm::code>
                                : joint_ddim_image<JointForm::paper>;
    py::gil_scoped_release release;
    for (std::ptrdiff_t i = 0; i < images; ++i) {
        step(px + 3 * i * n, pe + 3 * i * n, pm + i * n, p1 + i * n, p2 + i * n, po + 3 * i * n, n,
             k);
    }
}

}  // namespace

void register_sampler(py::module_& m) {
    using py::arg;
    m.def("joint_ddim_step", &bind_joint_ddim_step, arg("x"), arg("eps"), arg("mask"), arg("y1"),
          arg("y2"), arg("out"), py::kw_only(), arg("sqrt_abar"), arg("sqrt_one_minus_abar"),
          arg("sqrt_abar_prev"), arg("sqrt_one_minus_abar_prev"), arg("lam"), arg("form"),
          "One DDIM step with the joint observation correction; out may be x or eps itself.");
}

}  // namespace fuse
