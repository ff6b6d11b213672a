// What the bindings ask of an array. Nothing here converts or copies: what does not fit is refused.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "storage.h"

namespace fuse {

namespace py = pybind11;

inline std::string describe(const py::array& a) {
    return py::str(a.dtype()).cast<std::string>() + py::str(a.attr("shape")).cast<std::string>();
}

[[noreturn]] inline void refuse(const char* name, const py::array& a, const std::string& expected) {
    throw py::value_error(std::string(name) + ": got " + describe(a) + ", expected " + expected);
}

// Same type, native byte order, aligned.
template <class T>
bool holds(const py::array& a) {
    constexpr int aligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    return a.dtype().num() == py::dtype::of<T>().num() && a.dtype().byteorder() != '>' &&
           (a.flags() & aligned) != 0;
}

template <class T>
void require(const char* name, const py::array& a, const char* type) {
    if (!holds<T>(a)) refuse(name, a, std::string("aligned ") + type + " in native byte order");
}

// float32, float16, or bfloat16: as the type of that name which other packages add to NumPy, or as
// uint16, its bits.
inline Storage require_floats(const char* name, const py::array& a) {
    constexpr int aligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    const py::dtype type = a.dtype();
    if (holds<float>(a)) return Storage::float32;
    if (type.byteorder() != '>' && type.itemsize() == 2 && (a.flags() & aligned) != 0) {
        if (type.kind() == 'f') return Storage::float16;
        if (type.kind() == 'u') return Storage::bfloat16;
        if (py::str(type).cast<std::string>() == "bfloat16") return Storage::bfloat16;
    }
    refuse(name, a, "aligned float32, float16 or bfloat16 (or its bits, uint16) in native byte order");
}

// The same, and as `like` has it.
inline void require_floats_like(const char* name, const py::array& a, Storage like) {
    if (require_floats(name, a) != like) refuse(name, a, "one type of numbers for all arrays");
}

inline void require_contiguous(const char* name, const py::array& a) {
    if ((a.flags() & py::array::c_style) == 0) refuse(name, a, "C-contiguous memory");
}

inline void require_writeable(const char* name, const py::array& a) {
    if (!a.writeable()) refuse(name, a, "a writeable array");
}

// As many dimensions, the first `dims` of equal length.
inline bool same_shape(const py::array& a, const py::array& b, py::ssize_t dims) {
    bool same = a.ndim() == b.ndim();
    for (py::ssize_t d = 0; same && d < dims; ++d) same = a.shape(d) == b.shape(d);
    return same;
}

// Bytes from the first element to past the last one; strides must not be negative.
struct Extent {
    std::uintptr_t begin, end;
};

inline Extent extent(const py::array& a) {
    const auto begin = reinterpret_cast<std::uintptr_t>(a.data());
    std::uintptr_t last = begin;
    for (py::ssize_t d = 0; d < a.ndim(); ++d) {
        if (a.shape(d) == 0) return {begin, begin};
        last += static_cast<std::uintptr_t>((a.shape(d) - 1) * a.strides(d));
    }
    return {begin, last + static_cast<std::uintptr_t>(a.itemsize())};
}

inline bool overlap(const py::array& a, const py::array& b) {
    const Extent p = extent(a), q = extent(b);
    return p.begin < q.end && q.begin < p.end;
}

// The very same elements at the very same places.
inline bool same_memory(const py::array& a, const py::array& b) {
    if (a.data() != b.data() || a.ndim() != b.ndim() || a.itemsize() != b.itemsize()) return false;
    for (py::ssize_t d = 0; d < a.ndim(); ++d) {
        if (a.shape(d) != b.shape(d) || a.strides(d) != b.strides(d)) return false;
    }
    return true;
}

inline void require_apart(const char* name, const py::array& out, const char* other_name,
                          const py::array& other, bool same_allowed) {
    if (overlap(out, other) && !(same_allowed && same_memory(out, other))) {
        throw py::value_error(std::string(name) + " overlaps " + other_name + " in memory" +
                              (same_allowed ? "; only the very same array may be both" : ""));
    }
}

}  // namespace fuse
