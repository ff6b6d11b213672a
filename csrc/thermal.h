// What thermal frames need before they are pictures: histograms and tables for gain control, local
// histograms (CLAHE), and the column offsets of uncooled sensors. 8- and 16-bit counts, (H, W), rows
// with a stride in bytes. Every result is the same whatever the number of threads: counts are
// integers, and sums are made in an order that the picture's size alone decides.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "frames.h"  // Image, clip, rows_per_range
#include "parallel.h"
#include "platform.h"

namespace fuse {

template <class T>
inline constexpr std::ptrdiff_t kCounts = std::ptrdiff_t{1} << (8 * sizeof(T));

// --- one histogram, one table -----------------------------------------------------------------

// counts[v] += how often v occurs in rows [begin, end). Four counters per value, one after the
// other in turns: neighbouring pixels are often equal, and an increment waits for the one before.
template <class T>
void count_rows(Image<const T> x, std::ptrdiff_t begin, std::ptrdiff_t end, std::uint32_t* counts) {
    constexpr std::ptrdiff_t kTurns = sizeof(T) == 1 ? 4 : 1;  // 16-bit counters fill the cache
    std::vector<std::uint32_t> turns(kTurns * kCounts<T>);
    for (std::ptrdiff_t y = begin; y < end; ++y) {
        const T* row = x.row(y);
        std::ptrdiff_t i = 0;
        for (; i + kTurns <= x.width; i += kTurns) {
            for (std::ptrdiff_t k = 0; k < kTurns; ++k) ++turns[k * kCounts<T> + row[i + k]];
        }
        for (; i < x.width; ++i) ++turns[row[i]];
    }
    for (std::ptrdiff_t k = 0; k < kTurns; ++k) {
        for (std::ptrdiff_t v = 0; v < kCounts<T>; ++v) counts[v] += turns[k * kCounts<T> + v];
    }
}

// counts: kCounts<T> numbers, set here.
template <class T>
void histogram(Image<const T> x, std::uint32_t* counts) {
    std::fill_n(counts, kCounts<T>, 0u);
    std::mutex mutex;
    // Few ranges: each has a histogram of its own to add up.
    const std::ptrdiff_t grain = std::max<std::ptrdiff_t>(rows_per_range(x.width) * 8, 1);
    parallel_for(x.height, grain, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        std::vector<std::uint32_t> part(kCounts<T>);
        count_rows(x, begin, end, part.data());
        const std::lock_guard lock(mutex);
        for (std::ptrdiff_t v = 0; v < kCounts<T>; ++v) counts[v] += part[v];
    });
}

// out = table[x].
template <class T, class Out>
void look_up(Image<const T> x, const Out* table, Image<Out> out) {
    parallel_for(x.height, rows_per_range(x.width), [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for (std::ptrdiff_t y = begin; y < end; ++y) {
            const T* from = x.row(y);
            Out* to = out.row(y);
            for (std::ptrdiff_t i = 0; i < x.width; ++i) to[i] = table[from[i]];
        }
    });
}

// --- contrast-limited adaptive histogram equalisation -------------------------------------------
//
// Zuiderveld, "Contrast Limited Adaptive Histogram Equalization", Graphics Gems IV (1994): a
// histogram per tile, cut at a limit and what was cut spread evenly, its running sum as the tile's
// table; a pixel takes the tables of the four nearest tiles' centres, bilinearly. Counts go through
// `bins` (table from count to bin) first: a tile has too few pixels for 65536 of them.

struct Tiles {
    std::ptrdiff_t rows, columns, bins;
    double limit;  // times the mean of a tile's histogram; at least 1
};

template <class T>
void tile_tables(Image<const T> x, const std::uint16_t* bins, Tiles tiles, float* tables) {
    parallel_for(tiles.rows * tiles.columns, 1, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        std::vector<double> counts(tiles.bins);
        for (std::ptrdiff_t tile = begin; tile < end; ++tile) {
            const std::ptrdiff_t ty = tile / tiles.columns, tx = tile % tiles.columns;
            const std::ptrdiff_t top = ty * x.height / tiles.rows;
            const std::ptrdiff_t bottom = (ty + 1) * x.height / tiles.rows;
            const std::ptrdiff_t left = tx * x.width / tiles.columns;
            const std::ptrdiff_t right = (tx + 1) * x.width / tiles.columns;
            std::fill(counts.begin(), counts.end(), 0.0);
            for (std::ptrdiff_t y = top; y < bottom; ++y) {
                const T* row = x.row(y);
                for (std::ptrdiff_t i = left; i < right; ++i) counts[bins[row[i]]] += 1.0;
            }
            const auto pixels = static_cast<double>((bottom - top) * (right - left));
            const double most = tiles.limit * pixels / static_cast<double>(tiles.bins);
            double cut = 0.0;
            for (double& count : counts) {
                cut += std::max(0.0, count - most);
                count = std::min(count, most);
            }
            // The middle of a bin's own share: a flat tile stays where it is.
            const double spread = cut / static_cast<double>(tiles.bins);
            double below = 0.0;
            float* table = tables + tile * tiles.bins;
            for (std::ptrdiff_t b = 0; b < tiles.bins; ++b) {
                const double share = counts[b] + spread;
                table[b] = static_cast<float>((below + 0.5 * share) / pixels);
                below += share;
            }
        }
    });
}

