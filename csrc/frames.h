// Frames in and out: interleaved pixels of any of four types <-> planar float32 in [0, 1]; the
// colour space and the padding of planes. Knows pointers, sizes and strides (in bytes, between
// rows); pixels of a row are adjacent. Threads share rows, so bits do not depend on their number.
//
// Loops over interleaved pixels are plain: GCC and Clang turn the stride of three into shuffles
// (LD3 and ST3 on Arm). By hand (pshufb, 16 pixels at a time) uint8 gained 12 %, float32 little.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <type_traits>

#include "parallel.h"
#include "platform.h"

namespace fuse {

// ITU-R BT.601, full range: Y = 0.299 R + 0.587 G + 0.114 B, Cb = 1/2 + (B - Y) / 1.772,
// Cr = 1/2 + (R - Y) / 1.402; the divisors, 2 (1 - 0.114) and 2 (1 - 0.299), make them fit [0, 1].
constexpr double kRed = 0.299, kGreen = 0.587, kBlue = 0.114;
constexpr double kCb = 2.0 * (1.0 - kBlue), kCr = 2.0 * (1.0 - kRed);

template <class T>
struct Image {
    T* data;
    std::ptrdiff_t height, width, channels;  // channels: 1, or 3 interleaved
    std::ptrdiff_t row_stride;               // bytes

    FUSE_INLINE T* row(std::ptrdiff_t y) const {
        using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
        return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + y * row_stride);
    }
};

// Contiguous (channels, height, width).
template <class T>
struct Planes {
    T* data;
    std::ptrdiff_t channels, height, width;

    FUSE_INLINE T* row(std::ptrdiff_t c, std::ptrdiff_t y) const {
        return data + (c * height + y) * width;
    }
};

// Index into [0, n) of position i >= 0 when the edge pixel is not repeated: period 2(n-1).
FUSE_INLINE std::ptrdiff_t reflect(std::ptrdiff_t i, std::ptrdiff_t n) {
    if (n == 1) return 0;
    const std::ptrdiff_t period = 2 * (n - 1);
    i %= period;
    return i < n ? i : period - i;
}

// The same for a whole row: its first n numbers are there, those up to `total` are written.
inline void reflect_row(float* row, std::ptrdiff_t n, std::ptrdiff_t total) {
    const std::ptrdiff_t period = n == 1 ? 1 : 2 * (n - 1);
    for (std::ptrdiff_t x = n; x < total; ++x) {
        row[x] = x < period ? row[period - x] : row[x - period];
    }
}

// For one thread at least: some 10 us of work, what waking it costs.
constexpr std::ptrdiff_t kPixelsPerRange = 16384;

FUSE_INLINE std::ptrdiff_t rows_per_range(std::ptrdiff_t width) {
    return std::max<std::ptrdiff_t>(1, kPixelsPerRange / std::max<std::ptrdiff_t>(1, width));
}

// v within [low, high]; NaN becomes low; high may not be negative. As numbers that are not negative
// are in the order of their bits, and negative ones have negative bits, the second comparison is of
// integers: GCC makes one instruction of it, but a dozen of two comparisons of floats.
template <class V>
FUSE_INLINE V clip(V v, V low, V high) {
    using Bits = std::conditional_t<std::is_same_v<V, float>, std::int32_t, std::int64_t>;
    v = v > low ? v : low;
    Bits bits, most;
    std::memcpy(&bits, &v, sizeof bits);
    std::memcpy(&most, &high, sizeof most);
    bits = bits < most ? bits : most;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// All ones of the exponent: infinity or NaN. Integer form, so that the loop stays a vector loop.
FUSE_INLINE std::uint32_t not_finite(float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return (bits & 0x7f800000u) == 0x7f800000u;
}

template <class V>
struct Rgb {
    V r, g, b;

    FUSE_INLINE V luma() const {
        return static_cast<V>(kRed) * r + static_cast<V>(kGreen) * g + static_cast<V>(kBlue) * b;
    }
};

struct Ycbcr {
    float y, cb, cr;
};

FUSE_INLINE Ycbcr ycbcr_of(Rgb<float> p) {
    constexpr auto to_cb = static_cast<float>(1.0 / kCb), to_cr = static_cast<float>(1.0 / kCr);
    const float y = p.luma();
    return {y, 0.5f + (p.b - y) * to_cb, 0.5f + (p.r - y) * to_cr};
}

FUSE_INLINE Rgb<float> rgb_of(Ycbcr p) {
    constexpr auto red_cr = static_cast<float>(kCr), blue_cb = static_cast<float>(kCb),
                   green_cr = static_cast<float>(kCr * kRed / kGreen),
                   green_cb = static_cast<float>(kCb * kBlue / kGreen);
    const float cb = p.cb - 0.5f, cr = p.cr - 0.5f;
    return {p.y + red_cr * cr, p.y - (green_cr * cr + green_cb * cb), p.y + blue_cb * cb};
}

// Pixel i of a row; *bad becomes 1 if it is not finite.
template <class T>
FUSE_INLINE Rgb<float> pixel_in(const T* row, std::ptrdiff_t i, std::uint32_t* bad) {
    const Rgb<float> p{static_cast<float>(row[3 * i]), static_cast<float>(row[3 * i + 1]),
                       static_cast<float>(row[3 * i + 2])};
    if constexpr (std::is_floating_point_v<T>) {
        *bad |= not_finite(p.r) | not_finite(p.g) | not_finite(p.b);
    }
    return p;
}

FUSE_INLINE Rgb<float> scaled(Rgb<float> p, float low, float scale) {
    return {clip((p.r - low) * scale, 0.0f, 1.0f), clip((p.g - low) * scale, 0.0f, 1.0f),
            clip((p.b - low) * scale, 0.0f, 1.0f)};
}

template <class T>
FUSE_CLONES bool row_in_gray(const T* FUSE_RESTRICT src, float* FUSE_RESTRICT dst,
                             std::ptrdiff_t n, float low, float scale) {
    std::uint32_t bad = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float v = static_cast<float>(src[i]);
        if constexpr (std::is_floating_point_v<T>) bad |= not_finite(v);
        dst[i] = clip((v - low) * scale, 0.0f, 1.0f);
    }
    return bad == 0;
}

