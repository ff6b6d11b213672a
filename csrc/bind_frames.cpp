#include <pybind11/stl.h>

#include <limits>
#include <optional>

#include "checks.h"
#include "frame_warp.h"
#include "frames.h"

namespace fuse {
namespace {

constexpr const char* kFrameTypes =
    "uint8, uint16, float32 or float64, aligned and in native byte order";

template <class F>
auto by_type(const char* name, const py::array& a, F&& f) {
    if (holds<std::uint8_t>(a)) return f(std::uint8_t{});
    if (holds<std::uint16_t>(a)) return f(std::uint16_t{});
    if (holds<float>(a)) return f(float{});
    if (holds<double>(a)) return f(double{});
    refuse(name, a, kFrameTypes);
}

// (H, W) or (H, W, 3), neither H nor W 0, pixels of a row adjacent, rows in ascending order.
void require_image(const char* name, const py::array& a) {
    const bool colour = a.ndim() == 3 && a.shape(2) == 3;
    if ((a.ndim() != 2 && !colour) || a.size() == 0) {
        refuse(name, a, "shape (H, W) or (H, W, 3) with H, W >= 1");
    }
    const py::ssize_t item = a.itemsize(), pixel = colour ? 3 * item : item;
    const bool adjacent =
        (a.shape(1) == 1 || a.strides(1) == pixel) && (!colour || a.strides(2) == item);
    if (!adjacent || (a.shape(0) > 1 && a.strides(0) < a.shape(1) * pixel)) {
        refuse(name, a, "adjacent pixels and ascending rows; see numpy.ascontiguousarray");
    }
}

void require_planes(const char* name, const py::array& a) {
    require<float>(name, a, "float32");
    if (a.ndim() != 3 || (a.shape(0) != 1 && a.shape(0) != 3)) {
        refuse(name, a, "shape (1, H, W) or (3, H, W)");
    }
    require_contiguous(name, a);
}

template <class T>
Image<T> image_of(T* data, const py::array& a) {
    return {data, a.shape(0), a.shape(1), a.ndim() == 3 ? 3 : 1, a.strides(0)};
}

template <class T>
Planes<T> planes_of(T* data, const py::array& a) {
    return {data, a.shape(0), a.shape(1), a.shape(2)};
}

bool bind_frame_in(const py::array& src, py::array out, double low, double scale, bool ycbcr) {
    require_image("src", src);
    require_planes("out", out);
    require_writeable("out", out);
    if (out.shape(1) < src.shape(0) || out.shape(2) < src.shape(1)) {
        refuse("out", out, "at least the height and width of src, " + describe(src));
    }
    require_apart("out", out, "src", src, false);
    if (ycbcr && out.shape(0) != 3) refuse("out", out, "shape (3, H, W) for Y, Cb and Cr");
    const Colour colour = ycbcr ? Colour::ycbcr : Colour::rgb;
    const auto planes = planes_of(static_cast<float*>(out.mutable_data()), out);
    return by_type("src", src, [&](auto zero) {
        using T = decltype(zero);
        const auto image = image_of(static_cast<const T*>(src.data()), src);
        const float l = static_cast<float>(low), s = static_cast<float>(scale);
        py::gil_scoped_release release;
        return frame_in<T>(image, planes, colour, l, s);
    });
}

bool bind_frame_warp(const py::array& src, const py::array& coordinates, py::array out,
                     std::pair<std::ptrdiff_t, std::ptrdiff_t> size, double low, double scale,
                     const std::optional<py::array>& table, std::optional<py::array> kept,
                     bool clamp) {
    require_image("src", src);
    require_contiguous("src", src);
    if (src.shape(0) > std::numeric_limits<std::int32_t>::max() / src.shape(1)) {
        refuse("src", src, "fewer than 2^31 pixels");
    }
    require_planes("out", out);
    require_writeable("out", out);
    require_apart("out", out, "src", src, false);
    require<float>("coordinates", coordinates, "float32");
    require_contiguous("coordinates", coordinates);
    require_apart("out", out, "coordinates", coordinates, false);
    const auto [height, width] = size;
    if (height < 1 || width < 1 || out.shape(1) < height || out.shape(2) < width) {
        refuse("out", out, "at least the result's height and width, which are at least 1");
    }
    FrameWarp how{};
    how.coordinates = static_cast<const float*>(coordinates.data());
    const auto is = [&](py::ssize_t d, py::ssize_t n) { return coordinates.shape(d) == n; };
    how.is_map = coordinates.ndim() == 3 && is(0, height) && is(1, width) && is(2, 2);
    if (!how.is_map && !(coordinates.ndim() == 2 && is(0, 3) && is(1, 3))) {
        refuse("coordinates", coordinates, "(3, 3), or (H, W, 2) for the result's H and W");
    }
    how.low = static_cast<float>(low);
    how.scale = static_cast<float>(scale);
    how.clamp = clamp;
    how.height = height;
    how.width = width;
    if (table) {
        require<float>("table", *table, "float32");
        require_contiguous("table", *table);
        const bool fits = (holds<std::uint8_t>(src) && table->size() == 256) ||
                          (holds<std::uint16_t>(src) && table->size() == 65536);
        if (!fits || src.ndim() != 2 || kept) {
            refuse("table", *table, "256 or 65536 numbers for a grey uint8 or uint16 frame, and "
                                    "nothing kept");
        }
        how.table = static_cast<const float*>(table->data());
    }
    if (kept) {
        require_image("kept", *kept);
        require_writeable("kept", *kept);
        require_apart("kept", *kept, "src", src, false);
        require_apart("kept", *kept, "out", out, false);
        if (kept->ndim() != src.ndim() || kept->shape(0) != height || kept->shape(1) != width ||
            !kept->dtype().equal(src.dtype())) {
            refuse("kept", *kept, "the result's height and width, channels and type of src, " +
                                      describe(src));
        }
    }
    const auto planes = planes_of(static_cast<float*>(out.mutable_data()), out);
    return by_type("src", src, [&](auto zero) {
        using T = decltype(zero);
        const auto image = image_of(static_cast<const T*>(src.data()), src);
        const Image<T> keep =
            kept ? image_of(static_cast<T*>(kept->mutable_data()), *kept) : Image<T>{};
        py::gil_scoped_release release;
        return frame_warp<T>(image, planes, keep, how);
    });
}

void bind_frame_out(const py::array& fused, const py::object& visible_or_none, py::array out) {
    require_planes("fused", fused);
    require_image("out", out);
    require_writeable("out", out);
    if (fused.shape(1) < out.shape(0) || fused.shape(2) < out.shape(1)) {
        refuse("fused", fused, "at least the height and width of out, " + describe(out));
    }
    require_apart("out", out, "fused", fused, false);
    const bool needs_visible = out.ndim() == 3 && fused.shape(0) == 1;
    py::array visible = out;
    if (needs_visible) {
        if (!py::isinstance<py::array>(visible_or_none)) {
            const auto given = py::str(py::type::of(visible_or_none).attr("__name__"));
            throw py::type_error("visible: got " + given.cast<std::string>() +
                                 ", expected the colour frame whose chroma out takes");
        }
        visible = py::reinterpret_borrow<py::array>(visible_or_none);
        require_image("visible", visible);
        if (visible.ndim() != 3 || visible.shape(0) != out.shape(0) ||
            visible.shape(1) != out.shape(1) || !visible.dtype().equal(out.dtype())) {
            refuse("visible", visible, "shape and dtype of out, " + describe(out));
        }
        require_apart("out", out, "visible", visible, true);
    }
    const auto planes = planes_of(static_cast<const float*>(fused.data()), fused);
    by_type("out", out, [&](auto zero) {
        using T = decltype(zero);
        const auto colours = image_of(static_cast<const T*>(visible.data()), visible);
        const auto image = image_of(static_cast<T*>(out.mutable_data()), out);
        py::gil_scoped_release release;
        frame_out<T>(planes, colours, image);
    });
}

py::tuple bind_frame_range(const py::array& src) {
    require_image("src", src);
    return by_type("src", src, [&](auto zero) -> py::tuple {
        using T = decltype(zero);
        const auto image = image_of(static_cast<const T*>(src.data()), src);
        Range<T> range{};
        {
            py::gil_scoped_release release;
            range = frame_range<T>(image);
        }
        return py::make_tuple(range.lo, range.hi, range.finite);
    });
}

void require_pictures(const char* name, const py::array& a) {
    require<float>(name, a, "float32");
    if (a.ndim() < 2) refuse(name, a, "shape (..., H, W)");
    require_contiguous(name, a);
}

// All dimensions before the last two as one.
template <class T>
Planes<T> all_planes(T* data, const py::array& a) {
    std::ptrdiff_t count = 1;
    for (py::ssize_t d = 0; d < a.ndim() - 2; ++d) count *= a.shape(d);
    return {data, count, a.shape(a.ndim() - 2), a.shape(a.ndim() - 1)};
}

void bind_pad_reflect(const py::array& x, py::array out) {
    require_pictures("x", x);
    require_pictures("out", out);
    require_writeable("out", out);
    const auto from = all_planes(static_cast<const float*>(x.data()), x);
    if (from.height < 1 || from.width < 1) refuse("x", x, "at least one pixel");
    const auto to = all_planes(static_cast<float*>(out.mutable_data()), out);
    if (!same_shape(out, x, x.ndim() - 2) || to.height < from.height || to.width < from.width) {
        refuse("out", out, "the shape of x, " + describe(x) + ", with H and W no smaller");
    }
    require_apart("out", out, "x", x, false);
    py::gil_scoped_release release;
    pad_reflect(from, to);
}

using ColourLoop = void(const float*, const float*, const float*, float*, float*, float*,
                        std::ptrdiff_t);

template <ColourLoop convert>
void bind_colour(const py::array& x, py::array out) {
    require_pictures("x", x);
    if (x.ndim() < 3 || x.shape(x.ndim() - 3) != 3) refuse("x", x, "shape (..., 3, H, W)");
    require_pictures("out", out);
    require_writeable("out", out);
    if (!same_shape(out, x, x.ndim())) refuse("out", out, "the shape of x, " + describe(x));
    require_apart("out", out, "x", x, true);
    const std::ptrdiff_t n = x.shape(x.ndim() - 2) * x.shape(x.ndim() - 1);
    const auto from = static_cast<const float*>(x.data());
    const auto to = static_cast<float*>(out.mutable_data());
    const std::ptrdiff_t count = x.size() / 3;
    py::gil_scoped_release release;
    parallel_for(count, kPixelsPerRange, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for_each_plane(begin, end, n, [&](std::ptrdiff_t i, std::ptrdiff_t at, std::ptrdiff_t m) {
            const float* a = from + 3 * i * n + at;
            float* b = to + 3 * i * n + at;
            convert(a, a + n, a + 2 * n, b, b + n, b + 2 * n, m);
        });
    });
}

}  // namespace

