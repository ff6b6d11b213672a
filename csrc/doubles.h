// Short vectors of float64: the arithmetic that loops with conditions need, which compilers do not
// turn into vectors by themselves. See simd.h for the choice of instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "platform.h"

namespace fuse {

#if defined(__GNUC__) && !defined(FUSEENGINE_NO_VECTOR_EXTENSIONS)

// Spelt out: GCC does not apply vector_size to a dependent type.
template <int n>
struct DoubleVectors;
template <>
struct DoubleVectors<1> {
    typedef double F __attribute__((vector_size(8)));
    typedef std::uint64_t U __attribute__((vector_size(8)));
};
template <>
struct DoubleVectors<2> {
    typedef double F __attribute__((vector_size(16)));
    typedef std::uint64_t U __attribute__((vector_size(16)));
};
template <>
struct DoubleVectors<4> {
    typedef double F __attribute__((vector_size(32)));
    typedef std::uint64_t U __attribute__((vector_size(32)));
};
template <>
struct DoubleVectors<8> {
    typedef double F __attribute__((vector_size(64)));
    typedef std::uint64_t U __attribute__((vector_size(64)));
};

template <int n>
struct Doubles {
    static constexpr int lanes = n;
    using F = typename DoubleVectors<n>::F;
    using U = typename DoubleVectors<n>::U;
    using Mask = decltype(F{} < F{});

    static FUSE_INLINE F splat(double v) { return v - F{}; }
    static FUSE_INLINE F select(Mask mask, F a, F b) { return mask ? a : b; }

#else

// The same in plain loops, for compilers without vector extensions.
template <int n>
struct Doubles {
    static constexpr int lanes = n;
    struct Mask {
        bool v[n];
        friend FUSE_INLINE Mask operator&(Mask a, Mask b) {
            for (int i = 0; i < n; ++i) a.v[i] = a.v[i] && b.v[i];
            return a;
        }
        friend FUSE_INLINE Mask operator|(Mask a, Mask b) {
            for (int i = 0; i < n; ++i) a.v[i] = a.v[i] || b.v[i];
            return a;
        }
    };
    struct U {
        std::uint64_t v[n];
#define FUSE_OPERATOR(op)                                             \
    friend FUSE_INLINE U operator op(U a, std::uint64_t b) {          \
        for (int i = 0; i < n; ++i) a.v[i] = a.v[i] op b;             \
        return a;                                                     \
    }
        FUSE_OPERATOR(+)
        FUSE_OPERATOR(&)
        FUSE_OPERATOR(|)
        FUSE_OPERATOR(>>)
#undef FUSE_OPERATOR
    };
    struct F {
        double v[n];
#define FUSE_OPERATOR(op)                                             \
    friend FUSE_INLINE F operator op(F a, F b) {                      \
        for (int i = 0; i < n; ++i) a.v[i] = a.v[i] op b.v[i];        \
        return a;                                                     \
    }                                                                 \
    friend FUSE_INLINE F operator op(F a, double b) { return a op splat(b); } \
    friend FUSE_INLINE F operator op(double a, F b) { return splat(a) op b; }
        FUSE_OPERATOR(+)
        FUSE_OPERATOR(-)
        FUSE_OPERATOR(*)
        FUSE_OPERATOR(/)
#undef FUSE_OPERATOR
#define FUSE_OPERATOR(op)                                             \
    friend FUSE_INLINE Mask operator op(F a, F b) {                   \
        Mask m;                                                       \
        for (int i = 0; i < n; ++i) m.v[i] = a.v[i] op b.v[i];        \
        return m;                                                     \
    }
        FUSE_OPERATOR(<)
        FUSE_OPERATOR(>)
        FUSE_OPERATOR(==)
        FUSE_OPERATOR(!=)
#undef FUSE_OPERATOR
        friend FUSE_INLINE F operator-(F a) { return splat(0.0) - a; }
        FUSE_INLINE F& operator+=(F b) { return *this = *this + b; }
        FUSE_INLINE F& operator-=(F b) { return *this = *this - b; }
        FUSE_INLINE F& operator*=(F b) { return *this = *this * b; }
    };

    static FUSE_INLINE F splat(double v) {
        F out;
        for (int i = 0; i < n; ++i) out.v[i] = v;
        return out;
    }
    static FUSE_INLINE F select(Mask mask, F a, F b) {
        for (int i = 0; i < n; ++i) a.v[i] = mask.v[i] ? a.v[i] : b.v[i];
        return a;
    }

#endif

    static FUSE_INLINE F load(const double* p) {
        F v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static FUSE_INLINE void store(double* p, F v) { std::memcpy(p, &v, sizeof v); }
    static FUSE_INLINE U bits(F v) {
        U out;
        std::memcpy(&out, &v, sizeof out);
        return out;
    }
    static FUSE_INLINE F from_bits(U v) {
        F out;
        std::memcpy(&out, &v, sizeof out);
        return out;
    }

    static FUSE_INLINE bool all(Mask mask) {
        double lane[n];
        store(lane, select(mask, splat(0.0), splat(1.0)));
        double sum = 0.0;
        for (int i = 0; i < n; ++i) sum += lane[i];
        return sum == 0.0;
    }
    static FUSE_INLINE F magnitude(F v) { return select(v < splat(0.0), -v, v); }
    static FUSE_INLINE F at_least(F v, F least) { return select(v < least, least, v); }
    static FUSE_INLINE F root(F v) {
        double lane[n];
        store(lane, v);
        for (int i = 0; i < n; ++i) lane[i] = std::sqrt(lane[i]);
        return load(lane);
    }

    // Natural logarithm of normal positive numbers, 1 ulp or so.
    static FUSE_INLINE F log(F x) {
        // x = 2^k m, m in [sqrt(1/2), sqrt 2): adding the distance from sqrt(1/2) to 1 carries into
        // the exponent where the mantissa lies above.
        constexpr std::uint64_t half_root = 0x3fe6a09e667f3bcd, one = 0x3ff0000000000000;
        const U shifted = bits(x) + (one - half_root);
        const F m = from_bits((shifted & 0x000fffffffffffff) + half_root);
        // An integer in the low bits of 2^52 is added to it.
        const F k = from_bits((shifted >> 52) | 0x4330000000000000) - (4503599627370496.0 + 1023.0);
        // log m = 2 artanh s = 2 s (1 + z series(z)), z = s^2 < 0.03: interpolated at Chebyshev's
        // points, 5e-18.
        const F s = (m - 1.0) / (m + 1.0), z = s * s;
        F series = z * 7.308224842521703e-2 + 7.665860800278021e-2;
        series = series * z + 9.091444562630861e-2;
        series = series * z + 1.111110556739754e-1;
        series = series * z + 1.4285714312987743e-1;
        series = series * z + 1.9999999999949752e-1;
        series = series * z + 3.333333333333335e-1;
        return k * 0.6931471805599453 + 2.0 * (s + s * z * series);
    }
};

}  // namespace fuse
