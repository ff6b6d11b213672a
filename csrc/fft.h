// Discrete Fourier transforms of any length, of as many sequences at a time as a vector has lanes.
//
// Element k of a buffer is two vectors: the real and the imaginary parts of sample k of every
// lane's sequence. Forward, no scaling: X[j] = sum_k x[k] e^(-2 pi i jk / n). The inverse is the
// forward transform with real and imaginary parts exchanged before and after.
//
// Stockham's self-sorting algorithm with radices 4, 2, 3, 5 and odd primes up to kLargestRadix
// (Van Loan, "Computational frameworks for the fast Fourier transform", 1992, section 1.7); other
// lengths by Bluestein's, a circular convolution of a length that has small factors.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "simd.h"

namespace fuse {

// Above it a convolution is cheaper than a direct transform of that length.
constexpr int kLargestRadix = 61;

struct FftPlan {
    struct Stage {
        std::ptrdiff_t radix, span, stride;  // span: butterflies with twiddles of their own
        std::ptrdiff_t twiddles;             // [span][radix - 1][2], from here
        std::ptrdiff_t roots;                // [radix][2], for a radix above 5
    };
    std::ptrdiff_t n = 0;
    std::vector<Stage> stages;
    std::vector<float> numbers;

    // Bluestein's only: the convolution's plan, e^(-pi i k^2 / n), and the transform of its
    // conjugate over the convolution's length. Complex numbers in pairs.
    std::shared_ptr<const FftPlan> convolution;
    std::vector<float> chirp, filter;

    // Elements of scratch that fft() needs besides its three buffers.
    std::ptrdiff_t work() const { return convolution ? 3 * convolution->n : 0; }
};

// The plan of a length of at least 1, made once; the last few dozen lengths stay.
std::shared_ptr<const FftPlan> fft_plan(std::ptrdiff_t n);

template <class S>
struct Complex {
    using F = typename S::F;
    F re, im;

