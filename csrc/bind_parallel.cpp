#include <pybind11/pybind11.h>

#include "parallel.h"

namespace fuse {

void register_parallel(pybind11::module_& m) {
    m.def("num_threads", &num_threads, "Threads that a kernel may use.");
    m.def("set_num_threads", &set_num_threads, pybind11::arg("count"),
          "Threads that a kernel may use from now on, in this process; below 1 counts as 1.");
}

}  // namespace fuse
