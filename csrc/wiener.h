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
    const float *x, *spectrum;  // one picture; spectrum: (h, half), real or in complex pairs
    float *out, *blocks;
    std::ptrdiff_t h, w, half;
    bool complex_spectrum;
    const FftPlan *rows, *columns;
};

template <class Level>
struct WienerTile {
    using S = typename Level::Simd;
    using F = typename S::F;
    using C = Complex<S>;
    static constexpr std::ptrdiff_t lanes = S::lanes, size = 2 * lanes;

    // v[i] = column x0 + i of rows y0 .. y0 + lanes - 1; zeros outside of (h, w).
    static FUSE_INLINE void load(const float* x, std::ptrdiff_t h, std::ptrdiff_t w,
                                 std::ptrdiff_t y0, std::ptrdiff_t x0, F (&v)[S::lanes]) {
        const std::ptrdiff_t present = std::min(lanes, w - x0);
        FUSE_UNROLL
        for (int i = 0; i < S::lanes; ++i) {
            const float* from = x + (y0 + i) * w + x0;
            if (y0 + i >= h) {
                v[i] = S::splat(0.0f);
            } else if (present == lanes) {
                v[i] = S::load(from);
            } else {
                float part[S::lanes] = {};
                std::copy_n(from, present, part);
                v[i] = S::load(part);
            }
        }
        S::transpose(v);
    }

    static FUSE_INLINE void store(float* out, std::ptrdiff_t h, std::ptrdiff_t w,
                                  std::ptrdiff_t y0, std::ptrdiff_t x0, F (&v)[S::lanes]) {
        S::transpose(v);
        const std::ptrdiff_t present = std::min(lanes, w - x0);
        FUSE_UNROLL
        for (int i = 0; i < S::lanes; ++i) {
            float* to = out + (y0 + i) * w + x0;
            if (y0 + i >= h) continue;
            if (present == lanes) {
                S::store(to, v[i]);
            } else {
                float part[S::lanes];
                S::store(part, v[i]);
                std::copy_n(part, present, to);
            }
        }
    }

    // The same for one part (0 or 1) of a block of the half spectrum; rows outside stay away.
    static FUSE_INLINE void load_block(const float* block, std::ptrdiff_t h, std::ptrdiff_t y0,
                                       int part, F (&v)[S::lanes]) {
        FUSE_UNROLL
        for (int i = 0; i < S::lanes; ++i) {
            v[i] = y0 + i < h ? S::load(block + (y0 + i) * size + part * lanes) : S::splat(0.0f);
        }
        S::transpose(v);
    }

    static FUSE_INLINE void store_block(float* block, std::ptrdiff_t h, std::ptrdiff_t y0, int part,
                                        F (&v)[S::lanes]) {
        S::transpose(v);
        FUSE_UNROLL
        for (int i = 0; i < S::lanes; ++i) {
            if (y0 + i < h) S::store(block + (y0 + i) * size + part * lanes, v[i]);
        }
    }
};

// Rows [begin, end) in units of two vectors: lane l is row l of the first and of the second.
struct WienerRows {
    template <class Level>
    static FUSE_INLINE void run(const Wiener* a, std::ptrdiff_t begin, std::ptrdiff_t end) {
        using T = WienerTile<Level>;
        using S = typename T::S;
        using F = typename T::F;
        constexpr std::ptrdiff_t lanes = T::lanes, size = T::size;
        const std::ptrdiff_t h = a->h, w = a->w;
        const std::ptrdiff_t padded = (w + lanes - 1) / lanes * lanes;
        const Scratch source(padded * size), scratch(w * size), result(w * size),
            work(a->rows->work() * size);
        for (std::ptrdiff_t y0 = begin * size; y0 < std::min(h, end * size); y0 += size) {
            for (std::ptrdiff_t x0 = 0; x0 < w; x0 += lanes) {
                F first[S::lanes], second[S::lanes];
                T::load(a->x, h, w, y0, x0, first);
                T::load(a->x, h, w, y0 + lanes, x0, second);
                FUSE_UNROLL
                for (int i = 0; i < S::lanes; ++i) {
                    S::store(source.data() + (x0 + i) * size, first[i]);
                    S::store(source.data() + (x0 + i) * size + lanes, second[i]);
                }
            }
            fft<S>(*a->rows, source.data(), scratch.data(), result.data(), work.data());
            for (std::ptrdiff_t k0 = 0; k0 < a->half; k0 += lanes) {
                float* block = a->blocks + k0 / lanes * h * size;
                for (int part = 0; part < 2; ++part) {
                    F first[S::lanes], second[S::lanes];
                    FUSE_UNROLL
                    for (int i = 0; i < S::lanes; ++i) {
                        // Columns past the half are transformed for nothing; any number will do.
                        const std::ptrdiff_t k = std::min(k0 + i, a->half - 1);
                        const std::ptrdiff_t mirror = k == 0 ? 0 : w - k;
                        const auto z = T::C::load(result.data() + k * size);
                        const auto m = T::C::load(result.data() + mirror * size);
                        // Twice A and B; the half is in the filter.
                        first[i] = part == 0 ? z.re + m.re : z.im - m.im;
                        second[i] = part == 0 ? z.im + m.im : m.re - z.re;
                    }
                    T::store_block(block, h, y0, part, first);
                    T::store_block(block, h, y0 + lanes, part, second);
                }
            }
        }
    }
};

