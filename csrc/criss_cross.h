// Criss-cross attention (Huang et al., "CCNet: criss-cross attention for semantic segmentation",
// ICCV 2019) in float32, without an attention map:
//
//   out[p] = sum_j softmax_j(q_p . k_j) v_j,  j over the column and the row of p, p itself once.
//
// Softmax with a running maximum and sum (Milakov and Gimelshein 2018; Dao et al., FlashAttention,
// 2022): every pixel carries (peak, total, accumulated values). The column pass writes this
// state, the values into out; the row pass goes on from it and divides. The pixel itself counts in
// the row.
//
// Lanes are queries, two vectors of them; keys are broadcast from packed copies of one line of
// the picture: k as [key][channel], v as [tile of channels][key][channel of the tile]. Scores are
// in base 2: log2(e) rides on q.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace fuse {

// q, k: (cq, h, w); v, out: (c, h, w); peak, total: (h, w). Contiguous.
struct CrissCross {
    const float *q, *k, *v;
    float *out, *peak, *total;
    std::ptrdiff_t cq, c, h, w;
};

// Columns that are packed together: a cache line of every row.
constexpr std::ptrdiff_t kColumns = 16;

template <class Level>
struct CrissCrossTile {
    using S = typename Level::Simd;
    using F = typename S::F;
    static constexpr int queries = 2 * S::lanes;
    // Accumulators: two vectors per channel, leaving registers for two weights and a value.
    static constexpr int channels = Level::registers >= 32 ? 8 : 4;
    static constexpr std::ptrdiff_t keys = 64;  // scores in flight: at most 8 KB
    static constexpr float log2_e = 1.44269504f;

    static std::ptrdiff_t tiles(std::ptrdiff_t c) { return (c + channels - 1) / channels; }

    // Scores of `count` keys against the queries at q (one row of `stride` per channel).
    template <int count>
    static FUSE_INLINE void score(const float* q, std::ptrdiff_t stride, const float* k,
                                  std::ptrdiff_t cq, float* scores, F (&top)[2]) {
        F s[count][2];
        FUSE_UNROLL
        for (int j = 0; j < count; ++j) s[j][0] = s[j][1] = S::splat(0.0f);
        for (std::ptrdiff_t c = 0; c < cq; ++c) {
            const F q0 = S::load(q + c * stride), q1 = S::load(q + c * stride + S::lanes);
            FUSE_UNROLL
            for (int j = 0; j < count; ++j) {
                const float key = k[j * cq + c];
                s[j][0] += q0 * key;
                s[j][1] += q1 * key;
            }
        }
        FUSE_UNROLL
        for (int j = 0; j < count; ++j) {
            S::store(scores + j * queries, s[j][0]);
            S::store(scores + j * queries + S::lanes, s[j][1]);
            top[0] = S::at_least(top[0], s[j][0]);
            top[1] = S::at_least(top[1], s[j][1]);
        }
    }

    // Lets `n` keys act on the state of one tile of queries: q (cq, stride), acc (c, queries).
    // self: which key the first query is, if a query does not attend to itself; else negative.
    static FUSE_INLINE void attend(const float* q, std::ptrdiff_t stride, const float* k,
                                   std::ptrdiff_t cq, const float* v, std::ptrdiff_t c_tiles,
                                   std::ptrdiff_t n, std::ptrdiff_t self, float* scores,
                                   float* acc, float* peak, float* total) {
        F top[2] = {S::load(peak), S::load(peak + S::lanes)};
        F sum[2] = {S::load(total), S::load(total + S::lanes)};
        for (std::ptrdiff_t j0 = 0; j0 < n; j0 += keys) {
            const std::ptrdiff_t m = std::min(keys, n - j0);
            const F before[2] = {top[0], top[1]};
            std::ptrdiff_t j = 0;
            for (; j + 4 <= m; j += 4) {
                score<4>(q, stride, k + (j0 + j) * cq, cq, scores + j * queries, top);
            }
            for (; j < m; ++j) {
                score<1>(q, stride, k + (j0 + j) * cq, cq, scores + j * queries, top);
            }
            // The peak may stand on the pixel itself: it is in the row, and any bound will do.
            if (self >= 0) {
                const std::ptrdiff_t first = std::max(self, j0);
                const std::ptrdiff_t last = std::min(self + queries, j0 + m);
                for (std::ptrdiff_t i = first; i < last; ++i) {
                    scores[(i - j0) * queries + i - self] = -std::numeric_limits<float>::infinity();
                }
            }
            const F shrink[2] = {S::exp2(before[0] - top[0]), S::exp2(before[1] - top[1])};
            sum[0] *= shrink[0];
            sum[1] *= shrink[1];
            for (j = 0; j < m; ++j) {
                float* p = scores + j * queries;
                const F p0 = S::exp2(S::load(p) - top[0]);
                const F p1 = S::exp2(S::load(p + S::lanes) - top[1]);
                sum[0] += p0;
                sum[1] += p1;
                S::store(p, p0);
                S::store(p + S::lanes, p1);
            }
            for (std::ptrdiff_t t = 0; t < c_tiles; ++t) {
                accumulate(scores, v + (t * n + j0) * channels, m, acc + t * channels * queries,
                           shrink);
            }
        }
        S::store(peak, top[0]);
        S::store(peak + S::lanes, top[1]);
        S::store(total, sum[0]);
        S::store(total + S::lanes, sum[1]);
    }

