// Planes of float32, sampled bilinearly where a homography or a map says.
//
//   out[c, y, x] = Σ over pixels (i, j) of hat(v - i) hat(u - j) in[c, i, j],  hat(d) = max(0, 1 - |d|)
//
// (u, v) is the place in the input that pixel (x, y) of the output shows; pixel centres are
// integers. At most four pixels have a weight; a place outside the picture by a pixel or more has
// none, and gives 0. With `clamp` places outside are first moved to the nearest one inside.
//
// All in float32: at column 2000 a place is right to some 1e-4 pixels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "frames.h"  // clip, rows_per_range
#include "parallel.h"
#include "platform.h"

namespace fuse {

constexpr std::ptrdiff_t kWarpBlock = 64;  // pixels at a time; more compete for the nearest cache

// (u, v) of a block of output pixels.
struct Places {
    float u[kWarpBlock], v[kWarpBlock];
};

// Two pixels per axis and their weights; `at` is the index of the upper left one.
struct Taps {
    float left[kWarpBlock], right[kWarpBlock], top[kWarpBlock], bottom[kWarpBlock];
    std::int32_t at[kWarpBlock];
};

// u = (m0 x + m1 y + m2) / (m6 x + m7 y + m8), v likewise.
FUSE_CLONES inline void places_of_homography(const float* FUSE_RESTRICT m, std::ptrdiff_t first,
                                             std::ptrdiff_t y, std::ptrdiff_t n,
                                             Places* FUSE_RESTRICT to) {
    const auto row = static_cast<float>(y);
    const float u0 = m[1] * row + m[2], v0 = m[4] * row + m[5], w0 = m[7] * row + m[8];
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const auto x = static_cast<float>(static_cast<std::int32_t>(first + i));
        const float w = m[6] * x + w0;
        to->u[i] = (m[0] * x + u0) / w;
        to->v[i] = (m[3] * x + v0) / w;
    }
}

FUSE_CLONES inline void places_of_map(const float* FUSE_RESTRICT map, std::ptrdiff_t n,
                                      Places* FUSE_RESTRICT to) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        to->u[i] = map[2 * i];
        to->v[i] = map[2 * i + 1];
    }
}

FUSE_INLINE float hat(float d) {
    d = 1.0f - std::fabs(d);
    return d > 0.0f ? d : 0.0f;
}

// One axis of a picture.
struct Axis {
    std::int32_t last;  // first pixel of the last pair; 0 if there is one pixel only
    float low, high;    // where a place is moved to when it is beyond
    float next;         // distance to the second pixel; out of reach if there is none

    Axis(std::ptrdiff_t size, bool clamp)
        : last(static_cast<std::int32_t>(std::max<std::ptrdiff_t>(0, size - 2))),
          low(clamp ? 0.0f : -1.0f),
          high(static_cast<float>(clamp ? size - 1 : size)),
          next(size > 1 ? 1.0f : 4.0f) {}

    // The pair's first pixel and both weights. NaN counts as `low`.
    FUSE_INLINE std::int32_t pair(float place, float* weight, float* next_weight) const {
        place = clip(place, low, high);
        auto i = static_cast<std::int32_t>(place);  // towards 0: up for a place below 0
        i -= place < static_cast<float>(i);
        i = i > 0 ? i : 0;
        i = i < last ? i : last;
        const float d = place - static_cast<float>(i);
        *weight = hat(d);
        *next_weight = hat(d - next);
        return i;
    }
};

FUSE_CLONES inline void find_taps(const Places* FUSE_RESTRICT places, std::ptrdiff_t n,
                                  Axis columns, Axis rows, std::int32_t width,
                                  Taps* FUSE_RESTRICT to) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const std::int32_t x = columns.pair(places->u[i], &to->left[i], &to->right[i]);
        const std::int32_t y = rows.pair(places->v[i], &to->top[i], &to->bottom[i]);
        to->at[i] = y * width + x;
    }
}

// `below`: distance to the next row. Pairs are fetched by themselves, as a loop with gathers is
// slower. A picture of one column has pairs of the same pixel.
template <bool one_column>
FUSE_CLONES void sample(const float* FUSE_RESTRICT plane, std::ptrdiff_t below,
                        const Taps* FUSE_RESTRICT taps, std::ptrdiff_t n,
                        float* FUSE_RESTRICT out) {
    float upper[2 * kWarpBlock], lower[2 * kWarpBlock];
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float* p = plane + taps->at[i];
        if constexpr (one_column) {
            upper[2 * i] = upper[2 * i + 1] = *p;
            lower[2 * i] = lower[2 * i + 1] = p[below];
        } else {
            std::memcpy(upper + 2 * i, p, 2 * sizeof(float));
            std::memcpy(lower + 2 * i, p + below, 2 * sizeof(float));
        }
    }
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float l = taps->left[i], r = taps->right[i];
        out[i] = taps->top[i] * (l * upper[2 * i] + r * upper[2 * i + 1]) +
                 taps->bottom[i] * (l * lower[2 * i] + r * lower[2 * i + 1]);
    }
}

struct Warp {
    const float* x;            // (images, channels, height, width), fewer than 2^31 pixels
    const float* coordinates;  // per image, or one for all: 9 numbers, or u and v per output pixel
    float* out;                // (images, channels, out_height, out_width)
    std::ptrdiff_t images, channels, height, width, out_height, out_width;
    bool is_map, one_for_all, clamp;
};

inline void warp_row(const Warp& a, std::ptrdiff_t image, std::ptrdiff_t y) {
    const Axis columns(a.width, a.clamp), rows(a.height, a.clamp);
    const std::ptrdiff_t below = a.height > 1 ? a.width : 0, size = a.height * a.width;
    const std::ptrdiff_t out_size = a.out_height * a.out_width;
    const std::ptrdiff_t index = a.one_for_all ? 0 : image;
    const auto draw = a.width == 1 ? sample<true> : sample<false>;
    Places places;
    Taps taps;
    for (std::ptrdiff_t x = 0; x < a.out_width; x += kWarpBlock) {
        const std::ptrdiff_t n = std::min(kWarpBlock, a.out_width - x), at = y * a.out_width + x;
        if (a.is_map) {
            places_of_map(a.coordinates + 2 * (index * out_size + at), n, &places);
        } else {
            places_of_homography(a.coordinates + 9 * index, x, y, n, &places);
        }
        find_taps(&places, n, columns, rows, static_cast<std::int32_t>(a.width), &taps);
        for (std::ptrdiff_t c = image * a.channels; c < (image + 1) * a.channels; ++c) {
            draw(a.x + c * size, below, &taps, n, a.out + c * out_size + at);
        }
    }
}

inline void warp(const Warp& a) {
    parallel_for(a.images * a.out_height, rows_per_range(4 * a.channels * a.out_width),
                 [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
                     for (std::ptrdiff_t i = begin; i < end; ++i) {
                         warp_row(a, i / a.out_height, i % a.out_height);
                     }
                 });
}

}  // namespace fuse
