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

void require_batch(const char* name, const py::array& a, const py::array& x, py::ssize_t channels) {
    require_floats_like(name, a, require_floats("x", x));
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
    const Storage storage = require_floats("x", x);
    const Numbers px{x.data(), storage}, pe{eps.data(), storage}, pm{mask.data(), storage},
        p1{y1.data(), storage}, p2{y2.data(), storage};
    const Results po{out.mutable_data(), storage};
    const std::ptrdiff_t images = x.shape(0), n = x.shape(2) * x.shape(3);
    const auto step = form == 0 ? joint_ddim_pixels<JointForm::code>
                                : joint_ddim_pixels<JointForm::paper>;
    py::gil_scoped_release release;
    parallel_for(images * n, kGrain, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for_each_plane(begin, end, n, [&](std::ptrdiff_t i, std::ptrdiff_t at, std::ptrdiff_t m) {
            const std::ptrdiff_t image = 3 * i * n;
            if (storage == Storage::float32) {
                const std::ptrdiff_t one = i * n + at, three = image + at;
                step(px.read(three, m, nullptr), pe.read(three, m, nullptr),
                     pm.read(one, m, nullptr), p1.read(one, m, nullptr), p2.read(one, m, nullptr),
                     po.place(three, nullptr), n, m, k);
                return;
            }
            constexpr std::ptrdiff_t block = kStorageBlock;
            float wide[3][3 * block], single[3][block];  // x, eps, out; mask, y1, y2
            for_each_block(storage, at, at + m, [&](std::ptrdiff_t first, std::ptrdiff_t count) {
                for (std::ptrdiff_t c = 0; c < 3; ++c) {
                    px.read(image + c * n + first, count, wide[0] + c * block);
                    pe.read(image + c * n + first, count, wide[1] + c * block);
                }
                const std::ptrdiff_t one = i * n + first;
                pm.read(one, count, single[0]);
                p1.read(one, count, single[1]);
                p2.read(one, count, single[2]);
                step(wide[0], wide[1], single[0], single[1], single[2], wide[2], block, count, k);
                for (std::ptrdiff_t c = 0; c < 3; ++c) {
                    po.keep(image + c * n + first, count, wide[2] + c * block);
                }
            });
        });
    });
}

void require_like(const char* name, const py::array& a, const py::array& x) {
    require_floats_like(name, a, require_floats("x", x));
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
    const void* noise_data = nullptr;
    if (!noise_or_none.is_none()) {
        if (!py::isinstance<py::array>(noise_or_none)) {
            throw py::type_error("noise: got " +
                                 py::str(py::type::of(noise_or_none)).cast<std::string>() +
                                 ", expected an array or None");
        }
        const auto noise = py::reinterpret_borrow<py::array>(noise_or_none);
        require_like("noise", noise, x);
        require_apart("out", out, "noise", noise, true);
        noise_data = noise.data();
    } else if (sigma != 0.0) {
        throw py::value_error("noise: got None, expected an array for sigma " +
                              std::to_string(sigma));
    }
    require_positive("sqrt_abar", sqrt_abar);
    const DdimCoefficients k{
        static_cast<float>(1.0 / sqrt_abar), static_cast<float>(sqrt_one_minus_abar),
        static_cast<float>(sqrt_abar_prev), static_cast<float>(direction),
        static_cast<float>(sigma)};
    const Storage storage = require_floats("x", x);
    const Numbers px{x.data(), storage}, pe{eps.data(), storage}, pn{noise_data, storage};
    const Results po{out.mutable_data(), storage};
    const std::ptrdiff_t n = x.size();
    py::gil_scoped_release release;
    parallel_for(n, kGrain, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        float room[4][kStorageBlock];
        for_each_block(storage, begin, end, [&](std::ptrdiff_t at, std::ptrdiff_t m) {
            const float *from = px.read(at, m, room[0]), *e = pe.read(at, m, room[1]);
            float* to = po.place(at, room[2]);
            if (noise_data == nullptr) ddim_step(from, e, to, m, k);
            else ddim_step_noise(from, e, pn.read(at, m, room[3]), to, m, k);
            po.keep(at, m, to);
        });
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
    void* x0_data = nullptr;
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
        x0_data = x0_a.mutable_data();
    }
    const DdimCoefficients k{
        static_cast<float>(1.0 / sqrt_abar), static_cast<float>(sqrt_one_minus_abar),
        static_cast<float>(sqrt_abar_prev), static_cast<float>(direction), 0.0f};
    const Storage storage = require_floats("x", x);
    const Numbers px{x.data(), storage}, pa{eps_a.data(), storage}, pb{eps_b.data(), storage},
        pw{weight.data(), storage};
    const Results po{out.mutable_data(), storage}, p0{x0_data, storage};
    const std::ptrdiff_t planes = x.shape(0) * x.shape(1), channels = x.shape(1);
    const std::ptrdiff_t n = x.shape(2) * x.shape(3);
    py::gil_scoped_release release;
    parallel_for(planes * n, kGrain, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for_each_plane(begin, end, n, [&](std::ptrdiff_t i, std::ptrdiff_t at, std::ptrdiff_t m) {
            float room[6][kStorageBlock];
            for_each_block(storage, at, at + m, [&](std::ptrdiff_t first, std::ptrdiff_t count) {
                const std::ptrdiff_t here = i * n + first;
                const float *from = px.read(here, count, room[0]),
                            *a = pa.read(here, count, room[1]), *b = pb.read(here, count, room[2]),
                            *w = pw.read(i / channels * n + first, count, room[3]);
                float* to = po.place(here, room[4]);
                if (x0_data == nullptr) {
                    compose_priors(from, a, b, w, to, count, k);
                } else {
                    float* x0 = p0.place(here, room[5]);
                    compose_priors_x0(from, a, b, w, to, x0, count, k);
                    p0.keep(here, count, x0);
                }
                po.keep(here, count, to);
            });
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
