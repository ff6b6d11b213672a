// Cameras' frames in YUV (range and matrix: ITU-T H.273) as interleaved RGB, 8 bits each. A chroma
// sample stands for the two, or two by two, pixels that it covers, without interpolation.
//
// Arithmetic is float32 in one order, rounded to nearest with ties to even: compiled without
// contraction, the bits are the same at every level of instructions. Threads share rows.
//
// Every loop does one thing to adjacent bytes: what is interleaved is taken apart before and put
// together after. SSE2, which cannot shuffle bytes, was 1.6 times slower in one loop; wider sets
// are as fast either way.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "frames.h"  // Image, rows_per_range
#include "parallel.h"
#include "platform.h"
#include "simd.h"

namespace fuse {

enum class YuvFormat { yuyv, nv12, i420 };
enum class YuvMatrix { bt601, bt709 };

// yuyv: rows Y U Y V ...; nv12: rows of Y, then half as many of U V ...; i420: rows of Y, then the
// planes of U and of V, two rows of theirs to a row of the frame.
struct YuvFrame {
    const std::uint8_t* data;
    std::ptrdiff_t height, width;  // pixels; width is even, and height but for yuyv
    std::ptrdiff_t row_stride;     // bytes
    YuvFormat format;

    FUSE_INLINE const std::uint8_t* row(std::ptrdiff_t y) const { return data + y * row_stride; }

    // Rows of pixels to a row of chroma.
    FUSE_INLINE std::ptrdiff_t tall() const { return format == YuvFormat::yuyv ? 1 : 2; }

    // Row k of U (plane 0) or V (plane 1).
    FUSE_INLINE const std::uint8_t* chroma(std::ptrdiff_t plane, std::ptrdiff_t k) const {
        if (format == YuvFormat::yuyv) return row(k) + 1 + 2 * plane;
        if (format == YuvFormat::nv12) return row(height + k) + plane;
        const std::ptrdiff_t half = plane * (height / 2) + k;  // half rows from the first of U
        return row(height + half / 2) + half % 2 * (width / 2);
    }
};

// y = (Y - low) scale, u = (U - 128) chroma, v likewise;
// R = y + red_v v, G = y + (green_v v + green_u u), B = y + blue_u u.
struct YuvWeights {
    float low, scale, chroma, red_v, green_v, green_u, blue_u;

    YuvWeights(bool full_range, YuvMatrix matrix) {
        const double red = matrix == YuvMatrix::bt601 ? 0.299 : 0.2126;
        const double blue = matrix == YuvMatrix::bt601 ? 0.114 : 0.0722;
        const double green = 1.0 - red - blue;
        low = full_range ? 0.0f : 16.0f;
        scale = full_range ? 1.0f : static_cast<float>(255.0 / 219.0);
        chroma = full_range ? 1.0f : static_cast<float>(255.0 / 224.0);
        red_v = static_cast<float>(2.0 * (1.0 - red));
        green_v = -static_cast<float>(2.0 * (1.0 - red) * red / green);
        green_u = -static_cast<float>(2.0 * (1.0 - blue) * blue / green);
        blue_u = static_cast<float>(2.0 * (1.0 - blue));
    }
};

constexpr std::ptrdiff_t kYuvBlock = 512;  // pixels, even: what a block needs stays in the cache

// What chroma adds to each pixel of a block.
struct YuvChange {
    float red[kYuvBlock], green[kYuvBlock], blue[kYuvBlock];
};

template <int step>
FUSE_INLINE void take_every(const std::uint8_t* FUSE_RESTRICT from, std::ptrdiff_t n,
                            std::uint8_t* FUSE_RESTRICT to) {
    for (std::ptrdiff_t i = 0; i < n; ++i) to[i] = from[step * i];
}

// n samples of each, for 2 n pixels.
FUSE_INLINE void change_of(const std::uint8_t* FUSE_RESTRICT u, const std::uint8_t* FUSE_RESTRICT v,
                           std::ptrdiff_t n, const YuvWeights& w, YuvChange* FUSE_RESTRICT to) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float du = (static_cast<float>(u[i]) - 128.0f) * w.chroma;
        const float dv = (static_cast<float>(v[i]) - 128.0f) * w.chroma;
        to->red[2 * i] = to->red[2 * i + 1] = w.red_v * dv;
        to->green[2 * i] = to->green[2 * i + 1] = w.green_v * dv + w.green_u * du;
        to->blue[2 * i] = to->blue[2 * i + 1] = w.blue_u * du;
    }
}

