// Uninitialised float32 memory on a cache line's boundary, freed at the end of the scope.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace fuse {

class Scratch {
public:
    explicit Scratch(std::ptrdiff_t count)
        : memory_(static_cast<float*>(::operator new(
              static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(float), kAlignment))) {}

    float* data() const { return memory_.get(); }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(float* p) const { ::operator delete(p, kAlignment); }
    };
    std::unique_ptr<float, Free> memory_;
};

}  // namespace fuse
