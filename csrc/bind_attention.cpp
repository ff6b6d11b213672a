#include "checks.h"
#include "criss_cross.h"

namespace fuse {
namespace {

void require_map(const char* name, const py::array& a, const py::array& like, const char* like_name,
                 bool same_channels) {
    require<float>(name, a, "float32");
    require_contiguous(name, a);
    const bool fits = a.ndim() == 4 && a.shape(0) == like.shape(0) &&
                      (!same_channels || a.shape(1) == like.shape(1)) &&
                      a.shape(2) == like.shape(2) && a.shape(3) == like.shape(3);
    if (!fits) {
        refuse(name, a, std::string(same_channels ? "the shape of " : "(N, C, H, W) with N, H, W of ") +
                            like_name + ", " + describe(like));
    }
}

void bind_criss_cross_attention(const py::array& q, const py::array& k, const py::array& v,
                                py::array out) {
    if (q.ndim() != 4) refuse("q", q, "shape (N, Cq, H, W)");
    require_map("q", q, q, "q", true);
    require_map("k", k, q, "q", true);
    require_map("v", v, q, "q", false);
    require_map("out", out, v, "v", true);
    require_writeable("out", out);
    require_apart("out", out, "q", q, false);
    require_apart("out", out, "k", k, false);
    require_apart("out", out, "v", v, false);
    CrissCross a{static_cast<const float*>(q.data()),
                 static_cast<const float*>(k.data()),
                 static_cast<const float*>(v.data()),
                 static_cast<float*>(out.mutable_data()),
                 nullptr,
                 nullptr,
                 q.shape(1),
                 v.shape(1),
                 q.shape(2),
                 q.shape(3)};
    const std::ptrdiff_t pictures = out.size() == 0 ? 0 : q.shape(0);
    py::gil_scoped_release release;
    criss_cross_attention(a, pictures);
}

}  // namespace

void register_attention(py::module_& m) {
    using py::arg;
    m.def("criss_cross_attention", &bind_criss_cross_attention, arg("q"), arg("k"), arg("v"),
          arg("out"),
          "Every pixel attends to its column and row, itself once; unscaled dot products.");
}

}  // namespace fuse
