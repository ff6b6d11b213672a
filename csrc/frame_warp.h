// A camera's frame sampled where another camera's pixels are, and made float planes, in one pass:
// bilinear as in warp.h, then table or scale, luma or colour, padding as in frames.h. The sampled
// frame itself can be kept on the way, for its chroma.
#pragma once

#include "frames.h"
#include "warp.h"

namespace fuse {

struct FrameWarp {
    const float* coordinates;  // 9 numbers, or u and v per pixel of the result
    bool is_map, clamp;
    const float* table;  // what a count means, before sampling; null: the count itself
    float low, scale;    // value = clip((sampled - low) * scale) to [0, 1]
    std::ptrdiff_t height, width;  // of the result, without padding
};

// The four pixels around each place of a block, one channel: [upper left, upper right, lower left,
// lower right][pixel].
struct Corners {
    float at[4][kWarpBlock];
};

// All channels of n places from contiguous pixels; `right` and `below` in numbers.
template <int channels, class T>
FUSE_CLONES void fetch(const T* FUSE_RESTRICT src, std::ptrdiff_t right, std::ptrdiff_t below,
                       const float* FUSE_RESTRICT table, const Taps* FUSE_RESTRICT taps,
                       std::ptrdiff_t n, Corners* FUSE_RESTRICT to) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const T* p = src + static_cast<std::ptrdiff_t>(channels) * taps->at[i];
        const T* corners[4] = {p, p + right, p + below, p + below + right};
        FUSE_UNROLL
        for (int k = 0; k < 4; ++k) {
            FUSE_UNROLL
            for (int c = 0; c < channels; ++c) {
                const T v = corners[k][c];
                if constexpr (std::is_integral_v<T> && channels == 1) {
                    to[c].at[k][i] = table ? table[v] : static_cast<float>(v);
                } else {
                    to[c].at[k][i] = static_cast<float>(v);
                }
            }
        }
    }
}

FUSE_CLONES inline void blend(const Corners* FUSE_RESTRICT c, const Taps* FUSE_RESTRICT taps,
                              std::ptrdiff_t n, float* FUSE_RESTRICT out) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float l = taps->left[i], r = taps->right[i];
        out[i] = taps->top[i] * (l * c->at[0][i] + r * c->at[1][i]) +
                 taps->bottom[i] * (l * c->at[2][i] + r * c->at[3][i]);
    }
}

template <class T>
class FrameWarpRow {
public:
    FrameWarpRow(Image<const T> src, Planes<float> out, Image<T> kept, const FrameWarp& how)
        : src_(src),
          out_(out),
          kept_(kept),
          how_(how),
          columns_(src.width, how.clamp),
          rows_(src.height, how.clamp),
          right_(src.width > 1 ? src.channels : 0),
          below_(src.height > 1 ? src.width * src.channels : 0) {}

    // Row y of the result, padding included. False if a number that it saw is not finite.
    bool operator()(std::ptrdiff_t y) const {
        const std::ptrdiff_t from = reflect(y, how_.height);
        std::uint32_t bad = 0;
        for (std::ptrdiff_t x = 0; x < how_.width; x += kWarpBlock) {
            const std::ptrdiff_t n = std::min(kWarpBlock, how_.width - x);
            block(y, from, x, n, &bad);
        }
        for (std::ptrdiff_t c = 0; c < out_.channels; ++c) {
            reflect_row(out_.row(c, y), how_.width, out_.width);
        }
        return bad == 0;
    }

private:
    void block(std::ptrdiff_t y, std::ptrdiff_t from, std::ptrdiff_t x, std::ptrdiff_t n,
               std::uint32_t* bad) const {
        Places places;
        Taps taps;
        if (how_.is_map) {
            places_of_map(how_.coordinates + 2 * (from * how_.width + x), n, &places);
        } else {
            places_of_homography(how_.coordinates, x, from, n, &places);
        }
        find_taps(&places, n, columns_, rows_, static_cast<std::int32_t>(src_.width), &taps);
        float sampled[3][kWarpBlock];
        Corners corners[3];
        const auto draw = src_.channels == 3 ? fetch<3, T> : fetch<1, T>;
        draw(src_.data, right_, below_, how_.table, &taps, n, corners);
        for (std::ptrdiff_t c = 0; c < src_.channels; ++c) {
            blend(&corners[c], &taps, n, sampled[c]);
            if constexpr (std::is_floating_point_v<T>) {
                for (std::ptrdiff_t i = 0; i < n; ++i) *bad |= not_finite(sampled[c][i]);
            }
            if (kept_.data && y == from) {
                T* to = kept_.row(y) + x * src_.channels + c;
                for (std::ptrdiff_t i = 0; i < n; ++i) {
                    to[i * src_.channels] = keep(sampled[c][i]);
                }
            }
        }
        if (src_.channels == 3 && out_.channels == 1) {
            for (std::ptrdiff_t i = 0; i < n; ++i) {
                sampled[0][i] = Rgb<float>{sampled[0][i], sampled[1][i], sampled[2][i]}.luma();
            }
        }
        for (std::ptrdiff_t c = 0; c < out_.channels; ++c) {
            const float* values = sampled[src_.channels == 3 ? c : 0];
            float* to = out_.row(c, y) + x;
            for (std::ptrdiff_t i = 0; i < n; ++i) {
                to[i] = clip((values[i] - how_.low) * how_.scale, 0.0f, 1.0f);
            }
        }
    }

    static T keep(float v) {
        if constexpr (std::is_integral_v<T>) return quantise<T>(v);
        else return static_cast<T>(v);
    }

    Image<const T> src_;
    Planes<float> out_;
    Image<T> kept_;
    FrameWarp how_;
    Axis columns_, rows_;
    std::ptrdiff_t right_, below_;
};

// src: contiguous, 1 or 3 channels, fewer than 2^31 pixels. out: 1 or 3 planes of at least the
// result's size. kept: null, or the result as a frame of src's type, without a table. False if a
// value that was used is not finite; it counts as in frame_in.
template <class T>
bool frame_warp(Image<const T> src, Planes<float> out, Image<T> kept, const FrameWarp& how) {
    const FrameWarpRow<T> row(src, out, kept, how);
    std::atomic<bool> finite{true};
    parallel_for(out.height, rows_per_range(4 * src.channels * out.width),
                 [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
                     bool all = true;
                     for (std::ptrdiff_t y = begin; y < end; ++y) all &= row(y);
                     if (!all) finite.store(false, std::memory_order_relaxed);
                 });
    return finite.load(std::memory_order_relaxed);
}

}  // namespace fuse
