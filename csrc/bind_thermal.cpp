#include <pybind11/stl.h>

#include <utility>

#include "checks.h"
#include "thermal.h"

namespace fuse {
namespace {

template <class F>
void by_counts(const char* name, const py::array& a, F&& f) {
    if (holds<std::uint8_t>(a)) return f(std::uint8_t{});
    if (holds<std::uint16_t>(a)) return f(std::uint16_t{});
    refuse(name, a, "uint8 or uint16 counts, aligned and in native byte order");
}

// (H, W), neither 0, pixels of a row adjacent, rows in ascending order.
void require_plane(const char* name, const py::array& a) {
    if (a.ndim() != 2 || a.size() == 0) refuse(name, a, "shape (H, W) with H, W >= 1");
    const bool adjacent = a.shape(1) == 1 || a.strides(1) == a.itemsize();
    if (!adjacent || (a.shape(0) > 1 && a.strides(0) < a.shape(1) * a.itemsize())) {
        refuse(name, a, "adjacent pixels and ascending rows; see numpy.ascontiguousarray");
    }
}

void require_out(const py::array& out, const py::array& x) {
    require_plane("out", out);
    require_writeable("out", out);
    if (!same_shape(out, x, 2)) refuse("out", out, "the shape of x, " + describe(x));
}

void require_vector(const char* name, const py::array& a, py::ssize_t size) {
    require_contiguous(name, a);
    if (a.ndim() != 1 || a.shape(0) != size) {
        refuse(name, a, "shape (" + std::to_string(size) + ",)");
    }
}

template <class T>
Image<const T> counts_of(const py::array& a) {
    return {static_cast<const T*>(a.data()), a.shape(0), a.shape(1), 1, a.strides(0)};
}

template <class T>
Image<T> plane_of(py::array& a) {
    return {static_cast<T*>(a.mutable_data()), a.shape(0), a.shape(1), 1, a.strides(0)};
}

void bind_histogram(const py::array& x, py::array counts) {
    require_plane("x", x);
    require<std::uint32_t>("counts", counts, "uint32");
    require_writeable("counts", counts);
    by_counts("x", x, [&](auto zero) {
        using T = decltype(zero);
        require_vector("counts", counts, kCounts<T>);
        auto* to = static_cast<std::uint32_t*>(counts.mutable_data());
        const auto image = counts_of<T>(x);
        py::gil_scoped_release release;
        histogram<T>(image, to);
    });
}

void bind_look_up(const py::array& x, const py::array& table, py::array out) {
    require_plane("x", x);
    require_out(out, x);
    require_apart("out", out, "table", table, false);
    by_counts("x", x, [&](auto zero) {
        using T = decltype(zero);
        require_vector("table", table, kCounts<T>);
        const auto run = [&](auto result) {
            using Out = decltype(result);
            const bool in_place = std::is_same_v<T, Out>;
            require_apart("out", out, "x", x, in_place);
            const auto* from = static_cast<const Out*>(table.data());
            const auto image = counts_of<T>(x);
            const auto to = plane_of<Out>(out);
            py::gil_scoped_release release;
            look_up<T, Out>(image, from, to);
        };
        if (holds<std::uint8_t>(table) && holds<std::uint8_t>(out)) return run(std::uint8_t{});
        if (holds<std::uint16_t>(table) && holds<std::uint16_t>(out)) return run(std::uint16_t{});
        if (holds<float>(table) && holds<float>(out)) return run(float{});
        refuse("table", table, "the type of out, " + describe(out) + ": uint8, uint16 or float32");
    });
}

void bind_equalise_locally(const py::array& x, const py::array& bins, py::array out,
                           std::pair<std::ptrdiff_t, std::ptrdiff_t> tiles, std::ptrdiff_t count,
                           double limit) {
    require_plane("x", x);
    require<std::uint16_t>("bins", bins, "uint16");
    require<float>("out", out, "float32");
    require_out(out, x);
    require_apart("out", out, "x", x, false);
    require_apart("out", out, "bins", bins, false);
    if (tiles.first < 1 || tiles.second < 1 || tiles.first > x.shape(0) ||
        tiles.second > x.shape(1) || count < 2 || count > 65536 || !(limit >= 1.0)) {
        throw py::value_error("tiles, count and limit: expected 1 to H by 1 to W tiles, 2 to 65536 "
                              "bins and a limit of at least 1");
    }
    by_counts("x", x, [&](auto zero) {
        using T = decltype(zero);
        require_vector("bins", bins, kCounts<T>);
        const auto* table = static_cast<const std::uint16_t*>(bins.data());
        const std::ptrdiff_t most = *std::max_element(table, table + kCounts<T>);
        if (most >= count) refuse("bins", bins, "numbers below " + std::to_string(count));
        const auto image = counts_of<T>(x);
        const auto to = plane_of<float>(out);
        const Tiles how{tiles.first, tiles.second, count, limit};
        py::gil_scoped_release release;
        equalise_locally<T>(image, table, how, to);
    });
}

void bind_column_offsets(const py::array& x, py::array offsets, std::ptrdiff_t radius,
                         double most) {
    require_plane("x", x);
    require<double>("offsets", offsets, "float64");
    require_writeable("offsets", offsets);
    require_vector("offsets", offsets, x.shape(1));
    if (radius < 1 || !(most > 0.0)) {
        throw py::value_error("radius and most: expected a radius of at least 1 and most above 0");
    }
    by_counts("x", x, [&](auto zero) {
        using T = decltype(zero);
        auto* to = static_cast<double*>(offsets.mutable_data());
        const auto image = counts_of<T>(x);
        py::gil_scoped_release release;
        column_offsets<T>(image, radius, most, to);
    });
}

void bind_subtract_columns(const py::array& x, const py::array& offsets, py::array out) {
    require_plane("x", x);
    require_out(out, x);
    require<float>("offsets", offsets, "float32");
    require_vector("offsets", offsets, x.shape(1));
    require_apart("out", out, "x", x, true);
    require_apart("out", out, "offsets", offsets, false);
    by_counts("x", x, [&](auto zero) {
        using T = decltype(zero);
        require<T>("out", out, "the type of x");
        const auto* from = static_cast<const float*>(offsets.data());
        const auto image = counts_of<T>(x);
        const auto to = plane_of<T>(out);
        py::gil_scoped_release release;
        subtract_columns<T>(image, from, to);
    });
}

}  // namespace

void register_thermal(py::module_& m) {
    using py::arg;
    m.def("histogram", &bind_histogram, arg("x"), arg("counts"),
          "How often each count occurs in x (H, W), uint8 or uint16, into counts (256,) or "
          "(65536,) uint32.");
    m.def("look_up", &bind_look_up, arg("x"), arg("table"), arg("out"),
          "out = table[x]: x (H, W) uint8 or uint16, table (256,) or (65536,) and out (H, W) of "
          "one type, uint8, uint16 or float32.");
    m.def("equalise_locally", &bind_equalise_locally, arg("x"), arg("bins"), arg("out"),
          py::kw_only(), arg("tiles"), arg("count"), arg("limit"),
          "CLAHE of x (H, W), uint8 or uint16, into out (H, W) float32 in [0, 1]: bins (256,) or "
          "(65536,) uint16 gives each count's bin below `count`; `tiles` (rows, columns); `limit` "
          "cuts a tile's histogram at so many times its mean.");
    m.def("column_offsets", &bind_column_offsets, arg("x"), arg("offsets"), py::kw_only(),
          arg("radius"), arg("most"),
          "Mean over rows of x less its row's mean within `radius`, clipped to +-most, into "
          "offsets (W,) float64.");
    m.def("subtract_columns", &bind_subtract_columns, arg("x"), arg("offsets"), arg("out"),
          "out = x - offsets (W,) float32 by column, rounded and clipped to x's type; out may be "
          "x.");
}

}  // namespace fuse
