#include "simd.h"

#include <atomic>

namespace fuse {
namespace {

SimdLevel detect() {
#ifdef FUSEENGINE_TARGETS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return wide ? SimdLevel::avx512 : SimdLevel::avx2;
    }
#endif
    return SimdLevel::baseline;
}

std::atomic<SimdLevel>& chosen() {
    static std::atomic<SimdLevel> level{best_simd_level()};
    return level;
}

}  // namespace

SimdLevel best_simd_level() {
    static const SimdLevel level = detect();
    return level;
}

SimdLevel simd_level() { return chosen().load(std::memory_order_relaxed); }

bool set_simd_level(SimdLevel level) {
    if (level > best_simd_level()) return false;
    chosen().store(level);
    return true;
}

}  // namespace fuse
