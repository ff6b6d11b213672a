// Frames in and out: interleaved pixels of any of four types <-> planar float32 in [0, 1].
// Knows pointers, sizes and strides (in bytes, between rows); pixels of a row are adjacent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "platform.h"

namespace fuse {

// ITU-R BT.601, full range.
constexpr double kRed = 0.299, kGreen = 0.587, kBlue = 0.114;

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

FUSE_INLINE float clip01(float v) {
    v = v > 0.0f ? v : 0.0f;
    return v < 1.0f ? v : 1.0f;
}

// All ones of the exponent: infinity or NaN. Integer form, so that the loop stays a vector loop.
FUSE_INLINE std::uint32_t not_finite(float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return (bits & 0x7f800000u) == 0x7f800000u;
}

template <class T>
FUSE_CLONES bool row_in_gray(const T* FUSE_RESTRICT src, float* FUSE_RESTRICT dst,
                             std::ptrdiff_t n, float low, float scale) {
    std::uint32_t bad = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float v = static_cast<float>(src[i]);
        if constexpr (std::is_floating_point_v<T>) bad |= not_finite(v);
        dst[i] = clip01((v - low) * scale);
    }
    return bad == 0;
}

template <class T>
FUSE_CLONES bool row_in_luma(const T* FUSE_RESTRICT src, float* FUSE_RESTRICT dst,
                             std::ptrdiff_t n, float low, float scale) {
    constexpr auto wr = static_cast<float>(kRed), wg = static_cast<float>(kGreen),
                   wb = static_cast<float>(kBlue);
    std::uint32_t bad = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float r = static_cast<float>(src[3 * i]);
        const float g = static_cast<float>(src[3 * i + 1]);
        const float b = static_cast<float>(src[3 * i + 2]);
        if constexpr (std::is_floating_point_v<T>) {
            bad |= not_finite(r) | not_finite(g) | not_finite(b);
        }
        dst[i] = clip01(((wr * r + wg * g + wb * b) - low) * scale);
    }
    return bad == 0;
}

template <class T>
FUSE_CLONES bool row_in_rgb(const T* FUSE_RESTRICT src, float* FUSE_RESTRICT red,
                            float* FUSE_RESTRICT green, float* FUSE_RESTRICT blue,
                            std::ptrdiff_t n, float low, float scale) {
    std::uint32_t bad = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float r = static_cast<float>(src[3 * i]);
        const float g = static_cast<float>(src[3 * i + 1]);
        const float b = static_cast<float>(src[3 * i + 2]);
        if constexpr (std::is_floating_point_v<T>) {
            bad |= not_finite(r) | not_finite(g) | not_finite(b);
        }
        red[i] = clip01((r - low) * scale);
        green[i] = clip01((g - low) * scale);
        blue[i] = clip01((b - low) * scale);
    }
    return bad == 0;
}

// dst[c] = clip01((src - low) * scale), then reflected to the right and below up to dst's size.
//   1 -> 1 channel as it is;  3 -> 1 luma;  3 -> 3 planes;  1 -> 3 the plane three times.
// False if an input value is infinite or NaN (as float32); dst is then of no use.
template <class T>
bool frame_in(Image<const T> src, Planes<float> dst, float low, float scale) {
    const std::ptrdiff_t h = src.height, w = src.width;
    const std::size_t row_bytes = static_cast<std::size_t>(dst.width) * sizeof(float);
    bool finite = true;
    for (std::ptrdiff_t y = 0; y < h; ++y) {
        if (src.channels == 1) {
            finite &= row_in_gray(src.row(y), dst.row(0, y), w, low, scale);
        } else if (dst.channels == 1) {
            finite &= row_in_luma(src.row(y), dst.row(0, y), w, low, scale);
        } else {
            finite &= row_in_rgb(src.row(y), dst.row(0, y), dst.row(1, y), dst.row(2, y), w,
                                 low, scale);
        }
        const std::ptrdiff_t written = src.channels == 1 ? 1 : dst.channels;
        for (std::ptrdiff_t c = 0; c < written; ++c) {
            float* row = dst.row(c, y);
            for (std::ptrdiff_t x = w; x < dst.width; ++x) row[x] = row[reflect(x, w)];
        }
        for (std::ptrdiff_t c = written; c < dst.channels; ++c) {
            std::memcpy(dst.row(c, y), dst.row(0, y), row_bytes);
        }
    }
    for (std::ptrdiff_t c = 0; c < dst.channels; ++c) {
        for (std::ptrdiff_t y = h; y < dst.height; ++y) {
            std::memcpy(dst.row(c, y), dst.row(c, reflect(y, h)), row_bytes);
        }
    }
    return finite;
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
    constexpr Work<T> top = static_cast<Work<T>>(full_scale<T>());
    v = v > Work<T>(0) ? v : Work<T>(0);
    v = v < top ? v : top;
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
    constexpr W wr = static_cast<W>(kRed), wg = static_cast<W>(kGreen), wb = static_cast<W>(kBlue);
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const W r = visible[3 * i], g = visible[3 * i + 1], b = visible[3 * i + 2];
        const W d = fused[i] * top - (wr * r + wg * g + wb * b);
        out[3 * i] = quantise<T>(r + d);
        out[3 * i + 1] = quantise<T>(g + d);
        out[3 * i + 2] = quantise<T>(b + d);
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
    constexpr W wr = static_cast<W>(kRed), wg = static_cast<W>(kGreen), wb = static_cast<W>(kBlue);
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        out[i] = quantise<T>((wr * red[i] + wg * green[i] + wb * blue[i]) * top);
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
    for (std::ptrdiff_t y = 0; y < out.height; ++y) {
        if (out.channels == 1 && fused.channels == 1) {
            row_out_gray(fused.row(0, y), out.row(y), out.width);
        } else if (out.channels == 1) {
            row_out_luma(fused.row(0, y), fused.row(1, y), fused.row(2, y), out.row(y), out.width);
        } else if (fused.channels == 1) {
            row_out_chroma<T>(fused.row(0, y), visible.row(y), out.row(y), out.width);
        } else {
            row_out_rgb(fused.row(0, y), fused.row(1, y), fused.row(2, y), out.row(y), out.width);
        }
    }
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
};

template <class T, class Key>
FUSE_CLONES void row_range(const T* src, std::ptrdiff_t n, KeyRange<Key>* range) {
    Key lo = range->lo, hi = range->hi;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const Key key = order_key(src[i]);
        lo = key < lo ? key : lo;
        hi = key > hi ? key : hi;
    }
    range->lo = lo;
    range->hi = hi;
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
    KeyRange<decltype(order_key(T{}))> keys;
    for (std::ptrdiff_t y = 0; y < src.height; ++y) {
        row_range(src.row(y), src.width * src.channels, &keys);
    }
    const T lo = from_order_key<T>(keys.lo), hi = from_order_key<T>(keys.hi);
    const bool finite = !std::is_floating_point_v<T> ||
                        !(not_finite(static_cast<float>(lo)) | not_finite(static_cast<float>(hi)));
    return {lo, hi, finite};
}

}  // namespace fuse
