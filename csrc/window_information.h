// Feature mutual information (Haghighat and Razian 2014) of the 3 x 3 windows of two maps, float64.
//
// The nine values of a window, column by column, minus their smallest and over their sum, are a
// density over the places 1..9: p of one map, q of the other, P and Q cumulated. Their joint density
// is a mixture: w times the strongest dependence there can be (Frechet), which puts into cell (i, j)
// the overlap of the intervals that Q_i and P_j end, and 1 - w times the product q_i p_j. w is the
// windows' correlation over that of the strongest dependence; a negative correlation is a positive
// one with the places of one window counted backwards.
//
// At most 17 cells overlap: merging P and Q gives their ends in order. For these the joint entropy
// needs logarithms, for the others it is a closed form. The merge is a sorting network, so windows
// ride side by side in vectors; without contraction, bits are the same on every processor.
#pragma once

#include <algorithm>
#include <cstddef>

#include "doubles.h"
#include "parallel.h"
#include "simd.h"

namespace fuse {

constexpr int kPlaces = 9;
constexpr double kLeast = 1e-300;  // its logarithm is finite

// One window of a map per lane.
template <class D>
struct Densities {
    using F = typename D::F;
    F p[kPlaces], log_p[kPlaces];
    F sum, spread;  // 9 means and 81 variances of the values
    F entropy;
    F place, variance;  // expected place, variance of the place

    // The upper left value of the first window, numbers between rows.
    static FUSE_INLINE void load(const double* from, std::ptrdiff_t stride, Densities& d) {
        const F zero = D::splat(0.0);
        F least = D::load(from), squares = zero, total = zero;
        d.sum = zero;
        for (int k = 0; k < kPlaces; ++k) {
            const F v = D::load(from + k % 3 * stride + k / 3);
            d.p[k] = v;
            least = D::select(v < least, v, least);
            d.sum += v;
            squares += v * v;
        }
        d.spread = 9.0 * squares - d.sum * d.sum;
        for (int k = 0; k < kPlaces; ++k) {
            d.p[k] = d.p[k] - least;
            total += d.p[k];
        }
        const auto constant = total == zero;
        total = D::select(constant, D::splat(9.0), total);
        d.entropy = d.place = d.variance = zero;
        for (int k = 0; k < kPlaces; ++k) {
            const double at = k + 1;
            const F p = D::select(constant, D::splat(1.0), d.p[k]) / total;
            d.p[k] = p;
            d.place += at * p;
            d.variance += at * at * p;
            d.log_p[k] = D::log(D::at_least(p, D::splat(kLeast)));
            d.entropy -= p * d.log_p[k];
        }
        d.variance -= d.place * d.place;
    }
};

// Ends of intervals in ascending order, from 1 on, each with the density of the interval that it
// ends. Number 0 is where the first interval begins.
template <class D>
struct Ends {
    using F = typename D::F;
    // q is stored as -1 - q, which tells it from p.
    F at[17], density[17], log[17];

    // The k-th end of P or Q, from 0 on. Equal ends of one of them must keep their order, which the
    // network does not promise: its place goes into the last bits, of numbers from 1 to 2.
    static FUSE_INLINE F position(F cumulated, int k) {
        const auto bits = D::bits(cumulated + 1.0) & ~std::uint64_t{7};
        return D::from_bits(bits | static_cast<std::uint64_t>(k));
    }

    static FUSE_INLINE void order(Ends& e, int a, int b) {
        const F x = e.at[a], d = e.density[a], f = e.log[a];
        const F y = e.at[b], c = e.density[b], g = e.log[b];
        const auto swap = y < x;
        e.at[a] = D::select(swap, y, x);
        e.at[b] = D::select(swap, x, y);
        e.density[a] = D::select(swap, c, d);
        e.density[b] = D::select(swap, d, c);
        e.log[a] = D::select(swap, g, f);
        e.log[b] = D::select(swap, f, g);
    }

    // Batcher's odd-even merge of the ordered halves 1..8 and 9..16.
    static FUSE_INLINE void merge(Ends& e) {
        for (int a = 1; a <= 8; ++a) order(e, a, a + 8);
        for (int gap = 4; gap >= 1; gap /= 2) {
            for (int first = gap; first + gap < 16; first += 2 * gap) {
                for (int a = first + 1; a <= first + gap; ++a) order(e, a, a + gap);
            }
        }
    }
};

// The cells that overlap, in order, with q_i p_j and its logarithm.
template <class D>
struct Cells {
    using F = typename D::F;
    using Mask = typename D::Mask;
    F length[17], product[17], log[17];
    F covariance;  // of the places under the strongest dependence

