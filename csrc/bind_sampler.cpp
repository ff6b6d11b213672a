#include <algorithm>

#include "checks.h"
#include "ddim.h"
#include "joint_ddim.h"
#include "parallel.h"

namespace fuse {
namespace {

// Pixels per range at least: some 10 us of work, what waking a thread costs.
constexpr std::ptrdiff_t kGrain = 16384;

void require_positive(const char* name, double value) {
    if (!(value > 0.0)) {
        throw py::value_error(std::string(name) + ": got " + std::to_string(value) +
                              ", expected > 0");
    }
}

const float* floats(const py::array& a) { return static_cast<const float*>(a.data()); }

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
    require_positive("sqrt_abar", sqrt_abar);
    if (form != 0 && form != 1) {
        throw py::value_error("form: got " + std::to_string(form) +
                              ", expected 0 (code) or 1 (paper)");
    }
    const JointCoefficients k{
        static_cast<float>(1.0 / sqrt_abar), static_cast<float>(sqrt_one_minus_abar),
        static_cast<float>(sqrt_abar_prev), static_cast<float>(sqrt_one_minus_abar_prev),
        static_cast<float>(lam)};
    const float *px = floats(x), *pe = floats(eps), *pm = floats(mask), *p1 = floats(y1),
                *p2 = floats(y2);
    const auto po = static_cast<float*>(out.mutable_data());
    const std::ptrdiff_t images = x.shape(0), n = x.shape(2) * x.shape(3);
    const auto step = form == 0 ? joint_ddim_pixels<JointForm::code>
                                : joint_ddim_pixels<JointForm::paper>;
    py::gil_scoped_release release;
    parallel_for(images * n, kGrain, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for_each_plane(begin, end, n, [&](std::ptrdiff_t i, std::ptrdiff_t at, std::ptrdiff_t m) {
            const std::ptrdiff_t three = 3 * i * n + at, one = i * n + at;
            step(px + three, pe + three, pm + one, p1 + one, p2 + one, po + three, n, m, k);
        });
    });
}

void require_like(const char* name, const py::array& a, const py::array& x) {
    require<float>(name, a, "float32");
    require_contiguous(name, a);
    bool same = a.ndim() == x.ndim();
    for (py::ssize_t d = 0; same && d < a.ndim(); ++d) same = a.shape(d) == x.shape(d);
    if (!same) refuse(name, a, "the shape of x, " + describe(x));
}

void bind_ddim_step(const py::array& x, const py::array& eps, const py::object& noise_or_none,
                    py::array out, double sqrt_abar, double sqrt_one_minus_abar,
                    double sqrt_abar_prev, double direction, double sigma) {
    require_like("x", x, x);
    require_like("eps", eps, x);
    require_like("out", out, x);
    require_writeable("out", out);
    require_apart("out", out, "x", x, true);
    require_apart("out", out, "eps", eps, true);
    const float* pn = nullptr;
    if (!noise_or_none.is_none()) {
        if (!py::isinstance<py::array>(noise_or_none)) {
            throw py::type_error("noise: got " +
                                 py::str(py::type::of(noise_or_none)).cast<std::string>() +
                                 ", expected an array or None");
        }
        const auto noise = py::reinterpret_borrow<py::array>(noise_or_none);
        require_like("noise", noise, x);
        require_apart("out", out, "noise", noise, true);
        pn = floats(noise);
    } else if (sigma != 0.0) {
        throw py::value_error("noise: got None, expected an array for sigma " +
                              std::to_string(sigma));
    }
    require_positive("sqrt_abar", sqrt_abar);
    const DdimCoefficients k{
        static_cast<float>(1.0 / sqrt_abar), static_cast<float>(sqrt_one_minus_abar),
        static_cast<float>(sqrt_abar_prev), static_cast<float>(direction),
        static_cast<float>(sigma)};
    const float *px = floats(x), *pe = floats(eps);
    const auto po = static_cast<float*>(out.mutable_data());
    const std::ptrdiff_t n = x.size();
    py::gil_scoped_release release;
    parallel_for(n, kGrain, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        if (pn == nullptr) {
            ddim_step(px + begin, pe + begin, po + begin, end - begin, k);
        } else {
            ddim_step_noise(px + begin, pe + begin, pn + begin, po + begin, end - begin, k);
        }
    });
}

