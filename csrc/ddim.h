// The sampler's steps for one estimate and for two composed ones, in one pass over memory.
#pragma once

#include <cstddef>

#include "platform.h"

namespace fuse {

// direction: √(1 - ā_prev - σ²), the share of the predicted noise that stays.
struct DdimCoefficients {
    float inv_sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, direction, sigma;
};

// x0 = (x - √(1-ā)·ε) / √ā,  out = √ā_prev·x0 + direction·ε
// (Song et al., "Denoising diffusion implicit models", ICLR 2021, equation 12 for σ = 0.)
// out may be x or eps itself.
FUSE_CLONES inline void ddim_step(const float* x, const float* eps, float* out, std::ptrdiff_t n,
                                  DdimCoefficients k) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float e = eps[i];
        const float x0 = (x[i] - k.sqrt_one_minus_abar * e) * k.inv_sqrt_abar;
        out[i] = k.sqrt_abar_prev * x0 + k.direction * e;
    }
}

// The same, plus σ·noise; out may be noise, too.
FUSE_CLONES inline void ddim_step_noise(const float* x, const float* eps, const float* noise,
                                        float* out, std::ptrdiff_t n, DdimCoefficients k) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float e = eps[i];
        const float x0 = (x[i] - k.sqrt_one_minus_abar * e) * k.inv_sqrt_abar;
        out[i] = (k.sqrt_abar_prev * x0 + k.direction * e) + k.sigma * noise[i];
    }
}

// Two priors, a's share w (one plane for all channels), b's 1 - w:
//   ε = w·ε_a + (1-w)·ε_b,  x0 = (x - √(1-ā)·ε) / √ā,  out = √ā_prev·x0 + direction·ε
// DRMF, equation 9: since the shares add up to one, Σ w_i·x0_i is the x0 of Σ w_i·ε_i. Its public
// code (Linfeng-Tang/DRMF) leaves the last term out: direction = 0.
// out may be x, eps_a or eps_b itself.
FUSE_CLONES inline void compose_priors(const float* x, const float* eps_a, const float* eps_b,
                                       const float* weight, float* out, std::ptrdiff_t n,
                                       DdimCoefficients k) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float w = weight[i];
        const float e = w * eps_a[i] + (1.0f - w) * eps_b[i];
        const float x0 = (x[i] - k.sqrt_one_minus_abar * e) * k.inv_sqrt_abar;
        out[i] = k.sqrt_abar_prev * x0 + k.direction * e;
    }
}

// The same, and x0_a = (x - √(1-ā)·ε_a) / √ā, which the network of the weights looks at next.
FUSE_CLONES inline void compose_priors_x0(const float* x, const float* eps_a, const float* eps_b,
                                          const float* weight, float* out, float* x0_a,
                                          std::ptrdiff_t n, DdimCoefficients k) {
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float w = weight[i], a = eps_a[i], at = x[i];
        const float e = w * a + (1.0f - w) * eps_b[i];
        const float x0 = (at - k.sqrt_one_minus_abar * e) * k.inv_sqrt_abar;
        out[i] = k.sqrt_abar_prev * x0 + k.direction * e;
        x0_a[i] = (at - k.sqrt_one_minus_abar * a) * k.inv_sqrt_abar;
    }
}

}  // namespace fuse
