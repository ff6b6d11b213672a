// Short vectors of float32 and the choice of instruction set at run time.
//
// A kernel is a class with `template <class Level> static FUSE_INLINE void run(arguments...)`,
// written in Level::Simd; dispatch<Kernel>(simd_level(), arguments...) calls it compiled for the
// best instruction set that both the processor and set_simd_level allow. Everything that run calls
// must be FUSE_INLINE, since a function that is not inlined is compiled for the baseline; lambdas
// are not. An operator asks for the level once: its passes share memory laid out for it.
//
// The files that include this header may contract a product and a sum to one FMA: last bits
// differ between instruction sets, never between thread counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "platform.h"

namespace fuse {

enum class SimdLevel { baseline = 0, avx2 = 1, avx512 = 2 };

// The best level of this processor and build.
SimdLevel best_simd_level();
// The level in use: best_simd_level() unless set lower.
SimdLevel simd_level();
// False, and no change, if the processor or the build does not have it.
bool set_simd_level(SimdLevel level);

#if defined(__GNUC__) && !defined(FUSEENGINE_NO_VECTOR_EXTENSIONS)

// Spelt out: GCC does not apply vector_size to a dependent type.
template <int n>
struct Vectors;
template <>
struct Vectors<4> {
    typedef float F __attribute__((vector_size(16)));
    typedef std::int32_t I __attribute__((vector_size(16)));
};
template <>
struct Vectors<8> {
    typedef float F __attribute__((vector_size(32)));
    typedef std::int32_t I __attribute__((vector_size(32)));
};
template <>
struct Vectors<16> {
    typedef float F __attribute__((vector_size(64)));
    typedef std::int32_t I __attribute__((vector_size(64)));
};

template <int n>
struct Simd {
    static constexpr int lanes = n;
    using F = typename Vectors<n>::F;
    using I = typename Vectors<n>::I;

    static FUSE_INLINE I bits(F v) { return reinterpret_cast<I>(v); }
    static FUSE_INLINE F from_bits(I v) { return reinterpret_cast<F>(v); }

    // b where a < b, else a: a NaN in a stays.
    static FUSE_INLINE F at_least(F a, F b) { return a < b ? b : a; }
    static FUSE_INLINE F at_most(F a, F b) { return a > b ? b : a; }

    template <int... i>
    static FUSE_INLINE F pick(F a, F b, std::integer_sequence<int, i...>, int) {
#if defined(__clang__)
        return __builtin_shufflevector(a, b, i...);
#else
        return __builtin_shuffle(a, b, I{i...});
#endif
    }
    template <int first, int... i>
    static FUSE_INLINE F interleave(F a, F b, std::integer_sequence<int, i...>) {
        return pick(a, b, std::integer_sequence<int, (first + i / 2 + (i % 2) * n)...>{}, 0);
    }
    template <int first, int... i>
    static FUSE_INLINE F every_other(F a, F b, std::integer_sequence<int, i...>) {
        return pick(a, b, std::integer_sequence<int, (first + 2 * i)...>{}, 0);
    }
    using Indices = std::make_integer_sequence<int, n>;
    static FUSE_INLINE F interleave_low(F a, F b) { return interleave<0>(a, b, Indices{}); }
    static FUSE_INLINE F interleave_high(F a, F b) { return interleave<n / 2>(a, b, Indices{}); }
    static FUSE_INLINE F even(F a, F b) { return every_other<0>(a, b, Indices{}); }
    static FUSE_INLINE F odd(F a, F b) { return every_other<1>(a, b, Indices{}); }

    static FUSE_INLINE F splat(float v) { return v - F{}; }
    static FUSE_INLINE float get(F v, int i) { return v[i]; }
#else

// The same in plain loops, for compilers without vector extensions.
template <int n>
struct Simd {
    static constexpr int lanes = n;
    struct I {
        std::int32_t v[n];
        friend FUSE_INLINE I operator+(I a, std::int32_t b) {
            for (int i = 0; i < n; ++i) a.v[i] += b;
            return a;
        }
        friend FUSE_INLINE I operator<<(I a, int b) {
            for (int i = 0; i < n; ++i) {
                a.v[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << b);
            }
            return a;
        }
    };
    struct F {
        float v[n];
#define FUSE_OPERATOR(op)                                \
    friend FUSE_INLINE F operator op(F a, F b) {         \
        for (int i = 0; i < n; ++i) a.v[i] = a.v[i] op b.v[i]; \
        return a;                                        \
    }                                                    \
    friend FUSE_INLINE F operator op(F a, float b) {     \
        for (int i = 0; i < n; ++i) a.v[i] = a.v[i] op b; \
        return a;                                        \
    }                                                    \
    friend FUSE_INLINE F operator op(float a, F b) {     \
        for (int i = 0; i < n; ++i) b.v[i] = a op b.v[i]; \
        return b;                                        \
    }
        FUSE_OPERATOR(+)
        FUSE_OPERATOR(-)
        FUSE_OPERATOR(*)
        FUSE_OPERATOR(/)
#undef FUSE_OPERATOR
        friend FUSE_INLINE F operator-(F a) { return -1.0f * a; }
        FUSE_INLINE F& operator+=(F b) { return *this = *this + b; }
        FUSE_INLINE F& operator-=(F b) { return *this = *this - b; }
        FUSE_INLINE F& operator*=(F b) { return *this = *this * b; }
    };

