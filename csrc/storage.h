// Arrays in memory hold float32 or one of two 16-bit types, for storage only: arithmetic is float32's.
//
//   float16   IEEE 754 binary16
//   bfloat16  the upper half of a float32
//
// Exact both ways: every 16-bit number has its float32; a float32 goes to the nearest, ties to even,
// and past the largest to infinity. A NaN stays one, with its sign. A kernel widens a block, works on
// it in the first-level cache, and narrows the result: memory sees 16 bits only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "platform.h"

#ifdef FUSEENGINE_TARGETS
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace fuse {

enum class Storage { float32, float16, bfloat16 };

// Numbers at a time: a dozen arrays of so many float32 lie in a first-level cache.
constexpr std::ptrdiff_t kStorageBlock = 512;

FUSE_INLINE std::uint32_t float_bits(float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

FUSE_INLINE float bits_float(std::uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// Each of the four without a branch and with 32-bit numbers only, so that loops become vectors.

FUSE_INLINE float bfloat16_to_float(std::uint32_t half) { return bits_float(half << 16); }

FUSE_INLINE std::uint32_t float_to_bfloat16(float v) {
    const std::uint32_t bits = float_bits(v);
    const std::uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : nearest;
}

FUSE_INLINE float float16_to_float(std::uint32_t half) {
    constexpr std::uint32_t rebias = (127u - 15u) << 23, least = 113u << 23;  // least: 2^-14
    const std::uint32_t magnitude = (half & 0x7fffu) << 13, exponent = half & 0x7c00u;
    const std::uint32_t normal = magnitude + rebias;
    // An exponent of 0: 2^-14 (1 + m / 1024) - 2^-14, exact.
    const std::uint32_t small = float_bits(bits_float(magnitude + least) - bits_float(least));
    // An exponent of 31: infinity, or a NaN made quiet.
    const std::uint32_t large = (normal + rebias) | ((half & 0x3ffu) != 0u ? 1u << 22 : 0u);
    const std::uint32_t finite = exponent == 0u ? small : normal;
    return bits_float((exponent == 0x7c00u ? large : finite) | ((half & 0x8000u) << 16));
}

FUSE_INLINE std::uint32_t float_to_float16(float v) {
    constexpr std::uint32_t rebias = (127u - 15u) << 23, half = 126u << 23;  // half: 0.5
    const std::uint32_t bits = float_bits(v), magnitude = bits & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - rebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 the last bit is worth 2^-24, as is that of a sum with 0.5.
    const std::uint32_t small = float_bits(bits_float(magnitude) + 0.5f) - half;
    const std::uint32_t quiet = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
    const std::uint32_t finite = magnitude < (113u << 23) ? small : normal;
    const std::uint32_t number = magnitude < (143u << 23) ? finite : 0x7c00u;
    return (magnitude > 0x7f800000u ? quiet : number) | ((bits >> 16) & 0x8000u);
}

FUSE_CLONES inline void widen_bfloat16(const std::uint16_t* from, float* to, std::ptrdiff_t n) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(from[i]);
}
FUSE_CLONES inline void narrow_bfloat16(const float* from, std::uint16_t* to, std::ptrdiff_t n) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        to[i] = static_cast<std::uint16_t>(float_to_bfloat16(from[i]));
    }
}
// An instruction each where there is one: F16C on x86, NEON on 64-bit ARM.
#if defined(FUSEENGINE_TARGETS)
#define FUSE_F16C __attribute__((target("avx,f16c")))
inline bool converts_float16() {
    // __builtin_cpu_supports knows "f16c" from GCC 11 only; with "avx" it asks the system, too.
    static const bool there = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) != 0 &&
               (c & bit_F16C) != 0;
    }();
    return there;
}
FUSE_F16C inline std::ptrdiff_t widen_whole(const std::uint16_t* from, float* to,
                                            std::ptrdiff_t n) {
    std::ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
    return i;
}
FUSE_F16C inline std::ptrdiff_t narrow_whole(const float* from, std::uint16_t* to,
                                             std::ptrdiff_t n) {
    std::ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
    }
    return i;
}
#undef FUSE_F16C
#elif defined(__aarch64__) && defined(__GNUC__)
inline bool converts_float16() { return true; }
inline std::ptrdiff_t widen_whole(const std::uint16_t* from, float* to, std::ptrdiff_t n) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        __fp16 half;
        std::memcpy(&half, from + i, sizeof half);
        to[i] = half;
    }
    return n;
}
inline std::ptrdiff_t narrow_whole(const float* from, std::uint16_t* to, std::ptrdiff_t n) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const auto half = static_cast<__fp16>(from[i]);
        std::memcpy(to + i, &half, sizeof half);
    }
    return n;
}
#else
inline bool converts_float16() { return false; }
inline std::ptrdiff_t widen_whole(const std::uint16_t*, float*, std::ptrdiff_t) { return 0; }
inline std::ptrdiff_t narrow_whole(const float*, std::uint16_t*, std::ptrdiff_t) { return 0; }
#endif

FUSE_CLONES inline void widen_float16_bits(const std::uint16_t* from, float* to, std::ptrdiff_t n) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) to[i] = float16_to_float(from[i]);
}
FUSE_CLONES inline void narrow_float16_bits(const float* from, std::uint16_t* to,
                                            std::ptrdiff_t n) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        to[i] = static_cast<std::uint16_t>(float_to_float16(from[i]));
    }
}
inline void widen_float16(const std::uint16_t* from, float* to, std::ptrdiff_t n) {
    const std::ptrdiff_t done = converts_float16() ? widen_whole(from, to, n) : 0;
    widen_float16_bits(from + done, to + done, n - done);
}
inline void narrow_float16(const float* from, std::uint16_t* to, std::ptrdiff_t n) {
    const std::ptrdiff_t done = converts_float16() ? narrow_whole(from, to, n) : 0;
    narrow_float16_bits(from + done, to + done, n - done);
}

// Numbers in memory, of one storage.
struct Numbers {
    const void* data;
    Storage storage;

    // Numbers [first, first + n) as float32: where they are, or widened into `room`.
    const float* read(std::ptrdiff_t first, std::ptrdiff_t n, float* room) const {
        if (storage == Storage::float32) return static_cast<const float*>(data) + first;
        const auto* from = static_cast<const std::uint16_t*>(data) + first;
        if (storage == Storage::bfloat16) widen_bfloat16(from, room, n);
        else widen_float16(from, room, n);
        return room;
    }
};

struct Results {
    void* data;
    Storage storage;

    // Where to put results [first, first + n): there, or into `room`, from where keep() takes them.
    float* place(std::ptrdiff_t first, float* room) const {
        return storage == Storage::float32 ? static_cast<float*>(data) + first : room;
    }
    void keep(std::ptrdiff_t first, std::ptrdiff_t n, const float* room) const {
        if (storage == Storage::float32) return;
        auto* to = static_cast<std::uint16_t*>(data) + first;
        if (storage == Storage::bfloat16) narrow_bfloat16(room, to, n);
        else narrow_float16(room, to, n);
    }
};

// body(first, count) over [begin, end): at once for float32, in blocks for what is widened.
template <class Body>
void for_each_block(Storage storage, std::ptrdiff_t begin, std::ptrdiff_t end, const Body& body) {
    const std::ptrdiff_t block = storage == Storage::float32 ? end - begin : kStorageBlock;
    for (std::ptrdiff_t first = begin; first < end; first += block) {
        body(first, std::min(block, end - first));
    }
}

}  // namespace fuse