template <class T>
FUSE_CLONES bool row_in_luma(const T* FUSE_RESTRICT src, float* FUSE_RESTRICT dst,
                             std::ptrdiff_t n, float low, float scale) {
    std::uint32_t bad = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        dst[i] = clip((pixel_in(src, i, &bad).luma() - low) * scale, 0.0f, 1.0f);
    }
    return bad == 0;
}

template <class T>
FUSE_CLONES bool row_in_rgb(const T* FUSE_RESTRICT src, float* FUSE_RESTRICT red,
                            float* FUSE_RESTRICT green, float* FUSE_RESTRICT blue,
                            std::ptrdiff_t n, float low, float scale) {
    std::uint32_t bad = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const Rgb<float> p = scaled(pixel_in(src, i, &bad), low, scale);
        red[i] = p.r;
        green[i] = p.g;
        blue[i] = p.b;
    }
    return bad == 0;
}

template <class T>
FUSE_CLONES bool row_in_ycbcr(const T* FUSE_RESTRICT src, float* FUSE_RESTRICT y,
                              float* FUSE_RESTRICT cb, float* FUSE_RESTRICT cr, std::ptrdiff_t n,
                              float low, float scale) {
    std::uint32_t bad = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const Ycbcr p = ycbcr_of(scaled(pixel_in(src, i, &bad), low, scale));
        y[i] = p.y;
        cb[i] = p.cb;
        cr[i] = p.cr;
    }
    return bad == 0;
}

// What three planes hold.
enum class Colour { rgb, ycbcr };

// Row y of dst, padding included.
template <class T>
bool row_in(Image<const T> src, Planes<float> dst, Colour colour, float low, float scale,
            std::ptrdiff_t y) {
    const T* from = src.row(reflect(y, src.height));
    const std::ptrdiff_t n = src.width, total = dst.width;
    float* first = dst.row(0, y);
    if (dst.channels == 1) {
        const bool finite = src.channels == 1 ? row_in_gray(from, first, n, low, scale)
                                              : row_in_luma(from, first, n, low, scale);
        reflect_row(first, n, total);
        return finite;
    }
    float *second = dst.row(1, y), *third = dst.row(2, y);
    if (src.channels == 1) {
        const bool finite = row_in_gray(from, first, n, low, scale);
        reflect_row(first, n, total);
        if (colour == Colour::ycbcr) {
            std::fill_n(second, total, 0.5f);
            std::fill_n(third, total, 0.5f);
        } else {
            std::copy_n(first, total, second);
            std::copy_n(first, total, third);
        }
        return finite;
    }
    const auto convert = colour == Colour::ycbcr ? row_in_ycbcr<T> : row_in_rgb<T>;
    const bool finite = convert(from, first, second, third, n, low, scale);
    for (float* row : {first, second, third}) reflect_row(row, n, total);
    return finite;
}