    // acc[c] = acc[c] * shrink + sum_j p_j v_j[c], one tile of channels in registers.
    static FUSE_INLINE void accumulate(const float* p, const float* v, std::ptrdiff_t m, float* acc,
                                       const F (&shrink)[2]) {
        F a[channels][2];
        FUSE_UNROLL
        for (int c = 0; c < channels; ++c) {
            a[c][0] = S::load(acc + c * queries) * shrink[0];
            a[c][1] = S::load(acc + c * queries + S::lanes) * shrink[1];
        }
        for (std::ptrdiff_t j = 0; j < m; ++j) {
            const F p0 = S::load(p + j * queries), p1 = S::load(p + j * queries + S::lanes);
            FUSE_UNROLL
            for (int c = 0; c < channels; ++c) {
                const float value = v[j * channels + c];
                a[c][0] += p0 * value;
                a[c][1] += p1 * value;
            }
        }
        FUSE_UNROLL
        for (int c = 0; c < channels; ++c) {
            S::store(acc + c * queries, a[c][0]);
            S::store(acc + c * queries + S::lanes, a[c][1]);
        }
    }

    // to[key][channel] = from[channel][key], keys `step` apart; the last tile filled with zeros.
    static FUSE_INLINE void pack_values(const float* from, std::ptrdiff_t plane,
                                        std::ptrdiff_t step, std::ptrdiff_t n, std::ptrdiff_t c,
                                        float* to) {
        for (std::ptrdiff_t c0 = 0; c0 < c; c0 += channels, to += n * channels) {
            const std::ptrdiff_t present = std::min<std::ptrdiff_t>(channels, c - c0);
            for (std::ptrdiff_t j = 0; j < n; ++j) {
                for (std::ptrdiff_t i = 0; i < channels; ++i) {
                    to[j * channels + i] =
                        i < present ? from[(c0 + i) * plane + j * step] : 0.0f;
                }
            }
        }
    }
};

// Columns [begin, end) in units of kColumns.
struct CrissCrossColumns {
    template <class Level>
    static FUSE_INLINE void run(const CrissCross* a, std::ptrdiff_t begin, std::ptrdiff_t end) {
        using Tile = CrissCrossTile<Level>;
        constexpr std::ptrdiff_t queries = Tile::queries;
        const std::ptrdiff_t h = a->h, w = a->w, cq = a->cq, plane = h * w;
        const std::ptrdiff_t tiles = Tile::tiles(a->c), c_pad = tiles * Tile::channels;
        const std::ptrdiff_t rows = (h + queries - 1) / queries * queries;
        const std::ptrdiff_t most = std::min(kColumns, w);
        const Scratch q(most * cq * rows), k(most * h * cq), v(most * h * c_pad),
            acc(most * c_pad * queries), state(most * 2 * queries), scores(Tile::keys * queries);
        for (std::ptrdiff_t block = begin; block < end; ++block) {
            const std::ptrdiff_t x0 = block * kColumns, columns = std::min(kColumns, w - x0);
            for (std::ptrdiff_t c = 0; c < cq; ++c) {
                for (std::ptrdiff_t y = 0; y < rows; ++y) {
                    const std::ptrdiff_t at = c * plane + y * w + x0;
                    for (std::ptrdiff_t x = 0; x < columns; ++x) {
                        q.data()[(x * cq + c) * rows + y] =
                            y < h ? a->q[at + x] * Tile::log2_e : 0.0f;
                        if (y < h) k.data()[(x * h + y) * cq + c] = a->k[at + x];
                    }
                }
            }
            for (std::ptrdiff_t x = 0; x < columns; ++x) {
                Tile::pack_values(a->v + x0 + x, plane, w, h, a->c, v.data() + x * h * c_pad);
            }
            for (std::ptrdiff_t y0 = 0; y0 < h; y0 += queries) {
                std::fill_n(acc.data(), columns * c_pad * queries, 0.0f);
                for (std::ptrdiff_t x = 0; x < columns; ++x) {
                    float* peak = state.data() + x * 2 * queries;
                    std::fill_n(peak, queries, -std::numeric_limits<float>::infinity());
                    std::fill_n(peak + queries, queries, 0.0f);
                    Tile::attend(q.data() + x * cq * rows + y0, rows, k.data() + x * h * cq, cq,
                                 v.data() + x * h * c_pad, tiles, h, y0, scores.data(),
                                 acc.data() + x * c_pad * queries, peak, peak + queries);
                }
                const std::ptrdiff_t present = std::min(queries, h - y0);
                for (std::ptrdiff_t c = 0; c < a->c; ++c) {
                    for (std::ptrdiff_t y = 0; y < present; ++y) {
                        float* to = a->out + c * plane + (y0 + y) * w + x0;
                        const float* from = acc.data() + c * queries + y;
                        for (std::ptrdiff_t x = 0; x < columns; ++x) {
                            to[x] = from[x * c_pad * queries];
                        }
                    }
                }
                for (std::ptrdiff_t y = 0; y < present; ++y) {
                    const std::ptrdiff_t at = (y0 + y) * w + x0;
                    for (std::ptrdiff_t x = 0; x < columns; ++x) {
                        a->peak[at + x] = state.data()[x * 2 * queries + y];
                        a->total[at + x] = state.data()[(x * 2 + 1) * queries + y];
                    }
                }
            }
        }
    }
};

