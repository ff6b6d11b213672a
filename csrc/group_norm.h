// Group normalisation (Wu and He, ECCV 2018), a shift per channel and SiLU, in float32.
//
//   y = (x - mean) / sqrt(var + eps) * weight + bias + shift,  out = y / (1 + e^-y)
//
// Mean and variance of a group: sums of squared deviations from the mean of blocks that lie in the
// first-level cache, blocks merged in their order (Chan, Golub and LeVeque 1983). Blocks do not
// depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "storage.h"

namespace fuse {

constexpr std::ptrdiff_t kNormBlock = 4096;  // numbers: 16 KB

struct Moments {
    double count = 0, mean = 0, m2 = 0;  // m2: sum of squared deviations

    void merge(const Moments& other) {
        const double n = count + other.count, delta = other.mean - mean;
        mean += delta * (other.count / n);
        m2 += other.m2 + delta * delta * (count * other.count / n);
        count = n;
    }
};

// n >= 1 numbers, at most kNormBlock.
struct BlockMoments {
    template <class Level>
    static FUSE_INLINE void run(const float* x, std::ptrdiff_t n, Moments* to) {
        using S = typename Level::Simd;
        using F = typename S::F;
        constexpr std::ptrdiff_t step = 4 * S::lanes;
        const std::ptrdiff_t whole = n - n % step;
        const float zero = 0.0f;

        F sum[4] = {S::splat(zero), S::splat(zero), S::splat(zero), S::splat(zero)};
        for (std::ptrdiff_t i = 0; i < whole; i += step) {
            FUSE_UNROLL
            for (int u = 0; u < 4; ++u) sum[u] += S::load(x + i + u * S::lanes);
        }
        double all = lanes_sum<S>((sum[0] + sum[1]) + (sum[2] + sum[3]));
        for (std::ptrdiff_t i = whole; i < n; ++i) all += x[i];
        // Near the mean is near enough: what is left of it is in `rest`.
        const auto centre = static_cast<float>(all / static_cast<double>(n));

        F rest[4] = {S::splat(zero), S::splat(zero), S::splat(zero), S::splat(zero)};
        F square[4] = {S::splat(zero), S::splat(zero), S::splat(zero), S::splat(zero)};
        for (std::ptrdiff_t i = 0; i < whole; i += step) {
            FUSE_UNROLL
            for (int u = 0; u < 4; ++u) {
                const F d = S::load(x + i + u * S::lanes) - centre;
                rest[u] += d;
                square[u] += d * d;
            }
        }
        double d_sum = lanes_sum<S>((rest[0] + rest[1]) + (rest[2] + rest[3]));
        double d_square = lanes_sum<S>((square[0] + square[1]) + (square[2] + square[3]));
        for (std::ptrdiff_t i = whole; i < n; ++i) {
            const double d = static_cast<double>(x[i] - centre);
            d_sum += d;
            d_square += d * d;
        }
        const auto count = static_cast<double>(n);
        *to = {count, centre + d_sum / count, d_square - d_sum * d_sum / count};
    }

private:
    template <class S>
    static FUSE_INLINE double lanes_sum(typename S::F v) {
        double sum = 0.0;
        for (int i = 0; i < S::lanes; ++i) sum += S::get(v, i);
        return sum;
    }
};

// out = silu((x - mean) * scale + bias), or without SiLU. out may be x itself.
template <bool silu>
struct NormApply {
    template <class Level>
    static FUSE_INLINE void run(const float* x, float* out, std::ptrdiff_t n, float mean,
                                float scale, float bias) {
        using S = typename Level::Simd;
        std::ptrdiff_t i = 0;
        for (; i + 2 * S::lanes <= n; i += 2 * S::lanes) {
            const auto a = value<S>(S::load(x + i), mean, scale, bias);
            const auto b = value<S>(S::load(x + i + S::lanes), mean, scale, bias);
            S::store(out + i, a);
            S::store(out + i + S::lanes, b);
        }
        for (; i < n; i += S::lanes) {
            const std::ptrdiff_t left = std::min<std::ptrdiff_t>(S::lanes, n - i);
            float tail[S::lanes] = {};
            std::copy_n(x + i, left, tail);
            S::store(tail, value<S>(S::load(tail), mean, scale, bias));
            std::copy_n(tail, left, out + i);
        }
    }

private:
    template <class S>
    static FUSE_INLINE typename S::F value(typename S::F x, float mean, float scale, float bias) {
        const auto y = (x - mean) * scale + bias;
        if constexpr (silu) return y / (S::exp(-y) + 1.0f);
        else return y;
    }
};

// x, out: (n, c, pixels); weight, bias: (c); shift: null or shift_stride numbers between pictures.
struct GroupNorm {
    Numbers x;
    const float *weight, *bias, *shift;
    Results out;
    std::ptrdiff_t n, c, pixels, groups, shift_stride;
    double eps;
    bool silu;
};

// Memory besides the arguments: three numbers per 4096, and per group.
inline void group_norm_silu(const GroupNorm& a) {
    const SimdLevel level = simd_level();
    const std::ptrdiff_t per_group = a.c / a.groups, length = per_group * a.pixels;
    const std::ptrdiff_t blocks = (length + kNormBlock - 1) / kNormBlock;
    const std::ptrdiff_t all = a.n * a.groups;
    // Groups at a time: what a last-level cache holds from one reading to the next.
    const std::ptrdiff_t batch = std::max<std::ptrdiff_t>(1, (std::ptrdiff_t{1} << 20) / length);
    std::vector<Moments> parts(static_cast<std::size_t>(std::min(batch, all) * blocks));
    std::vector<Moments> moments(static_cast<std::size_t>(std::min(batch, all)));
    for (std::ptrdiff_t g0 = 0; g0 < all; g0 += batch) {
        const std::ptrdiff_t count = std::min(batch, all - g0);
        parallel_for(count * blocks, 4, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
            float room[kNormBlock];
            for (std::ptrdiff_t i = begin; i < end; ++i) {
                const std::ptrdiff_t first = i % blocks * kNormBlock;
                const std::ptrdiff_t n = std::min(kNormBlock, length - first);
                const float* x = a.x.read((g0 + i / blocks) * length + first, n, room);
                dispatch<BlockMoments>(level, x, n, &parts[i]);
            }
        });
        for (std::ptrdiff_t g = 0; g < count; ++g) {
            Moments sum = parts[g * blocks];
            for (std::ptrdiff_t b = 1; b < blocks; ++b) sum.merge(parts[g * blocks + b]);
            moments[g] = sum;
        }
        parallel_for(count * length, 4 * kNormBlock, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
            for_each_plane(begin, end, a.pixels, [&](std::ptrdiff_t plane, std::ptrdiff_t first,
                                                     std::ptrdiff_t m) {
                const Moments& s = moments[plane / per_group];
                const std::ptrdiff_t here = g0 * per_group + plane, channel = here % a.c;
                const double scale = a.weight[channel] / std::sqrt(s.m2 / s.count + a.eps);
                // What float32 cannot hold of the mean goes into the constant.
                const auto mean = static_cast<float>(s.mean);
                double constant = a.bias[channel] - (s.mean - mean) * scale;
                if (a.shift != nullptr) constant += a.shift[here / a.c * a.shift_stride + channel];
                const std::ptrdiff_t at = here * a.pixels + first;
                const auto f = static_cast<float>(scale), b = static_cast<float>(constant);
                float room[kStorageBlock];
                for_each_block(a.x.storage, at, at + m, [&](std::ptrdiff_t i, std::ptrdiff_t n) {
                    const float* x = a.x.read(i, n, room);
                    float* to = a.out.place(i, room);
                    if (a.silu) dispatch<NormApply<true>>(level, x, to, n, mean, f, b);
                    else dispatch<NormApply<false>>(level, x, to, n, mean, f, b);
                    a.out.keep(i, n, to);
                });
            });
        });
    }
}

}  // namespace fuse