// Blocks [begin, end) of columns: transform, filter, transform back.
struct WienerColumns {
    template <class Level>
    static FUSE_INLINE void run(const Wiener* a, std::ptrdiff_t begin, std::ptrdiff_t end) {
        using T = WienerTile<Level>;
        using S = typename T::S;
        using F = typename T::F;
        constexpr std::ptrdiff_t lanes = T::lanes, size = T::size;
        const std::ptrdiff_t h = a->h;
        const Scratch scratch(h * size), result(h * size), work(a->columns->work() * size);
        const float scale = 0.5f / static_cast<float>(static_cast<double>(h) *
                                                      static_cast<double>(a->w));
        const std::ptrdiff_t pair = a->complex_spectrum ? 2 : 1;
        for (std::ptrdiff_t b = begin; b < end; ++b) {
            float* block = a->blocks + b * h * size;
            fft<S>(*a->columns, block, scratch.data(), result.data(), work.data());
            const std::ptrdiff_t present = std::min(lanes, a->half - b * lanes);
            for (std::ptrdiff_t y = 0; y < h; ++y) {
                const float* g = a->spectrum + (y * a->half + b * lanes) * pair;
                float part[2 * S::lanes] = {};
                if (present < lanes) {
                    std::copy_n(g, present * pair, part);
                    g = part;
                }
                const auto z = T::C::load(result.data() + y * size);
                F re = z.re, im = z.im;
                if (a->complex_spectrum) {
                    const F low = S::load(g), high = S::load(g + lanes);
                    const F gr = S::even(low, high) * scale, gi = S::odd(low, high) * scale;
                    re = z.re * gr - z.im * gi;
                    im = z.re * gi + z.im * gr;
                } else {
                    const F gr = S::load(g) * scale;
                    re = z.re * gr;
                    im = z.im * gr;
                }
                S::store(result.data() + y * size, im);
                S::store(result.data() + y * size + lanes, re);
            }
            fft<S>(*a->columns, result.data(), scratch.data(), block, work.data());
        }
    }
};

// Rows back, in the same units.
struct WienerRowsBack {
    template <class Level>
    static FUSE_INLINE void run(const Wiener* a, std::ptrdiff_t begin, std::ptrdiff_t end) {
        using T = WienerTile<Level>;
        using S = typename T::S;
        using F = typename T::F;
        constexpr std::ptrdiff_t lanes = T::lanes, size = T::size;
        const std::ptrdiff_t h = a->h, w = a->w;
        const std::ptrdiff_t padded = (w + lanes - 1) / lanes * lanes;
        const Scratch source(w * size), scratch(w * size), result(padded * size),
            work(a->rows->work() * size);
        std::fill_n(result.data(), padded * size, 0.0f);
        for (std::ptrdiff_t y0 = begin * size; y0 < std::min(h, end * size); y0 += size) {
            for (std::ptrdiff_t k0 = 0; k0 < a->half; k0 += lanes) {
                const float* block = a->blocks + k0 / lanes * h * size;
                // Parts are exchanged: 1 is the real one. First and second row: A and B.
                F are[S::lanes], aim[S::lanes], bre[S::lanes], bim[S::lanes];
                T::load_block(block, h, y0, 1, are);
                T::load_block(block, h, y0, 0, aim);
                T::load_block(block, h, y0 + lanes, 1, bre);
                T::load_block(block, h, y0 + lanes, 0, bim);
                const std::ptrdiff_t present = std::min(lanes, a->half - k0);
                for (std::ptrdiff_t i = 0; i < present; ++i) {
                    const std::ptrdiff_t k = k0 + i;
                    float* to = source.data() + k * size;
                    if (k == 0 || 2 * k == w) {
                        S::store(to, bre[i]);
                        S::store(to + lanes, are[i]);
                        continue;
                    }
                    S::store(to, aim[i] + bre[i]);
                    S::store(to + lanes, are[i] - bim[i]);
                    float* mirror = source.data() + (w - k) * size;
                    S::store(mirror, bre[i] - aim[i]);
                    S::store(mirror + lanes, are[i] + bim[i]);
                }
            }
            fft<S>(*a->rows, source.data(), scratch.data(), result.data(), work.data());
            for (std::ptrdiff_t x0 = 0; x0 < w; x0 += lanes) {
                F first[S::lanes], second[S::lanes];
                FUSE_UNROLL
                for (int i = 0; i < S::lanes; ++i) {
                    first[i] = S::load(result.data() + (x0 + i) * size + lanes);
                    second[i] = S::load(result.data() + (x0 + i) * size);
                }
                T::store(a->out, h, w, y0, x0, first);
                T::store(a->out, h, w, y0 + lanes, x0, second);
            }
        }
    }
};

struct WienerLanes {
    template <class Level>
    static FUSE_INLINE void run(std::ptrdiff_t* lanes) {
        *lanes = Level::Simd::lanes;
    }
};

// Memory besides the arguments: the half spectrum of one picture and, per thread, a few dozen rows
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
    const Scratch blocks(columns * lanes * 2 * a.h);
    a.blocks = blocks.data();
    for (std::ptrdiff_t n = 0; n < pictures; ++n) {
        parallel_for(rows, 1, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
            dispatch<WienerRows>(level, &a, begin, end);
        });
        parallel_for(columns, 1, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
            dispatch<WienerColumns>(level, &a, begin, end);
        });
        parallel_for(rows, 1, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
            dispatch<WienerRowsBack>(level, &a, begin, end);
        });
        a.x += a.h * a.w;
        a.out += a.h * a.w;
    }
}

}  // namespace fuse