    static FUSE_INLINE I bits(F v) {
        I out;
        std::memcpy(&out, &v, sizeof out);
        return out;
    }
    static FUSE_INLINE F from_bits(I v) {
        F out;
        std::memcpy(&out, &v, sizeof out);
        return out;
    }
    static FUSE_INLINE F at_least(F a, F b) {
        for (int i = 0; i < n; ++i) a.v[i] = a.v[i] < b.v[i] ? b.v[i] : a.v[i];
        return a;
    }
    static FUSE_INLINE F at_most(F a, F b) {
        for (int i = 0; i < n; ++i) a.v[i] = a.v[i] > b.v[i] ? b.v[i] : a.v[i];
        return a;
    }
    static FUSE_INLINE F interleave_low(F a, F b) { return interleave(a, b, 0); }
    static FUSE_INLINE F interleave_high(F a, F b) { return interleave(a, b, n / 2); }
    static FUSE_INLINE F even(F a, F b) { return every_other(a, b, 0); }
    static FUSE_INLINE F odd(F a, F b) { return every_other(a, b, 1); }
    static FUSE_INLINE F splat(float v) {
        F out;
        for (int i = 0; i < n; ++i) out.v[i] = v;
        return out;
    }
    static FUSE_INLINE float get(F v, int i) { return v.v[i]; }

private:
    static FUSE_INLINE F interleave(F a, F b, int first) {
        F out;
        for (int i = 0; i < n; ++i) out.v[i] = (i % 2 ? b : a).v[first + i / 2];
        return out;
    }
    static FUSE_INLINE F every_other(F a, F b, int first) {
        F out;
        for (int i = 0; i < n; ++i) {
            const int k = first + 2 * i;
            out.v[i] = k < n ? a.v[k] : b.v[k - n];
        }
        return out;
    }

public:
#endif

    static FUSE_INLINE F load(const float* p) {
        F v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static FUSE_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

    // v[i] lane j <-> v[j] lane i: log2(n) perfect shuffles.
    static FUSE_INLINE void transpose(F (&v)[n]) {
        FUSE_UNROLL
        for (int round = 1; round < n; round *= 2) {
            F w[n];
            FUSE_UNROLL
            for (int i = 0; i < n / 2; ++i) {
                w[2 * i] = interleave_low(v[i], v[i + n / 2]);
                w[2 * i + 1] = interleave_high(v[i], v[i + n / 2]);
            }
            FUSE_UNROLL
            for (int i = 0; i < n; ++i) v[i] = w[i];
        }
    }

    // 2^v for v up to 128, below 1 ulp (measured over every exponent); 0 below -126.5, where the
    // result would be a subnormal number; 2^NaN is NaN.
    static FUSE_INLINE F exp2(F v) {
        v = at_least(v, splat(-127.0f));
        const F shifted = v + kRound;
        const F f = v - (shifted - kRound);
        return scale(exp2_polynomial(f), shifted);
    }

    // e^v, 1 ulp; smallest results near 1e-38 (v below -87 counts as -87), infinite above 88.7.
    static FUSE_INLINE F exp(F v) {
        v = at_most(at_least(v, splat(-87.0f)), splat(89.0f));
        const F shifted = v * 1.44269504f + kRound;
        const F n_ln2 = shifted - kRound;
        // ln 2 in two parts (Cody and Waite): the first has few enough bits for an exact product.
        const F f = (v - n_ln2 * 0.693359375f) + n_ln2 * 2.12194440e-4f;
        F p = f * 1.3843648e-3f + 8.374162e-3f;
        p = p * f + 4.1668002e-2f;
        p = p * f + 1.6666432e-1f;
        p = p * f + 4.9999994e-1f;
        p = p * f + 1.0f;
        return scale(p * f + 1.0f, shifted);
    }

private:
    // Added to a small number, leaves its nearest integer in the low bits: 1.5 * 2^23, and the bias
    // of an exponent with it.
    static constexpr float kRound = 12582912.0f + 127.0f;

    // Minimax in relative error on [-1/2, 1/2]: 2e-9.
    static FUSE_INLINE F exp2_polynomial(F f) {
        F p = f * 1.5353363e-4f + 1.3398875e-3f;
        p = p * f + 9.6184369e-3f;
        p = p * f + 5.5503324e-2f;
        p = p * f + 2.4022648e-1f;
        p = p * f + 6.9314718e-1f;
        return p * f + 1.0f;
    }

    // p * 2^n, n + 127 in the low bits of shifted: n = -127 gives 0, 128 infinity.
    static FUSE_INLINE F scale(F p, F shifted) {
        return p * from_bits(bits(shifted) << 23);
    }
};

template <int lanes, int vector_registers>
struct Level {
    using Simd = fuse::Simd<lanes>;
    static constexpr int registers = vector_registers;
};

#ifdef FUSEENGINE_TARGETS
template <class Kernel, class... A>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(A... a) {
    Kernel::template run<Level<16, 32>>(a...);
}
template <class Kernel, class... A>
__attribute__((target("avx2,fma"))) void run_avx2(A... a) {
    Kernel::template run<Level<8, 16>>(a...);
}
#endif

template <class Kernel, class... A>
void run_baseline(A... a) {
#if defined(__aarch64__)
    Kernel::template run<Level<4, 32>>(a...);
#else
    Kernel::template run<Level<4, 16>>(a...);
#endif
}

template <class Kernel, class... A>
void dispatch(SimdLevel level, A... a) {
#ifdef FUSEENGINE_TARGETS
    switch (level) {
        case SimdLevel::avx512: return run_avx512<Kernel>(a...);
        case SimdLevel::avx2: return run_avx2<Kernel>(a...);
        case SimdLevel::baseline: break;
    }
#else
    (void)level;  // the only one
#endif
    run_baseline<Kernel>(a...);
}

}  // namespace fuse