void register_frames(py::module_& m) {
    using py::arg;
    m.def("frame_in", &bind_frame_in, arg("src"), arg("out"), py::kw_only(), arg("low") = 0.0,
          arg("scale"), arg("ycbcr") = false,
          "out[c] = clip((src - low) * scale, 0, 1), reflected to out's size; ycbcr: three planes "
          "hold Y, Cb, Cr, not R, G, B. False if a value of src is not finite.");
    m.def("frame_warp", &bind_frame_warp, arg("src"), arg("coordinates"), arg("out"), py::kw_only(),
          arg("size"), arg("low") = 0.0, arg("scale"), arg("table") = py::none(),
          arg("kept") = py::none(), arg("clamp") = false,
          "frame_in of src sampled bilinearly: a homography (3, 3) from the result's pixels to "
          "src's, or (size, 2) with the column and row of src. table (256,) or (65536,) float32: "
          "what a count means; kept: the sampled frame in src's type. Outside src is 0, or with "
          "clamp the nearest place inside.");
    m.def("frame_out", &bind_frame_out, arg("fused"), arg("visible"), arg("out"),
          "Crop planar float32 to out's size, restore visible's chroma, convert to out's dtype.");
    m.def("frame_range", &bind_frame_range, arg("src"),
          "(smallest, largest, all finite) of src's values; the two are meaningful if all are finite.");
    m.def("pad_reflect", &bind_pad_reflect, arg("x"), arg("out"),
          "out = x, reflected to the right and below up to out's size.");
    m.def("rgb_to_ycbcr", &bind_colour<rgb_to_ycbcr>, arg("x"), arg("out"),
          "Planes R, G, B to Y, Cb, Cr (BT.601, full range, Cb and Cr around 0.5); out may be x.");
    m.def("ycbcr_to_rgb", &bind_colour<ycbcr_to_rgb>, arg("x"), arg("out"),
          "The inverse of rgb_to_ycbcr, not clipped; out may be x.");
}

}  // namespace fuse