// dst[c] = clip((src - low) * scale) to [0, 1], reflected to the right and below up to dst's size.
//   1 -> 1 channel as it is;  3 -> 1 luma, taken before the scale and clipped after;  3 -> 3 planes;
//   1 -> 3 the plane three times, or the plane, 1/2 and 1/2.
// Y, Cb, Cr are those of the clipped R, G, B. Rows of the padding are converted once more: one that
// another thread writes could not be copied yet.
// False if an input value is infinite or NaN (as float32). In dst NaN is 0, infinities 0 and 1.
template <class T>
bool frame_in(Image<const T> src, Planes<float> dst, Colour colour, float low, float scale) {
    std::atomic<bool> finite{true};
    parallel_for(dst.height, rows_per_range(dst.width),
                 [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
                     bool all = true;
                     for (std::ptrdiff_t y = begin; y < end; ++y) {
                         all &= row_in(src, dst, colour, low, scale, y);
                     }
                     if (!all) finite.store(false, std::memory_order_relaxed);
                 });
    return finite.load(std::memory_order_relaxed);
}

// Three planes of R, G, B <-> Y, Cb, Cr; the planes of both sides may be the same.
FUSE_CLONES inline void rgb_to_ycbcr(const float* red, const float* green, const float* blue,
                                     float* y, float* cb, float* cr, std::ptrdiff_t n) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const Ycbcr p = ycbcr_of({red[i], green[i], blue[i]});
        y[i] = p.y;
        cb[i] = p.cb;
        cr[i] = p.cr;
    }
}

FUSE_CLONES inline void ycbcr_to_rgb(const float* y, const float* cb, const float* cr, float* red,
                                     float* green, float* blue, std::ptrdiff_t n) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const Rgb<float> p = rgb_of({y[i], cb[i], cr[i]});
        red[i] = p.r;
        green[i] = p.g;
        blue[i] = p.b;
    }
}

// The planes of src, reflected to the right and below up to dst's size.
inline void pad_reflect(Planes<const float> src, Planes<float> dst) {
    parallel_for(dst.channels * dst.height, rows_per_range(dst.width),
                 [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
                     for (std::ptrdiff_t i = begin; i < end; ++i) {
                         const std::ptrdiff_t c = i / dst.height, y = i % dst.height;
                         std::copy_n(src.row(c, reflect(y, src.height)), src.width, dst.row(c, y));
                         reflect_row(dst.row(c, y), src.width, dst.width);
                     }
                 });
}

// The value that stands for 1.0.
template <class T>
constexpr double full_scale() {
    if constexpr (std::is_floating_point_v<T>) return 1.0;
    else return static_cast<double>(std::numeric_limits<T>::max());
}

// float64 frames keep their precision; everything else is worked in float32.
template <class T>
using Work = std::conditional_t<std::is_same_v<T, double>, double, float>;

// From units of full scale to T: clipped, integers rounded to nearest (ties up). NaN becomes 0.
template <class T>
FUSE_INLINE T quantise(Work<T> v) {
    v = clip(v, Work<T>(0), static_cast<Work<T>>(full_scale<T>()));
    if constexpr (std::is_floating_point_v<T>) {
        return v;
    } else {
        return static_cast<T>(static_cast<std::int32_t>(v + Work<T>(0.5)));
    }
}

template <class T>
FUSE_CLONES void row_out_gray(const float* FUSE_RESTRICT fused, T* FUSE_RESTRICT out,
                              std::ptrdiff_t n) {
    constexpr Work<T> top = static_cast<Work<T>>(full_scale<T>());
    for (std::ptrdiff_t i = 0; i < n; ++i) out[i] = quantise<T>(fused[i] * top);
}

template <class T>
FUSE_CLONES void row_out_chroma(const float* FUSE_RESTRICT fused, const T* visible, T* out,
                                std::ptrdiff_t n) {
    using W = Work<T>;
    constexpr W top = static_cast<W>(full_scale<T>());
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const Rgb<W> p{static_cast<W>(visible[3 * i]), static_cast<W>(visible[3 * i + 1]),
                       static_cast<W>(visible[3 * i + 2])};
        const W d = fused[i] * top - p.luma();
        out[3 * i] = quantise<T>(p.r + d);
        out[3 * i + 1] = quantise<T>(p.g + d);
        out[3 * i + 2] = quantise<T>(p.b + d);
    }
}

template <class T>
FUSE_CLONES void row_out_rgb(const float* FUSE_RESTRICT red, const float* FUSE_RESTRICT green,
                             const float* FUSE_RESTRICT blue, T* FUSE_RESTRICT out,
                             std::ptrdiff_t n) {
    constexpr Work<T> top = static_cast<Work<T>>(full_scale<T>());
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        out[3 * i] = quantise<T>(red[i] * top);
        out[3 * i + 1] = quantise<T>(green[i] * top);
        out[3 * i + 2] = quantise<T>(blue[i] * top);
    }
}