// Two tiles' centres around a place and the second one's weight.
struct Between {
    std::ptrdiff_t first, second;
    float weight;

    Between(std::ptrdiff_t i, std::ptrdiff_t size, std::ptrdiff_t tiles) {
        const float place = (static_cast<float>(i) + 0.5f) * static_cast<float>(tiles) /
                                static_cast<float>(size) -
                            0.5f;
        const float at = clip(place, 0.0f, static_cast<float>(tiles - 1));
        first = static_cast<std::ptrdiff_t>(at);
        second = std::min(first + 1, tiles - 1);
        weight = at - static_cast<float>(first);
    }
};

// out: (H, W) in [0, 1].
template <class T>
void equalise_locally(Image<const T> x, const std::uint16_t* bins, Tiles tiles, Image<float> out) {
    std::vector<float> tables(tiles.rows * tiles.columns * tiles.bins);
    tile_tables(x, bins, tiles, tables.data());
    std::vector<Between> columns;
    columns.reserve(x.width);
    for (std::ptrdiff_t i = 0; i < x.width; ++i) columns.emplace_back(i, x.width, tiles.columns);
    parallel_for(x.height, rows_per_range(4 * x.width), [&](std::ptrdiff_t begin,
                                                            std::ptrdiff_t end) {
        for (std::ptrdiff_t y = begin; y < end; ++y) {
            const Between rows(y, x.height, tiles.rows);
            const float* upper = tables.data() + rows.first * tiles.columns * tiles.bins;
            const float* lower = tables.data() + rows.second * tiles.columns * tiles.bins;
            const T* from = x.row(y);
            float* to = out.row(y);
            for (std::ptrdiff_t i = 0; i < x.width; ++i) {
                const Between& at = columns[i];
                const std::ptrdiff_t bin = bins[from[i]];
                const std::ptrdiff_t l = at.first * tiles.bins + bin;
                const std::ptrdiff_t r = at.second * tiles.bins + bin;
                const float above = upper[l] + at.weight * (upper[r] - upper[l]);
                const float below = lower[l] + at.weight * (lower[r] - lower[l]);
                to[i] = above + rows.weight * (below - above);
            }
        }
    });
}

// --- column noise --------------------------------------------------------------------------------

// offsets[i] = mean over rows of clip(x[y, i] - m[y, i], -most, most), with m the mean of the 2 radius
// + 1 pixels around it in its row (fewer at the border). An edge of the scene is a large difference
// in some rows and counts no more than `most` there; an offset of the sensor is small and in all.
// sum[i] += clip(row[i] - around[i] * share[i], -most, most).
template <class T>
FUSE_CLONES void add_differences(const T* FUSE_RESTRICT row, const double* FUSE_RESTRICT around,
                                 const double* FUSE_RESTRICT share, std::ptrdiff_t n, double most,
                                 double* FUSE_RESTRICT sum) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const double d = static_cast<double>(row[i]) - around[i] * share[i];
        sum[i] += clip(d, -most, most);
    }
}

template <class T>
void column_offsets(Image<const T> x, std::ptrdiff_t radius, double most, double* offsets) {
    constexpr std::ptrdiff_t kRows = 32;  // per partial sum: independent of the threads
    const std::ptrdiff_t parts = (x.height + kRows - 1) / kRows;
    std::vector<double> sums(parts * x.width), share(x.width);
    for (std::ptrdiff_t i = 0; i < x.width; ++i) {
        const std::ptrdiff_t low = std::max<std::ptrdiff_t>(0, i - radius);
        share[i] = 1.0 / static_cast<double>(std::min(x.width, i + radius + 1) - low);
    }
    parallel_for(parts, 1, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        std::vector<double> around(x.width);  // whole numbers: their sums are exact
        for (std::ptrdiff_t part = begin; part < end; ++part) {
            for (std::ptrdiff_t y = part * kRows; y < std::min(x.height, (part + 1) * kRows); ++y) {
                const T* row = x.row(y);
                std::int64_t running = 0;
                for (std::ptrdiff_t i = 0; i < std::min(x.width, radius); ++i) running += row[i];
                for (std::ptrdiff_t i = 0; i < x.width; ++i) {
                    if (i + radius < x.width) running += row[i + radius];
                    if (i > radius) running -= row[i - radius - 1];
                    around[i] = static_cast<double>(running);
                }
                add_differences(row, around.data(), share.data(), x.width, most,
                                sums.data() + part * x.width);
            }
        }
    });
    for (std::ptrdiff_t i = 0; i < x.width; ++i) {
        double total = 0.0;
        for (std::ptrdiff_t part = 0; part < parts; ++part) total += sums[part * x.width + i];
        offsets[i] = total / static_cast<double>(x.height);
    }
}

// out = x - offsets, rounded to nearest and clipped to T; out may be x.
template <class T>
FUSE_CLONES void subtract_row(const T* from, const float* FUSE_RESTRICT offsets, std::ptrdiff_t n,
                              T* to) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        to[i] = quantise<T>(static_cast<float>(from[i]) - offsets[i]);
    }
}

template <class T>
void subtract_columns(Image<const T> x, const float* offsets, Image<T> out) {
    parallel_for(x.height, rows_per_range(x.width), [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for (std::ptrdiff_t y = begin; y < end; ++y) {
            subtract_row(x.row(y), offsets, x.width, out.row(y));
        }
    });
}

}  // namespace fuse
