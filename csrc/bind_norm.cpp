#include "checks.h"
#include "group_norm.h"

namespace fuse {
namespace {

const float* floats(const char* name, const py::array& a) {
    require<float>(name, a, "float32");
    require_contiguous(name, a);
    return static_cast<const float*>(a.data());
}

void bind_group_norm_silu(const py::array& x, const py::array& weight, const py::array& bias,
                          const py::object& shift_or_none, py::array out, std::ptrdiff_t groups,
                          double eps, bool silu) {
    GroupNorm a{};
    a.x = {x.data(), require_floats("x", x)};
    require_contiguous("x", x);
    if (x.ndim() != 4) refuse("x", x, "shape (N, C, H, W)");
    a.n = x.shape(0);
    a.c = x.shape(1);
    a.pixels = x.shape(2) * x.shape(3);
    if (groups < 1 || a.c % groups != 0) {
        throw py::value_error("groups: got " + std::to_string(groups) +
                              ", expected a divisor of the channels of x, " + describe(x));
    }
    if (!(eps >= 0.0)) {
        throw py::value_error("eps: got " + std::to_string(eps) + ", expected >= 0");
    }
    a.groups = groups;
    a.eps = eps;
    a.silu = silu;
    a.weight = floats("weight", weight);
    a.bias = floats("bias", bias);
    const auto per_channel = "(" + std::to_string(a.c) + ",), a number per channel of x";
    if (weight.ndim() != 1 || weight.shape(0) != a.c) refuse("weight", weight, per_channel);
    if (bias.ndim() != 1 || bias.shape(0) != a.c) refuse("bias", bias, per_channel);
    require_floats_like("out", out, a.x.storage);
    require_contiguous("out", out);
    bool same = out.ndim() == 4;
    for (py::ssize_t d = 0; same && d < 4; ++d) same = out.shape(d) == x.shape(d);
    if (!same) refuse("out", out, "the shape of x, " + describe(x));
    require_writeable("out", out);
    require_apart("out", out, "x", x, true);
    require_apart("out", out, "weight", weight, false);
    require_apart("out", out, "bias", bias, false);
    if (!shift_or_none.is_none()) {
        if (!py::isinstance<py::array>(shift_or_none)) {
            throw py::type_error("shift: got " +
                                 py::str(py::type::of(shift_or_none)).cast<std::string>() +
                                 ", expected an array or None");
        }
        const auto shift = py::reinterpret_borrow<py::array>(shift_or_none);
        a.shift = floats("shift", shift);
        if (shift.ndim() != 2 || (shift.shape(0) != 1 && shift.shape(0) != a.n) ||
            shift.shape(1) != a.c) {
            refuse("shift", shift, "(N, C) or (1, C) as x has them, " + describe(x));
        }
        require_apart("out", out, "shift", shift, false);
        a.shift_stride = shift.shape(0) == 1 ? 0 : a.c;
    }
    a.out = {out.mutable_data(), a.x.storage};
    if (x.size() == 0) return;
    py::gil_scoped_release release;
    group_norm_silu(a);
}

}  // namespace

void register_norm(py::module_& m) {
    using py::arg;
    m.def("group_norm_silu", &bind_group_norm_silu, arg("x"), arg("weight"), arg("bias"),
          arg("shift").none(true), arg("out"), py::kw_only(), arg("groups"), arg("eps"),
          arg("silu") = true,
          "GroupNorm, a shift per channel and, unless told otherwise, SiLU; out may be x itself.");
}

}  // namespace fuse
