// out = irfft2(G * rfft2(x)) for real pictures and a half spectrum G of (h, w / 2 + 1).
//
// Two rows ride in one complex transform: z = a + i b, A(k) = (Z(k) + conj Z(w-k)) / 2 and
// B(k) = (Z(k) - conj Z(w-k)) / 2i, so that only w / 2 + 1 columns are left to transform, for one
// picture as for many. Three passes over the picture: rows; columns, the filter and columns back;
// rows back. The way back ignores the imaginary part of the first column and, for an even width,
// of the last, as irfft2 does.
//
// The half spectrum lies in blocks of one vector of columns, [block][row][re, im][lane], so that
// a column transform reads and writes one piece of memory. After the columns' pass real and
// imaginary parts are exchanged, which is what the inverse transform of the rows wants.
#pragma once

#include <algorithm>
#include <cstddef>

#include "fft.h"
#include "parallel.h"
#include "scratch.h"

namespace fuse {

struct Wiener {
    const float *x, *spectrum;  // pictures; spectrum: (h, half), real or in complex pairs
    float *out, *blocks;
    std::ptrdiff_t h, w, half;
    bool complex_spectrum;
    const FftPlan *rows, *columns;

    // The same for one picture of several, whose blocks are so many floats each.
    Wiener picture(std::ptrdiff_t n, std::ptrdiff_t floats) const {
        Wiener one = *this;
        one.x += n * h * w;
        one.out += n * h * w;
        one.blocks += n * floats;
        return one;
    }
};

// What the passes do besides transforming. Rows come in units of two vectors: lane l is row l of
// the first and, as imaginary part, row l of the second; y0 is a unit's first row.
template <class Level>
struct WienerTile {
    using S = typename Level::Simd;
    using F = typename S::F;
    using C = Complex<S>;
    static constexpr std::ptrdiff_t lanes = S::lanes, size = 2 * lanes;

    // v[i] = column i of a tile of memory; zeros past the rows and columns that are left in it.
    static FUSE_INLINE void load(const float* from, std::ptrdiff_t stride, std::ptrdiff_t rows,
                                 std::ptrdiff_t columns, F (&v)[S::lanes]) {
        FUSE_UNROLL
        for (int i = 0; i < S::lanes; ++i) {
            if (i >= rows) {
                v[i] = S::splat(0.0f);
            } else if (columns >= lanes) {
                v[i] = S::load(from + i * stride);
            } else {
                float part[S::lanes] = {};
                std::copy_n(from + i * stride, columns, part);
                v[i] = S::load(part);
            }
        }
        S::transpose(v);
    }

    static FUSE_INLINE void store(float* to, std::ptrdiff_t stride, std::ptrdiff_t rows,
                                  std::ptrdiff_t columns, F (&v)[S::lanes]) {
        S::transpose(v);
        FUSE_UNROLL
        for (int i = 0; i < S::lanes; ++i) {
            if (i >= rows) continue;
            if (columns >= lanes) {
                S::store(to + i * stride, v[i]);
            } else {
                float part[S::lanes];
                S::store(part, v[i]);
                std::copy_n(part, columns, to + i * stride);
            }
        }
    }

    // A unit of the picture to samples a + i b.
    static FUSE_INLINE void load_rows(const Wiener& a, std::ptrdiff_t y0, float* samples) {
        const float* from = a.x + y0 * a.w;
        for (std::ptrdiff_t x0 = 0; x0 < a.w; x0 += lanes) {
            F first[S::lanes], second[S::lanes];
            load(from + x0, a.w, a.h - y0, a.w - x0, first);
            load(from + lanes * a.w + x0, a.w, a.h - y0 - lanes, a.w - x0, second);
            FUSE_UNROLL
            for (int i = 0; i < S::lanes; ++i) {
                C{first[i], second[i]}.store(samples + (x0 + i) * size);
            }
        }
    }

    // Samples b + i a, as an exchanged transform leaves them, to a unit of the picture.
    static FUSE_INLINE void store_rows(const Wiener& a, std::ptrdiff_t y0, const float* samples) {
        float* to = a.out + y0 * a.w;
        for (std::ptrdiff_t x0 = 0; x0 < a.w; x0 += lanes) {
            F first[S::lanes], second[S::lanes];
            FUSE_UNROLL
            for (int i = 0; i < S::lanes; ++i) {
                const C sample = C::load(samples + (x0 + i) * size);
                first[i] = sample.im;
                second[i] = sample.re;
            }
            store(to + x0, a.w, a.h - y0, a.w - x0, first);
            store(to + lanes * a.w + x0, a.w, a.h - y0 - lanes, a.w - x0, second);
        }
    }