template <class T>
FUSE_CLONES void row_out_luma(const float* FUSE_RESTRICT red, const float* FUSE_RESTRICT green,
                              const float* FUSE_RESTRICT blue, T* FUSE_RESTRICT out,
                              std::ptrdiff_t n) {
    using W = Work<T>;
    constexpr W top = static_cast<W>(full_scale<T>());
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        out[i] = quantise<T>(Rgb<W>{red[i], green[i], blue[i]}.luma() * top);
    }
}

// Crops `fused` to out's size and turns it into out's type:
//   1 plane -> 1 channel, 3 planes -> 3 channels as they are; 3 planes -> 1 channel: their luma;
//   1 plane -> 3 channels: out = visible + (fused - luma(visible)), every channel shifted by the
//   same amount. With Cb, Cr proportional to B - Y, R - Y this is the same as exchanging Y in
//   YCbCr and converting back, since B - Y, R - Y (and so G - Y) stay what they were.
// `visible` is read in that last case only; `out` may be the very same memory.
template <class T>
void frame_out(Planes<const float> fused, Image<const T> visible, Image<T> out) {
    const auto row_out = [&](std::ptrdiff_t y) {
        const std::ptrdiff_t n = out.width;
        const float* first = fused.row(0, y);
        if (fused.channels == 1) {
            if (out.channels == 1) return row_out_gray(first, out.row(y), n);
            return row_out_chroma<T>(first, visible.row(y), out.row(y), n);
        }
        const float *second = fused.row(1, y), *third = fused.row(2, y);
        if (out.channels == 1) return row_out_luma(first, second, third, out.row(y), n);
        return row_out_rgb(first, second, third, out.row(y), n);
    };
    parallel_for(out.height, rows_per_range(out.width),
                 [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
                     for (std::ptrdiff_t y = begin; y < end; ++y) row_out(y);
                 });
}

// An integer in the order of the number, so that minimum and maximum are integer reductions:
// compilers do not reorder those of floating point. -0 sorts below 0, NaN outside everything.
FUSE_INLINE std::int32_t order_key(float v) {
    std::int32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

FUSE_INLINE std::int64_t order_key(double v) {
    std::int64_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}

FUSE_INLINE std::int32_t order_key(std::uint8_t v) { return v; }
FUSE_INLINE std::int32_t order_key(std::uint16_t v) { return v; }

template <class T, class Key>
T from_order_key(Key key) {
    if constexpr (std::is_floating_point_v<T>) {
        const Key bits = key ^ ((key >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
        T v;
        std::memcpy(&v, &bits, sizeof v);
        return v;
    } else {
        return static_cast<T>(key);
    }
}

template <class Key>
struct KeyRange {
    Key lo = std::numeric_limits<Key>::max(), hi = std::numeric_limits<Key>::min();

    FUSE_INLINE void add(Key l, Key h) {
        lo = l < lo ? l : lo;
        hi = h > hi ? h : hi;
    }
};

template <class T, class Key>
FUSE_CLONES void row_range(const T* src, std::ptrdiff_t n, KeyRange<Key>* range) {
    KeyRange<Key> local;  // in registers
    for (std::ptrdiff_t i = 0; i < n; ++i) local.add(order_key(src[i]), order_key(src[i]));
    range->add(local.lo, local.hi);
}

template <class T>
struct Range {
    T lo, hi;
    bool finite;
};

// Smallest and largest value, and whether all are finite as float32, which is how they are used.
// lo and hi mean something only if so.
template <class T>
Range<T> frame_range(Image<const T> src) {
    using Keys = KeyRange<decltype(order_key(T{}))>;
    Keys keys;
    std::mutex mutex;
    const std::ptrdiff_t n = src.width * src.channels;
    parallel_for(src.height, rows_per_range(n), [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        Keys part;
        for (std::ptrdiff_t y = begin; y < end; ++y) row_range(src.row(y), n, &part);
        const std::lock_guard lock(mutex);
        keys.add(part.lo, part.hi);
    });
    const T lo = from_order_key<T>(keys.lo), hi = from_order_key<T>(keys.hi);
    const bool finite = !std::is_floating_point_v<T> ||
                        !(not_finite(static_cast<float>(lo)) | not_finite(static_cast<float>(hi)));
    return {lo, hi, finite};
}

}  // namespace fuse
