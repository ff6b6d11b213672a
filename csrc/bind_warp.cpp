#include "checks.h"
#include "warp.h"

namespace fuse {
namespace {

const float* floats(const char* name, const py::array& a) {
    require<float>(name, a, "float32");
    require_contiguous(name, a);
    return static_cast<const float*>(a.data());
}

void bind_warp(const py::array& x, const py::array& coordinates, py::array out, bool clamp) {
    Warp a{};
    a.x = floats("x", x);
    if (x.ndim() != 4 || x.shape(2) < 1 || x.shape(3) < 1 ||
        x.shape(2) > std::numeric_limits<std::int32_t>::max() / x.shape(3)) {
        refuse("x", x, "shape (N, C, H, W), at least 1 and fewer than 2^31 pixels");
    }
    a.images = x.shape(0);
    a.channels = x.shape(1);
    a.height = x.shape(2);
    a.width = x.shape(3);
    a.out = const_cast<float*>(floats("out", out));
    require_writeable("out", out);
    if (!same_shape(out, x, 2)) refuse("out", out, "the N and C of x, " + describe(x));
    a.out_height = out.shape(2);
    a.out_width = out.shape(3);
    a.coordinates = floats("coordinates", coordinates);
    const auto is = [&](py::ssize_t d, py::ssize_t n) { return coordinates.shape(d) == n; };
    const bool matrix = coordinates.ndim() == 3 && is(1, 3) && is(2, 3);
    a.is_map = coordinates.ndim() == 4 && is(1, a.out_height) && is(2, a.out_width) && is(3, 2);
    if (!(matrix || a.is_map) || !(is(0, 1) || is(0, a.images))) {
        refuse("coordinates", coordinates,
               "(1, 3, 3), (N, 3, 3), (1, H, W, 2) or (N, H, W, 2) for N of x and H, W of out, " +
                   describe(out));
    }
    a.one_for_all = is(0, 1);
    a.clamp = clamp;
    require_apart("out", out, "x", x, false);
    require_apart("out", out, "coordinates", coordinates, false);
    py::gil_scoped_release release;
    warp(a);
}

}  // namespace

void register_warp(py::module_& m) {
    using py::arg;
    m.def("warp", &bind_warp, arg("x"), arg("coordinates"), arg("out"), py::kw_only(),
          arg("clamp") = false,
          "x (N, C, h, w) sampled bilinearly into out (N, C, H, W): a homography from out's pixels "
          "to x's, or per pixel of out the column and row of x. Outside x is 0, or with clamp the "
          "nearest place inside.");
}

}  // namespace fuse