    static FUSE_INLINE Complex load(const float* p) { return {S::load(p), S::load(p + S::lanes)}; }
    FUSE_INLINE void store(float* p) const {
        S::store(p, re);
        S::store(p + S::lanes, im);
    }
    FUSE_INLINE Complex operator+(const Complex& b) const { return {re + b.re, im + b.im}; }
    FUSE_INLINE Complex operator-(const Complex& b) const { return {re - b.re, im - b.im}; }
    FUSE_INLINE Complex scaled(float s) const { return {re * s, im * s}; }
    FUSE_INLINE Complex times(float wr, float wi) const {
        return {re * wr - im * wi, re * wi + im * wr};
    }
    FUSE_INLINE Complex times(const Complex& b) const {
        return {re * b.re - im * b.im, re * b.im + im * b.re};
    }
    FUSE_INLINE Complex over_i() const { return {im, S::splat(0.0f) - re}; }
    FUSE_INLINE Complex swapped() const { return {im, re}; }
};

// b[j] = sum_k a[k] e^(-2 pi i jk / radix), in place.
template <class S, int radix>
FUSE_INLINE void butterfly(Complex<S> (&a)[radix]) {
    using C = Complex<S>;
    if constexpr (radix == 2) {
        const C b = a[0] - a[1];
        a[0] = a[0] + a[1];
        a[1] = b;
    } else if constexpr (radix == 3) {
        const C sum = a[1] + a[2], turn = (a[1] - a[2]).scaled(0.866025403784438647f).over_i();
        const C rest = a[0] - sum.scaled(0.5f);
        a[0] = a[0] + sum;
        a[1] = rest + turn;
        a[2] = rest - turn;
    } else if constexpr (radix == 4) {
        const C even = a[0] + a[2], odd = a[1] + a[3];
        const C rest = a[0] - a[2], turn = (a[1] - a[3]).over_i();
        a[0] = even + odd;
        a[1] = rest + turn;
        a[2] = even - odd;
        a[3] = rest - turn;
    } else {
        static_assert(radix == 5);
        constexpr float c1 = 0.309016994374947424f, s1 = 0.951056516295153572f;
        constexpr float c2 = -0.809016994374947424f, s2 = 0.587785252292473129f;
        const C p = a[1] + a[4], q = a[2] + a[3], r = a[1] - a[4], s = a[2] - a[3];
        const C u = a[0] + p.scaled(c1) + q.scaled(c2), v = a[0] + p.scaled(c2) + q.scaled(c1);
        const C x = (r.scaled(s1) + s.scaled(s2)).over_i();
        const C y = (r.scaled(s2) - s.scaled(s1)).over_i();
        a[0] = a[0] + p + q;
        a[1] = u + x;
        a[2] = v + y;
        a[3] = v - y;
        a[4] = u - x;
    }
}

template <class S, int radix>
FUSE_INLINE void fft_stage(const FftPlan& plan, const FftPlan::Stage& stage, const float* from,
                           float* to) {
    constexpr std::ptrdiff_t size = 2 * S::lanes;
    const std::ptrdiff_t m = stage.span, s = stage.stride;
    const float* w = plan.numbers.data() + stage.twiddles;
    for (std::ptrdiff_t p = 0; p < m; ++p, w += 2 * (radix - 1)) {
        for (std::ptrdiff_t q = 0; q < s; ++q) {
            Complex<S> a[radix];
            FUSE_UNROLL
            for (int k = 0; k < radix; ++k) {
                a[k] = Complex<S>::load(from + (q + s * (p + m * k)) * size);
            }
            butterfly<S, radix>(a);
            a[0].store(to + (q + s * radix * p) * size);
            FUSE_UNROLL
            for (int j = 1; j < radix; ++j) {
                a[j].times(w[2 * j - 2], w[2 * j - 1]).store(to + (q + s * (radix * p + j)) * size);
            }
        }
    }
}

// An odd radix: inputs k and radix - k meet the same cosine and opposite sines.
template <class S>
FUSE_INLINE void fft_stage_odd(const FftPlan& plan, const FftPlan::Stage& stage, const float* from,
                               float* to) {
    using C = Complex<S>;
    constexpr std::ptrdiff_t size = 2 * S::lanes;
    const std::ptrdiff_t r = stage.radix, m = stage.span, s = stage.stride;
    const float *w = plan.numbers.data() + stage.twiddles,
                *root = plan.numbers.data() + stage.roots;
    C sum[kLargestRadix / 2 + 1], difference[kLargestRadix / 2 + 1];
    for (std::ptrdiff_t p = 0; p < m; ++p, w += 2 * (r - 1)) {
        for (std::ptrdiff_t q = 0; q < s; ++q) {
            const C first = C::load(from + (q + s * p) * size);
            C all = first;
            for (std::ptrdiff_t k = 1; k <= r / 2; ++k) {
                const C a = C::load(from + (q + s * (p + m * k)) * size);
                const C b = C::load(from + (q + s * (p + m * (r - k))) * size);
                sum[k] = a + b;
                difference[k] = a - b;
                all = all + sum[k];
            }
            all.store(to + (q + s * r * p) * size);
            for (std::ptrdiff_t j = 1; j <= r / 2; ++j) {
                C even = first, odd = {S::splat(0.0f), S::splat(0.0f)};
                std::ptrdiff_t at = 0;
                for (std::ptrdiff_t k = 1; k <= r / 2; ++k) {
                    at += j;
                    if (at >= r) at -= r;
                    even = even + sum[k].scaled(root[2 * at]);
                    odd = odd + difference[k].scaled(root[2 * at + 1]);
                }
                const C turn = odd.over_i();
                const C near = (even - turn).times(w[2 * j - 2], w[2 * j - 1]);
                const C far = (even + turn).times(w[2 * (r - j) - 2], w[2 * (r - j) - 1]);
                near.store(to + (q + s * (r * p + j)) * size);
                far.store(to + (q + s * (r * p + r - j)) * size);
            }
        }
    }
}

template <class S>
FUSE_INLINE void fft_smooth(const FftPlan& plan, float* source, float* scratch, float* result) {
    const auto count = static_cast<std::ptrdiff_t>(plan.stages.size());
    if (count == 0) {  // one sample
        Complex<S>::load(source).store(result);
        return;
    }
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        const FftPlan::Stage& stage = plan.stages[static_cast<std::size_t>(i)];
        const float* from = i % 2 == 0 ? source : scratch;
        float* to = i == count - 1 ? result : i % 2 == 0 ? scratch : source;
        switch (stage.radix) {
            case 2: fft_stage<S, 2>(plan, stage, from, to); break;
            case 3: fft_stage<S, 3>(plan, stage, from, to); break;
            case 4: fft_stage<S, 4>(plan, stage, from, to); break;
            case 5: fft_stage<S, 5>(plan, stage, from, to); break;
            default: fft_stage_odd<S>(plan, stage, from, to);
        }
    }
}

// Three different buffers of plan.n elements, and one of plan.work(). Leaves nothing in source.
template <class S>
FUSE_INLINE void fft(const FftPlan& plan, float* source, float* scratch, float* result,
                     float* work) {
    using C = Complex<S>;
    constexpr std::ptrdiff_t size = 2 * S::lanes;
    if (!plan.convolution) {
        fft_smooth<S>(plan, source, scratch, result);
        return;
    }
    const FftPlan& inner = *plan.convolution;
    float *a = work, *b = a + inner.n * size, *c = b + inner.n * size;
    const float *chirp = plan.chirp.data(), *filter = plan.filter.data();
    const C zero{S::splat(0.0f), S::splat(0.0f)};
    for (std::ptrdiff_t k = 0; k < plan.n; ++k) {
        C::load(source + k * size).times(chirp[2 * k], chirp[2 * k + 1]).store(a + k * size);
    }
    for (std::ptrdiff_t k = plan.n; k < inner.n; ++k) zero.store(a + k * size);
    fft_smooth<S>(inner, a, b, c);
    for (std::ptrdiff_t k = 0; k < inner.n; ++k) {
        const C product = C::load(c + k * size).times(filter[2 * k], filter[2 * k + 1]);
        product.swapped().store(c + k * size);
    }
    fft_smooth<S>(inner, c, b, a);
    for (std::ptrdiff_t k = 0; k < plan.n; ++k) {
        const C sample = C::load(a + k * size).swapped();
        sample.times(chirp[2 * k], chirp[2 * k + 1]).store(result + k * size);
    }
}

}  // namespace fuse
