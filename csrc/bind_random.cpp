#include "checks.h"
#include "philox.h"

namespace fuse {
namespace {

template <class T>
T* output(py::array& out, const char* type) {
    require<T>("out", out, type);
    require_contiguous("out", out);
    require_writeable("out", out);
    return static_cast<T*>(out.mutable_data());
}

void bind_philox_normal(py::array out, std::uint64_t seed, std::uint64_t offset) {
    float* data = output<float>(out, "float32");
    const auto n = static_cast<std::size_t>(out.size());
    py::gil_scoped_release release;
    philox_normal(data, n, seed, offset);
}

void bind_philox_words(py::array out, std::uint64_t seed, std::uint64_t offset) {
    std::uint32_t* data = output<std::uint32_t>(out, "uint32");
    const auto n = static_cast<std::size_t>(out.size());
    py::gil_scoped_release release;
    philox_words(data, n, seed, offset);
}

py::tuple bind_philox4x32_10(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2,
                             std::uint32_t c3, std::uint32_t k0, std::uint32_t k1) {
    const Words w = philox4x32_10({c0, c1, c2, c3}, {k0, k1});
    return py::make_tuple(w[0], w[1], w[2], w[3]);
}

}  // namespace

void register_random(py::module_& m) {
    using py::arg;
    m.def("philox_normal", &bind_philox_normal, arg("out"), arg("seed"), arg("offset") = 0,
          "Fill out with standard normal numbers offset, offset + 1, ... of the seed's stream.");
    m.def("philox_words", &bind_philox_words, arg("out"), arg("seed"), arg("offset") = 0,
          "Fill out with the 32-bit words offset, offset + 1, ... of the seed's stream.");
    m.def("philox4x32_10", &bind_philox4x32_10, arg("c0"), arg("c1"), arg("c2"), arg("c3"),
          arg("k0"), arg("k1"), "One block: four words of a counter and a key.");
}

}  // namespace fuse
