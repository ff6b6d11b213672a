// A loop over threads. Ranges are disjoint and cover the whole, so a kernel whose elements do not
// depend on the range they fall into gives the same bits whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>

namespace fuse {

using RangeBody = std::function<void(std::ptrdiff_t begin, std::ptrdiff_t end)>;

// Threads that a loop may use, the caller's own included. At first: what the process may run on.
int num_threads();
// Takes effect at the next loop; below 1 counts as 1.
void set_num_threads(int count);

// Calls body on ranges of [0, count), each (but the last) a multiple of grain long. Runs inline
// when there is one range, when called from within a loop, or while another thread is looping.
// The first exception of a body is thrown again here, once all ranges have ended.
void parallel_for(std::ptrdiff_t count, std::ptrdiff_t grain, const RangeBody& body);

// The range [begin, end) of elements as pieces of planes of n: body(plane, first, count).
template <class Body>
void for_each_plane(std::ptrdiff_t begin, std::ptrdiff_t end, std::ptrdiff_t n, const Body& body) {
    while (begin < end) {
        const std::ptrdiff_t plane = begin / n, first = begin % n;
        const std::ptrdiff_t count = std::min(n - first, end - begin);
        body(plane, first, count);
        begin += count;
    }
}

}  // namespace fuse