// Rows [begin, end), after the columns.
struct CrissCrossRows {
    template <class Level>
    static FUSE_INLINE void run(const CrissCross* a, std::ptrdiff_t begin, std::ptrdiff_t end) {
        using Tile = CrissCrossTile<Level>;
        constexpr std::ptrdiff_t queries = Tile::queries;
        const std::ptrdiff_t w = a->w, cq = a->cq, plane = a->h * w;
        const std::ptrdiff_t tiles = Tile::tiles(a->c), c_pad = tiles * Tile::channels;
        const Scratch q(cq * queries), k(w * cq), v(w * c_pad), acc(c_pad * queries),
            state(2 * queries), scores(Tile::keys * queries);
        std::fill_n(q.data(), cq * queries, 0.0f);
        std::fill_n(acc.data(), c_pad * queries, 0.0f);
        std::fill_n(state.data(), 2 * queries, 0.0f);
        for (std::ptrdiff_t y = begin; y < end; ++y) {
            for (std::ptrdiff_t c = 0; c < cq; ++c) {
                for (std::ptrdiff_t x = 0; x < w; ++x) {
                    k.data()[x * cq + c] = a->k[c * plane + y * w + x];
                }
            }
            Tile::pack_values(a->v + y * w, plane, 1, w, a->c, v.data());
            for (std::ptrdiff_t x0 = 0; x0 < w; x0 += queries) {
                const std::ptrdiff_t present = std::min(queries, w - x0), at = y * w + x0;
                float *peak = state.data(), *total = peak + queries;
                std::copy_n(a->peak + at, present, peak);
                std::copy_n(a->total + at, present, total);
                for (std::ptrdiff_t c = 0; c < cq; ++c) {
                    for (std::ptrdiff_t x = 0; x < present; ++x) {
                        q.data()[c * queries + x] = a->q[c * plane + at + x] * Tile::log2_e;
                    }
                }
                for (std::ptrdiff_t c = 0; c < a->c; ++c) {
                    std::copy_n(a->out + c * plane + at, present, acc.data() + c * queries);
                }
                Tile::attend(q.data(), queries, k.data(), cq, v.data(), tiles, w, -1,
                             scores.data(), acc.data(), peak, total);
                for (std::ptrdiff_t x = 0; x < present; ++x) total[x] = 1.0f / total[x];
                for (std::ptrdiff_t c = 0; c < a->c; ++c) {
                    for (std::ptrdiff_t x = 0; x < present; ++x) {
                        a->out[c * plane + at + x] = acc.data()[c * queries + x] * total[x];
                    }
                }
            }
        }
    }
};

// Memory besides the arguments: two numbers per pixel of one picture and, per thread, packed
// copies of 16 columns.
inline void criss_cross_attention(CrissCross a, std::ptrdiff_t pictures) {
    const SimdLevel level = simd_level();
    const std::ptrdiff_t plane = a.h * a.w;
    const Scratch state(2 * plane);
    a.peak = state.data();
    a.total = state.data() + plane;
    const std::ptrdiff_t blocks = (a.w + kColumns - 1) / kColumns;
    for (std::ptrdiff_t n = 0; n < pictures; ++n) {
        parallel_for(blocks, 1, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
            dispatch<CrissCrossColumns>(level, &a, begin, end);
        });
        parallel_for(a.h, 4, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
            dispatch<CrissCrossRows>(level, &a, begin, end);
        });
        a.q += a.cq * plane;
        a.k += a.cq * plane;
        a.v += a.c * plane;
        a.out += a.c * plane;
    }
}

}  // namespace fuse
