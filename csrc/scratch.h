// Uninitialised float32 memory on a cache line's boundary, given back at the end of the scope.
//
// What is given back stays with the thread, up to kKept floats, for its next kernel: memory that goes
// to the system and comes again costs a page fault per 4 KB, for the Wiener filter of a VGA picture
// half as much as the filter.
#pragma once

#include <cstddef>
#include <memory>

namespace fuse {

class Scratch {
public:
    // Most that a thread keeps: 16 MB.
    static constexpr std::size_t kKept = std::size_t{4} << 20;

    explicit Scratch(std::ptrdiff_t count);

    float* data() const { return memory_.get(); }

private:
    struct Give {
        std::size_t count;
        void operator()(float* memory) const noexcept;
    };
    std::unique_ptr<float, Give> memory_{nullptr, Give{0}};
};

}  // namespace fuse