// The nearest of 0 to 255, ties to even, for |v| < 32768. The sum has room for whole numbers only,
// and its low bits are v's; clipped there, in 16 bits, twice as many fit into a register.
FUSE_INLINE std::uint8_t to_level(float v) {
    const float sum = v + 12582912.0f;  // 1.5 * 2^23
    std::uint32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    const auto level = static_cast<std::int16_t>(bits);
    const std::int16_t low = std::max<std::int16_t>(level, 0);
    return static_cast<std::uint8_t>(std::min<std::int16_t>(low, 255));
}

FUSE_INLINE void pixels_of(const std::uint8_t* FUSE_RESTRICT luma,
                           const YuvChange* FUSE_RESTRICT change, std::ptrdiff_t n,
                           const YuvWeights& w, std::uint8_t* FUSE_RESTRICT out) {
    std::uint8_t red[kYuvBlock], green[kYuvBlock], blue[kYuvBlock];
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float y = (static_cast<float>(luma[i]) - w.low) * w.scale;
        red[i] = to_level(y + change->red[i]);
        green[i] = to_level(y + change->green[i]);
        blue[i] = to_level(y + change->blue[i]);
    }
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        out[3 * i] = red[i];
        out[3 * i + 1] = green[i];
        out[3 * i + 2] = blue[i];
    }
}

// Rows [begin, end) of chroma and the pixels that they cover.
template <YuvFormat format>
struct YuvRows {
    template <class Level>
    static FUSE_INLINE void run(const YuvFrame* frame, const YuvWeights* weights,
                                const Image<std::uint8_t>* out, std::ptrdiff_t begin,
                                std::ptrdiff_t end) {
        constexpr int luma_step = format == YuvFormat::yuyv ? 2 : 1;
        constexpr int chroma_step =
            format == YuvFormat::yuyv ? 4 : format == YuvFormat::nv12 ? 2 : 1;
        const YuvWeights w = *weights;
        const std::ptrdiff_t tall = frame->tall();
        std::uint8_t luma[kYuvBlock], u[kYuvBlock / 2], v[kYuvBlock / 2];
        YuvChange change;
        for (std::ptrdiff_t k = begin; k < end; ++k) {
            for (std::ptrdiff_t x = 0; x < frame->width; x += kYuvBlock) {
                const std::ptrdiff_t n = std::min(kYuvBlock, frame->width - x);
                take_every<chroma_step>(frame->chroma(0, k) + chroma_step * x / 2, n / 2, u);
                take_every<chroma_step>(frame->chroma(1, k) + chroma_step * x / 2, n / 2, v);
                change_of(u, v, n / 2, w, &change);
                for (std::ptrdiff_t y = tall * k; y < tall * (k + 1); ++y) {
                    take_every<luma_step>(frame->row(y) + luma_step * x, n, luma);
                    pixels_of(luma, &change, n, w, out->row(y) + 3 * x);
                }
            }
        }
    }
};

// out: three channels of the frame's size.
inline void yuv_to_rgb(const YuvFrame& frame, const YuvWeights& weights,
                       const Image<std::uint8_t>& out) {
    using F = YuvFormat;
    const SimdLevel level = simd_level();
    const auto rows = [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        switch (frame.format) {
            case F::yuyv:
                return dispatch<YuvRows<F::yuyv>>(level, &frame, &weights, &out, begin, end);
            case F::nv12:
                return dispatch<YuvRows<F::nv12>>(level, &frame, &weights, &out, begin, end);
            case F::i420:
                return dispatch<YuvRows<F::i420>>(level, &frame, &weights, &out, begin, end);
        }
    };
    const std::ptrdiff_t tall = frame.tall();
    parallel_for(frame.height / tall, rows_per_range(tall * frame.width), rows);
}

}  // namespace fuse