    // The transform of a + i b to both rows of the half spectrum, doubled: the filter halves.
    static FUSE_INLINE void split(const Wiener& a, std::ptrdiff_t y0, const float* transform) {
        for (std::ptrdiff_t k0 = 0; k0 < a.half; k0 += lanes) {
            float* to = a.blocks + (k0 / lanes * a.h + y0) * size;
            for (int part = 0; part < 2; ++part) {
                F first[S::lanes], second[S::lanes];
                FUSE_UNROLL
                for (int i = 0; i < S::lanes; ++i) {
                    // Columns past the half are transformed for nothing; any number will do.
                    const std::ptrdiff_t k = std::min(k0 + i, a.half - 1);
                    const C z = C::load(transform + k * size);
                    const C mirror = C::load(transform + (k == 0 ? 0 : a.w - k) * size);
                    first[i] = part == 0 ? z.re + mirror.re : z.im - mirror.im;
                    second[i] = part == 0 ? z.im + mirror.im : mirror.re - z.re;
                }
                store(to + part * lanes, size, a.h - y0, lanes, first);
                store(to + (size + part) * lanes, size, a.h - y0 - lanes, lanes, second);
            }
        }
    }

    // The other way: A + i B for all w columns, exchanged, from rows whose parts are exchanged.
    static FUSE_INLINE void merge(const Wiener& a, std::ptrdiff_t y0, float* transform) {
        for (std::ptrdiff_t k0 = 0; k0 < a.half; k0 += lanes) {
            const float* from = a.blocks + (k0 / lanes * a.h + y0) * size;
            F a_im[S::lanes], a_re[S::lanes], b_im[S::lanes], b_re[S::lanes];
            load(from, size, a.h - y0, lanes, a_im);
            load(from + lanes, size, a.h - y0, lanes, a_re);
            load(from + lanes * size, size, a.h - y0 - lanes, lanes, b_im);
            load(from + lanes * size + lanes, size, a.h - y0 - lanes, lanes, b_re);
            const std::ptrdiff_t present = std::min(lanes, a.half - k0);
            for (std::ptrdiff_t i = 0; i < present; ++i) {
                const std::ptrdiff_t k = k0 + i;
                float* to = transform + k * size;
                if (k == 0 || 2 * k == a.w) {
                    C{b_re[i], a_re[i]}.store(to);
                    continue;
                }
                C{a_im[i] + b_re[i], a_re[i] - b_im[i]}.store(to);
                C{b_re[i] - a_im[i], a_re[i] + b_im[i]}.store(transform + (a.w - k) * size);
            }
        }
    }

