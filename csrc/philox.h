// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3" (SC 2011), and standard normal numbers from it.
//
// Layout, the same on every backend:
//   key     = (low 32 bits of seed, high 32 bits of seed)
//   counter = (low 32 bits of block, high 32 bits of block, 0, 0)
//   word i of the stream is word i mod 4 of block i div 4.
// Normal number i comes from the pair of words (2j, 2j+1), j = i div 2, by Box-Muller in float64:
//   u = (word[2j] + 0.5)·2^-32,  v = (word[2j+1] + 0.5)·2^-32
//   i even: √(-2 ln u)·cos(2πv),  i odd: √(-2 ln u)·sin(2πv),  rounded to float32.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace fuse {

using Words = std::array<std::uint32_t, 4>;

inline Words philox4x32_10(Words counter, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53} * counter[0];
        const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * counter[2];
        counter = {static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ key[0],
                   static_cast<std::uint32_t>(p1),
                   static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ key[1],
                   static_cast<std::uint32_t>(p0)};
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return counter;
}

inline Words philox_block(std::uint64_t seed, std::uint64_t block) {
    return philox4x32_10(
        {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), 0, 0},
        {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
}

inline void normal_pair(std::uint32_t first, std::uint32_t second, float* even, float* odd) {
    constexpr double two_pi = 6.283185307179586476925;
    const double u = (first + 0.5) * 0x1p-32, v = (second + 0.5) * 0x1p-32;
    const double radius = std::sqrt(-2.0 * std::log(u));
    *even = static_cast<float>(radius * std::cos(two_pi * v));
    *odd = static_cast<float>(radius * std::sin(two_pi * v));
}

// Stream positions offset .. offset + n - 1, a block at a time, each through convert(words).
template <class T, class Convert>
void philox_fill(T* out, std::size_t n, std::uint64_t seed, std::uint64_t offset,
                 Convert convert) {
    std::size_t done = 0;
    while (done < n) {
        const std::uint64_t at = offset + done;
        const std::array<T, 4> values = convert(philox_block(seed, at / 4));
        for (std::size_t j = at % 4; j < 4 && done < n; ++j) out[done++] = values[j];
    }
}

inline void philox_words(std::uint32_t* out, std::size_t n, std::uint64_t seed,
                         std::uint64_t offset) {
    philox_fill(out, n, seed, offset, [](Words w) { return w; });
}

inline void philox_normal(float* out, std::size_t n, std::uint64_t seed, std::uint64_t offset) {
    philox_fill(out, n, seed, offset, [](Words w) {
        std::array<float, 4> z;
        normal_pair(w[0], w[1], &z[0], &z[1]);
        normal_pair(w[2], w[3], &z[2], &z[3]);
        return z;
    });
}

}  // namespace fuse
