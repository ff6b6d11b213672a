#include <pybind11/pybind11.h>

namespace fuse {
void register_shm(pybind11::module_& m);
}

#ifdef _WIN32

void fuse::register_shm(pybind11::module_&) {}  // POSIX shared memory: elsewhere the class is missing

#else

#include <pybind11/numpy.h>

#include <memory>
#include <string>

#include "checks.h"
#include "fuse_shm.h"

namespace fuse {
namespace {

// A ring in shared memory, as its producer or as a reader has it.
class SharedRing {
public:
    SharedRing() = default;
    SharedRing(const SharedRing&) = delete;
    SharedRing& operator=(const SharedRing&) = delete;
    ~SharedRing() { fuse_shm_close(&ring_); }

    static std::unique_ptr<SharedRing> create(const std::string& name, std::uint32_t width,
                                              std::uint32_t height, std::uint32_t format,
                                              std::uint32_t flags, std::uint32_t slots) {
        auto made = std::make_unique<SharedRing>();
        if (fuse_shm_create(&made->ring_, name.c_str(), width, height, format, flags, slots) != 0) {
            fail(name);
        }
        return made;
    }

    static std::unique_ptr<SharedRing> open(const std::string& name) {
        auto opened = std::make_unique<SharedRing>();
        if (fuse_shm_open(&opened->ring_, name.c_str()) != 0) fail(name);
        return opened;
    }

    void write(const py::array& picture, std::uint64_t capture_ns) {
        if (!ring().writes) throw py::value_error("only a ring's producer writes into it");
        check("picture", picture);
        const void* from = picture.data();
        const py::gil_scoped_release release;
        std::memcpy(fuse_shm_begin(&ring_), from, ring_.frame_bytes);
        fuse_shm_publish(&ring_, capture_ns);
    }

    void beat() {
        if (!ring().writes) throw py::value_error("only a ring's producer gives signs of life");
        fuse_shm_beat(&ring_);
    }

    py::object read(std::uint64_t frame, const py::array& out) const {
        check("out", out);
        require_writeable("out", out);
        void* to = const_cast<void*>(out.data());
        std::uint64_t capture_ns = 0;
        int whole = 0;
        {
            const py::gil_scoped_release release;
            whole = fuse_shm_read(&ring_, frame, to, &capture_ns);
        }
        return whole ? py::object(py::int_(capture_ns)) : py::object(py::none());
    }

    bool wait(std::uint64_t frame, double seconds) const {
        const auto ns = static_cast<std::uint64_t>(seconds > 0 ? seconds * 1e9 : 0);
        ring();
        const py::gil_scoped_release release;
        return fuse_shm_wait(&ring_, frame, ns) != 0;
    }

    std::uint64_t written() const { return fuse_shm_written(&ring()); }
    std::uint64_t heartbeat() const {
        return __atomic_load_n(&ring().header->heartbeat_ns, __ATOMIC_ACQUIRE);
    }
    bool ended() const {
        return __atomic_load_n(&ring().header->state, __ATOMIC_ACQUIRE) == FUSE_SHM_ENDED;
    }
    bool replaced() const { return fuse_shm_replaced(&ring()) != 0; }
    void close() { fuse_shm_close(&ring_); }

    const fuse_shm& ring() const {
        if (ring_.header == nullptr) throw py::value_error("the ring is closed");
        return ring_;
    }

private:
    [[noreturn]] static void fail(const std::string& name) {
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, name.c_str());
        throw py::error_already_set();
    }

    void check(const char* name, const py::array& picture) const {
        require_contiguous(name, picture);
        if (static_cast<std::uint64_t>(picture.nbytes()) != ring().frame_bytes) {
            refuse(name, picture, std::to_string(ring_.frame_bytes) + " bytes");
        }
    }

    fuse_shm ring_{};
};

}  // namespace

void register_shm(py::module_& m) {
    py::class_<SharedRing>(m, "SharedRing", "A ring of frames in shared memory: see fuse_shm.h.")
        .def_static("create", &SharedRing::create, py::arg("name"), py::arg("width"), py::arg("height"),
                    py::arg("format"), py::arg("flags"), py::arg("slots"))
        .def_static("open", &SharedRing::open, py::arg("name"))
        .def("write", &SharedRing::write, py::arg("picture"), py::arg("capture_ns"))
        .def("beat", &SharedRing::beat)
        .def("read", &SharedRing::read, py::arg("frame"), py::arg("out"))
        .def("wait", &SharedRing::wait, py::arg("frame"), py::arg("seconds"))
        .def("close", &SharedRing::close)
        .def_property_readonly("written", &SharedRing::written)
        .def_property_readonly("heartbeat_ns", &SharedRing::heartbeat)
        .def_property_readonly("ended", &SharedRing::ended)
        .def_property_readonly("replaced", &SharedRing::replaced)
        .def_property_readonly("producer",
                               [](const SharedRing& r) { return r.ring().header->producer; })
        .def_property_readonly("width", [](const SharedRing& r) { return r.ring().width; })
        .def_property_readonly("height", [](const SharedRing& r) { return r.ring().height; })
        .def_property_readonly("format", [](const SharedRing& r) { return r.ring().format; })
        .def_property_readonly("flags", [](const SharedRing& r) { return r.ring().flags; })
        .def_property_readonly("slots", [](const SharedRing& r) { return r.ring().slots; });
}

}  // namespace fuse

#endif
