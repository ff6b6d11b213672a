#include "checks.h"
#include "yuv.h"

namespace fuse {
namespace {

YuvFormat format_of(const std::string& name) {
    if (name == "yuyv") return YuvFormat::yuyv;
    if (name == "nv12") return YuvFormat::nv12;
    if (name == "i420") return YuvFormat::i420;
    throw py::value_error("format: got '" + name + "', expected yuyv, nv12 or i420");
}

YuvMatrix matrix_of(const std::string& name) {
    if (name == "bt601") return YuvMatrix::bt601;
    if (name == "bt709") return YuvMatrix::bt709;
    throw py::value_error("matrix: got '" + name + "', expected bt601 or bt709");
}

// Pixels of `channels` adjacent bytes, adjacent in a row, rows in ascending order.
void require_pixels(const char* name, const py::array& a, py::ssize_t channels) {
    const bool adjacent = (a.shape(1) == 1 || a.strides(1) == channels) &&
                          (a.ndim() == 2 || a.strides(2) == 1);
    if (!adjacent || (a.shape(0) > 1 && a.strides(0) < a.shape(1) * channels)) {
        refuse(name, a, "adjacent pixels and ascending rows; see numpy.ascontiguousarray");
    }
}

YuvFrame frame_of(const py::array& image, YuvFormat format) {
    require<std::uint8_t>("image", image, "uint8");
    const bool packed = format == YuvFormat::yuyv;
    if (packed) {
        if (image.ndim() != 3 || image.size() == 0 || image.shape(1) % 2 || image.shape(2) != 2) {
            refuse("image", image, "shape (H, W, 2) with H >= 1 and an even W >= 2 for yuyv");
        }
    } else if (image.ndim() != 2 || image.size() == 0 || image.shape(0) % 3 || image.shape(1) % 2) {
        refuse("image", image, "shape (H * 3 / 2, W) with even H, W >= 2 for nv12 and i420");
    }
    require_pixels("image", image, packed ? 2 : 1);
    const std::ptrdiff_t height = packed ? image.shape(0) : image.shape(0) / 3 * 2;
    return {static_cast<const std::uint8_t*>(image.data()), height, image.shape(1),
            image.strides(0), format};
}

void bind_yuv_to_rgb(const py::array& image, py::array out, const std::string& format,
                     bool full_range, const std::string& matrix) {
    const YuvWeights weights(full_range, matrix_of(matrix));
    const YuvFrame frame = frame_of(image, format_of(format));
    require<std::uint8_t>("out", out, "uint8");
    require_writeable("out", out);
    if (out.ndim() != 3 || out.shape(0) != frame.height || out.shape(1) != frame.width ||
        out.shape(2) != 3) {
        refuse("out", out, "shape (" + std::to_string(frame.height) + ", " +
                               std::to_string(frame.width) + ", 3)");
    }
    require_pixels("out", out, 3);
    require_apart("out", out, "image", image, false);
    const Image<std::uint8_t> to{static_cast<std::uint8_t*>(out.mutable_data()), frame.height,
                                 frame.width, 3, out.strides(0)};
    py::gil_scoped_release release;
    yuv_to_rgb(frame, weights, to);
}

}  // namespace

void register_yuv(py::module_& m) {
    using py::arg;
    m.def("yuv_to_rgb", &bind_yuv_to_rgb, arg("image"), arg("out"), py::kw_only(), arg("format"),
          arg("full_range"), arg("matrix"),
          "uint8 RGB (H, W, 3) of a uint8 frame: format \"yuyv\" (H, W, 2), \"nv12\" or \"i420\" "
          "(H * 3 / 2, W); matrix \"bt601\" or \"bt709\". Chroma is not interpolated.");
}

}  // namespace fuse