    // G of row y and a vector of columns from k0, times scale; zeros past the half.
    static FUSE_INLINE C gain(const Wiener& a, std::ptrdiff_t y, std::ptrdiff_t k0, float scale) {
        const std::ptrdiff_t pair = a.complex_spectrum ? 2 : 1;
        const float* from = a.spectrum + (y * a.half + k0) * pair;
        float part[size];
        if (a.half - k0 < lanes) {
            std::fill_n(part, size, 0.0f);
            std::copy_n(from, (a.half - k0) * pair, part);
            from = part;
        }
        if (!a.complex_spectrum) return {S::load(from) * scale, S::splat(0.0f)};
        const F low = S::load(from), high = S::load(from + lanes);
        return {S::even(low, high) * scale, S::odd(low, high) * scale};
    }
};

// Units [begin, end) of rows: to the half spectrum or back.
template <bool back>
struct WienerRows {
    template <class Level>
    static FUSE_INLINE void run(const Wiener* a, std::ptrdiff_t begin, std::ptrdiff_t end) {
        using T = WienerTile<Level>;
        constexpr std::ptrdiff_t lanes = T::lanes, size = T::size;
        const std::ptrdiff_t w = a->w, padded = (w + lanes - 1) / lanes * lanes;
        const Scratch source(padded * size), scratch(w * size), result(padded * size),
            work(a->rows->work() * size);
        // Read with the last whole vector of a row, never kept.
        std::fill_n(result.data() + w * size, (padded - w) * size, 0.0f);
        for (std::ptrdiff_t y0 = begin * size; y0 < std::min(a->h, end * size); y0 += size) {
            if constexpr (back) T::merge(*a, y0, source.data());
            else T::load_rows(*a, y0, source.data());
            fft<typename T::S>(*a->rows, source.data(), scratch.data(), result.data(), work.data());
            if constexpr (back) T::store_rows(*a, y0, result.data());
            else T::split(*a, y0, result.data());
        }
    }
};

// Blocks [begin, end) of columns: transform, filter, transform back.
struct WienerColumns {
    template <class Level>
    static FUSE_INLINE void run(const Wiener* a, std::ptrdiff_t begin, std::ptrdiff_t end) {
        using T = WienerTile<Level>;
        using S = typename T::S;
        constexpr std::ptrdiff_t lanes = T::lanes, size = T::size;
        const std::ptrdiff_t h = a->h;
        const Scratch scratch(h * size), result(h * size), work(a->columns->work() * size);
        const auto pixels = static_cast<double>(h) * static_cast<double>(a->w);
        const auto scale = static_cast<float>(0.5 / pixels);
        for (std::ptrdiff_t b = begin; b < end; ++b) {
            float* block = a->blocks + b * h * size;
            fft<S>(*a->columns, block, scratch.data(), result.data(), work.data());
            for (std::ptrdiff_t y = 0; y < h; ++y) {
                float* at = result.data() + y * size;
                const auto gain = T::gain(*a, y, b * lanes, scale);
                T::C::load(at).times(gain).swapped().store(at);
            }
            fft<S>(*a->columns, result.data(), scratch.data(), block, work.data());
        }
    }
};

struct WienerLanes {
    template <class Level>
    static FUSE_INLINE void run(std::ptrdiff_t* lanes) {
        *lanes = Level::Simd::lanes;
    }
};

// Pictures that go through a pass together: as many as give every thread as much to do.
inline constexpr std::ptrdiff_t kWienerPictures = 2;

// Memory besides the arguments: the half spectrum of two pictures and, per thread, a few dozen rows
// or columns. out may be x itself.
inline void wiener_filter(Wiener a, std::ptrdiff_t pictures) {
    const SimdLevel level = simd_level();
    const auto rows_plan = fft_plan(a.w), columns_plan = fft_plan(a.h);
    a.rows = rows_plan.get();
    a.columns = columns_plan.get();
    a.half = a.w / 2 + 1;
    std::ptrdiff_t lanes = 0;
    dispatch<WienerLanes>(level, &lanes);
    const std::ptrdiff_t columns = (a.half + lanes - 1) / lanes;
    const std::ptrdiff_t rows = (a.h + 2 * lanes - 1) / (2 * lanes);
    const std::ptrdiff_t floats = columns * lanes * 2 * a.h;
    const Scratch blocks(std::min(pictures, kWienerPictures) * floats);
    a.blocks = blocks.data();
    for (std::ptrdiff_t n = 0; n < pictures; n += kWienerPictures) {
        const std::ptrdiff_t count = std::min(pictures - n, kWienerPictures);
        const auto pass = [&](std::ptrdiff_t units, const auto& body) {
            parallel_for(count * units, 1, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
                for_each_plane(begin, end, units, [&](auto picture, auto first, auto some) {
                    const Wiener one = a.picture(picture, floats);
                    body(&one, first, first + some);
                });
            });
        };
        pass(rows, [&](const Wiener* one, std::ptrdiff_t begin, std::ptrdiff_t end) {
            dispatch<WienerRows<false>>(level, one, begin, end);
        });
        pass(columns, [&](const Wiener* one, std::ptrdiff_t begin, std::ptrdiff_t end) {
            dispatch<WienerColumns>(level, one, begin, end);
        });
        pass(rows, [&](const Wiener* one, std::ptrdiff_t begin, std::ptrdiff_t end) {
            dispatch<WienerRows<true>>(level, one, begin, end);
        });
        a.x += count * a.h * a.w;
        a.out += count * a.h * a.w;
    }
}

}  // namespace fuse
