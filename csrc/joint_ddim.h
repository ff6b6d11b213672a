// One step of DRFusion's sampler: x0 from the noise estimate, the joint observation correction of
// both sources and of the fused image, and the deterministic DDIM move, in one pass over memory.
#pragma once

#include <cstddef>

#include "platform.h"

namespace fuse {

enum class JointForm { code = 0, paper = 1 };

struct JointCoefficients {
    float inv_sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, sqrt_one_minus_abar_prev, lam;
};

// [a, b, f] = (x - √(1-ā)·ε) / √ā
// a' = a - λ(a - y1),  b' = b - λ(b - y2)
// code:   f' = f - λ( m(a' - y1) + (1-m)(b' - y2) - m·y1 - (1-m)·y2 + f )
// paper:  f' = f - λ( m(a - y1) + (1-m)(b - y2) - (m·a + (1-m)·b - f) )
// out = √ā_prev·[a', b', f'] + √(1-ā_prev)·ε
//
// n pixels. x, eps and out have three planes, `plane` numbers apart, mask, y1 and y2 one. out may be
// x or eps itself.
template <JointForm form>
FUSE_CLONES void joint_ddim_pixels(const float* x, const float* eps, const float* mask,
                                   const float* y1, const float* y2, float* out,
                                   std::ptrdiff_t plane, std::ptrdiff_t n, JointCoefficients k) {
    const float *xa = x, *xb = x + plane, *xf = x + 2 * plane;
    const float *ea = eps, *eb = eps + plane, *ef = eps + 2 * plane;
    float *oa = out, *ob = out + plane, *of = out + 2 * plane;
    FUSE_INDEPENDENT
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        const float na = ea[i], nb = eb[i], nf = ef[i];
        const float m = mask[i], ya = y1[i], yb = y2[i];
        const float a = (xa[i] - k.sqrt_one_minus_abar * na) * k.inv_sqrt_abar;
        const float b = (xb[i] - k.sqrt_one_minus_abar * nb) * k.inv_sqrt_abar;
        const float f = (xf[i] - k.sqrt_one_minus_abar * nf) * k.inv_sqrt_abar;
        const float a2 = a - k.lam * (a - ya);
        const float b2 = b - k.lam * (b - yb);
        const float w = 1.0f - m;
        float residual;
        if constexpr (form == JointForm::code) {
            residual = m * (a2 - ya) + w * (b2 - yb) - m * ya - w * yb + f;
        } else {
            residual = m * (a - ya) + w * (b - yb) - (m * a + w * b - f);
        }
        const float f2 = f - k.lam * residual;
        oa[i] = k.sqrt_abar_prev * a2 + k.sqrt_one_minus_abar_prev * na;
        ob[i] = k.sqrt_abar_prev * b2 + k.sqrt_one_minus_abar_prev * nb;
        of[i] = k.sqrt_abar_prev * f2 + k.sqrt_one_minus_abar_prev * nf;
    }
}

}  // namespace fuse