    // x, its places counted backwards where reversed, and f.
    static FUSE_INLINE void overlap(const Densities<D>& x, Mask reversed, const Densities<D>& f,
                                    Cells& cells) {
        Ends<D> ends;
        ends.at[0] = D::splat(1.0);
        ends.density[0] = ends.log[0] = D::splat(0.0);
        F p = D::splat(0.0), q = p, log_p = p, log_q = p, up_to_p = p, up_to_q = p;
        for (int k = 0; k < kPlaces; ++k) {
            p = D::select(reversed, x.p[8 - k], x.p[k]);
            log_p = D::select(reversed, x.log_p[8 - k], x.log_p[k]);
            q = f.p[k];
            log_q = f.log_p[k];
            if (k == 8) break;  // the last intervals end at 1; the walk back begins with them
            up_to_p += p;
            up_to_q += q;
            ends.at[k + 1] = Ends<D>::position(up_to_p, k);
            ends.density[k + 1] = p;
            ends.log[k + 1] = log_p;
            ends.at[k + 9] = Ends<D>::position(up_to_q, k);
            ends.density[k + 9] = -1.0 - q;
            ends.log[k + 9] = log_q;
        }
        Ends<D>::merge(ends);

        const F one = D::splat(1.0), zero = D::splat(0.0);
        F row = D::splat(9.0), column = row, end = D::splat(2.0), expected = zero;
        for (int k = 16; k >= 0; --k) {
            const F start = ends.at[k], density = ends.density[k], log = ends.log[k];
            cells.length[k] = end - start;
            cells.product[k] = q * p;
            cells.log[k] = log_q + log_p;
            expected += cells.length[k] * row * column;
            // Before this end lies the interval that it ends.
            const auto of_q = density < zero;
            q = D::select(of_q, -1.0 - density, q);
            p = D::select(of_q, p, density);
            log_q = D::select(of_q, log, log_q);
            log_p = D::select(of_q, log_p, log);
            row -= D::select(of_q, one, zero);
            column -= D::select(of_q, zero, one);
            end = start;
        }
        cells.covariance = expected - D::select(reversed, 10.0 - x.place, x.place) * f.place;
    }
};

// One row of windows: x and f at their upper row, out (width - 2).
struct WindowInformation {
    template <class Level>
    static FUSE_INLINE void run(const double* x, const double* f, std::ptrdiff_t width,
                                double* out) {
        using D = Doubles<Level::Simd::lanes / 2>;
        constexpr std::ptrdiff_t lanes = D::lanes, columns = lanes + 2;
        std::ptrdiff_t first = 0;
        for (; first + columns <= width; first += lanes) {
            D::store(out + first, values<D>(x + first, f + first, width));
        }
        const std::ptrdiff_t left = width - 2 - first;
        if (left <= 0) return;
        double part[2][3 * columns] = {}, tail[lanes];
        for (int r = 0; r < 3; ++r) {
            std::copy_n(x + r * width + first, left + 2, part[0] + r * columns);
            std::copy_n(f + r * width + first, left + 2, part[1] + r * columns);
        }
        D::store(tail, values<D>(part[0], part[1], columns));
        std::copy_n(tail, left, out + first);
    }

private:
    // 2 I / (H + H) of each pair of windows: 1 for identical and for two constant windows; 0 where
    // the correlation is 0 or all of one window lies in one place.
    template <class D>
    static FUSE_INLINE typename D::F values(const double* x_from, const double* f_from,
                                            std::ptrdiff_t stride) {
        using F = typename D::F;
        const F zero = D::splat(0.0), one = D::splat(1.0), least = D::splat(kLeast);
        F covariance = zero;
        auto same = zero == zero;
        for (int k = 0; k < kPlaces; ++k) {
            const std::ptrdiff_t at = k % 3 * stride + k / 3;
            const F v = D::load(x_from + at), w = D::load(f_from + at);
            covariance += v * w;
            same = same & (v == w);
        }
        if (D::all(same)) return one;  // most of a map of edges

        Densities<D> x, f;
        Densities<D>::load(x_from, stride, x);
        Densities<D>::load(f_from, stride, f);
        covariance = 9.0 * covariance - x.sum * f.sum;
        const auto dependent = (covariance != zero) & (x.spread > zero) & (f.spread > zero) &
                               (x.variance > zero) & (f.variance > zero);

        Cells<D> cells;
        Cells<D>::overlap(x, covariance < zero, f, cells);
        const F spreads = D::select(dependent, x.spread * f.spread, one);
        const F variances = D::select(dependent, x.variance * f.variance, zero);
        const F bound = D::select(dependent, cells.covariance, one);
        const F weight = D::magnitude(covariance) * D::root(variances / spreads) / bound;
        const F rest = 1.0 - weight;

        const F log_rest = D::log(D::at_least(D::magnitude(rest), least));
        const F both = x.entropy + f.entropy;
        F entropy = rest * (both - log_rest);
        for (int k = 0; k < 17; ++k) {
            const F independent = rest * cells.product[k];
            const F joint = weight * cells.length[k] + independent;
            entropy += independent * (log_rest + cells.log[k]);
            entropy -= joint * D::log(D::at_least(D::magnitude(joint), least));
        }
        const F value = 2.0 * (both - entropy) / D::select(both > zero, both, one);
        const auto alike = same | ((x.spread == zero) & (f.spread == zero));
        return D::select(alike, one, D::select(dependent, value, zero));
    }
};

// x, f: (height, width), at least 3 each; out: (height - 2, width - 2).
inline void window_information(const double* x, const double* f, std::ptrdiff_t height,
                               std::ptrdiff_t width, double* out) {
    const SimdLevel level = simd_level();
    parallel_for(height - 2, 4, [=](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for (std::ptrdiff_t y = begin; y < end; ++y) {
            dispatch<WindowInformation>(level, x + y * width, f + y * width, width,
                                        out + y * (width - 2));
        }
    });
}

}  // namespace fuse
