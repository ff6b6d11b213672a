// How much the scales of one orientation agree in phase (Kovesi's phase congruency), float64.
//
//   energy    = sum_s (Re_s u + Im_s v - |Re_s v - Im_s u|),
//               (u, v) = (sum Re, sum Im) / (|sum| + tiny), the direction of the sum
//   amplitude = sum_s A_s,  spread = amplitude / (max_s A_s + tiny),  power = A_0^2
//
// from the real and imaginary answers of the filters, A = |Re + i Im|.
#pragma once

#include <algorithm>
#include <cstddef>

#include "doubles.h"
#include "parallel.h"
#include "simd.h"

namespace fuse {

struct PhaseEnergy {
    const double *real, *imaginary;  // (scales, pixels) each
    double *energy, *spread, *amplitude, *power;
    std::ptrdiff_t scales, pixels;
    double tiny;
};

struct PhaseEnergyRange {
    template <class Level>
    static FUSE_INLINE void run(const PhaseEnergy& a, std::ptrdiff_t begin, std::ptrdiff_t end) {
        using D = Doubles<Level::Simd::lanes / 2>;
        std::ptrdiff_t i = begin;
        for (; i + D::lanes <= end; i += D::lanes) step<D>(a, i);
        for (; i < end; ++i) step<Doubles<1>>(a, i);
    }

private:
    template <class D>
    static FUSE_INLINE void step(const PhaseEnergy& a, std::ptrdiff_t at) {
        using F = typename D::F;
        F sum_real = D::splat(0.0), sum_imaginary = sum_real, amplitude = sum_real;
        F largest = sum_real, across = sum_real;
        for (std::ptrdiff_t s = 0; s < a.scales; ++s) {
            const F real = D::load(a.real + s * a.pixels + at);
            const F imaginary = D::load(a.imaginary + s * a.pixels + at);
            sum_real += real;
            sum_imaginary += imaginary;
            const F power = real * real + imaginary * imaginary, length = D::root(power);
            if (s == 0) D::store(a.power + at, power);
            amplitude += length;
            largest = D::at_least(largest, length);
        }
        for (std::ptrdiff_t s = 0; s < a.scales; ++s) {
            const F real = D::load(a.real + s * a.pixels + at);
            const F imaginary = D::load(a.imaginary + s * a.pixels + at);
            across += D::magnitude(real * sum_imaginary - imaginary * sum_real);
        }
        const F square = sum_real * sum_real + sum_imaginary * sum_imaginary;
        D::store(a.energy + at, (square - across) / (D::root(square) + a.tiny));
        D::store(a.amplitude + at, amplitude);
        D::store(a.spread + at, amplitude / (largest + a.tiny));
    }
};

inline void phase_energy(const PhaseEnergy& a) {
    const SimdLevel level = simd_level();
    parallel_for(a.pixels, 4096, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        dispatch<PhaseEnergyRange>(level, a, begin, end);
    });
}

}  // namespace fuse