void bind_compose_priors(const py::array& x, const py::array& eps_a, const py::array& eps_b,
                         const py::array& weight, py::array out, const py::object& x0_a_or_none,
                         double sqrt_abar, double sqrt_one_minus_abar, double sqrt_abar_prev,
                         double direction) {
    if (x.ndim() != 4) refuse("x", x, "shape (N, C, H, W)");
    require_like("x", x, x);
    require_like("eps_a", eps_a, x);
    require_like("eps_b", eps_b, x);
    require_batch("weight", weight, x, 1);
    require_like("out", out, x);
    require_writeable("out", out);
    require_apart("out", out, "x", x, true);
    require_apart("out", out, "eps_a", eps_a, true);
    require_apart("out", out, "eps_b", eps_b, true);
    require_apart("out", out, "weight", weight, false);
    require_positive("sqrt_abar", sqrt_abar);
    float* p0 = nullptr;
    if (!x0_a_or_none.is_none()) {
        if (!py::isinstance<py::array>(x0_a_or_none)) {
            throw py::type_error("x0_a: got " +
                                 py::str(py::type::of(x0_a_or_none)).cast<std::string>() +
                                 ", expected an array or None");
        }
        auto x0_a = py::reinterpret_borrow<py::array>(x0_a_or_none);
        require_like("x0_a", x0_a, x);
        require_writeable("x0_a", x0_a);
        require_apart("x0_a", x0_a, "x", x, true);
        require_apart("x0_a", x0_a, "eps_a", eps_a, true);
        require_apart("x0_a", x0_a, "eps_b", eps_b, true);
        require_apart("x0_a", x0_a, "weight", weight, false);
        require_apart("x0_a", x0_a, "out", out, false);
        p0 = static_cast<float*>(x0_a.mutable_data());
    }
    const DdimCoefficients k{
        static_cast<float>(1.0 / sqrt_abar), static_cast<float>(sqrt_one_minus_abar),
        static_cast<float>(sqrt_abar_prev), static_cast<float>(direction), 0.0f};
    const float *px = floats(x), *pa = floats(eps_a), *pb = floats(eps_b), *pw = floats(weight);
    const auto po = static_cast<float*>(out.mutable_data());
    const std::ptrdiff_t planes = x.shape(0) * x.shape(1), channels = x.shape(1);
    const std::ptrdiff_t n = x.shape(2) * x.shape(3);
    py::gil_scoped_release release;
    parallel_for(planes * n, kGrain, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for_each_plane(begin, end, n, [&](std::ptrdiff_t i, std::ptrdiff_t at, std::ptrdiff_t m) {
            const std::ptrdiff_t here = i * n + at;
            const float* w = pw + i / channels * n + at;
            if (p0 == nullptr) {
                compose_priors(px + here, pa + here, pb + here, w, po + here, m, k);
            } else {
                compose_priors_x0(px + here, pa + here, pb + here, w, po + here, p0 + here, m, k);
            }
        });
    });
}

}  // namespace

void register_sampler(py::module_& m) {
    using py::arg;
    m.def("compose_priors", &bind_compose_priors, arg("x"), arg("eps_a"), arg("eps_b"),
          arg("weight"), arg("out"), arg("x0_a") = py::none(), py::kw_only(), arg("sqrt_abar"),
          arg("sqrt_one_minus_abar"), arg("sqrt_abar_prev"), arg("direction") = 0.0,
          "The DDIM mean of two priors' noise, eps_a by weight and eps_b by the rest; x0_a, if "
          "given, receives the first prior's own x0. out may be x, eps_a or eps_b itself.");
    m.def("ddim_step", &bind_ddim_step, arg("x"), arg("eps"), arg("noise").none(true), arg("out"),
          py::kw_only(), arg("sqrt_abar"), arg("sqrt_one_minus_abar"), arg("sqrt_abar_prev"),
          arg("direction"), arg("sigma") = 0.0,
          "One DDIM step, any shape; out may be x, eps or noise itself.");
    m.def("joint_ddim_step", &bind_joint_ddim_step, arg("x"), arg("eps"), arg("mask"), arg("y1"),
          arg("y2"), arg("out"), py::kw_only(), arg("sqrt_abar"), arg("sqrt_one_minus_abar"),
          arg("sqrt_abar_prev"), arg("sqrt_one_minus_abar_prev"), arg("lam"), arg("form"),
          "One DDIM step with the joint observation correction; out may be x or eps itself.");
}

}  // namespace fuse
