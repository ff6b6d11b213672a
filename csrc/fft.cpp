#include "fft.h"

#include <cmath>
#include <map>
#include <mutex>

#include "scratch.h"

namespace fuse {
namespace {

constexpr double kTwoPi = 6.283185307179586476925;
constexpr std::size_t kPlansKept = 32;

void append_root(std::vector<float>& to, std::ptrdiff_t k, std::ptrdiff_t n) {
    const double angle = -kTwoPi * static_cast<double>(k % n) / static_cast<double>(n);
    to.push_back(static_cast<float>(std::cos(angle)));
    to.push_back(static_cast<float>(std::sin(angle)));
}

// Radices of n; empty if n has a prime factor above the largest radix.
std::vector<std::ptrdiff_t> factors(std::ptrdiff_t n) {
    std::vector<std::ptrdiff_t> radices;
    for (; n % 4 == 0; n /= 4) radices.push_back(4);
    for (std::ptrdiff_t p = 2; p <= kLargestRadix; ++p) {
        for (; n % p == 0; n /= p) radices.push_back(p);
    }
    if (n > 1) radices.clear();
    return radices;
}

void add_stages(FftPlan& plan, const std::vector<std::ptrdiff_t>& radices) {
    std::ptrdiff_t left = plan.n, stride = 1;
    for (const std::ptrdiff_t radix : radices) {
        const std::ptrdiff_t span = left / radix;
        const auto twiddles = static_cast<std::ptrdiff_t>(plan.numbers.size());
        for (std::ptrdiff_t p = 0; p < span; ++p) {
            for (std::ptrdiff_t j = 1; j < radix; ++j) append_root(plan.numbers, p * j, left);
        }
        const auto roots = static_cast<std::ptrdiff_t>(plan.numbers.size());
        for (std::ptrdiff_t j = 0; radix > 5 && j < radix; ++j) append_root(plan.numbers, j, radix);
        plan.stages.push_back({radix, span, stride, twiddles, roots});
        left = span;
        stride *= radix;
    }
}

std::ptrdiff_t next_smooth(std::ptrdiff_t n) {
    for (;; ++n) {
        std::ptrdiff_t rest = n;
        for (const std::ptrdiff_t p : {2, 3, 5}) {
            while (rest % p == 0) rest /= p;
        }
        if (rest == 1) return n;
    }
}

void add_convolution(FftPlan& plan) {
    const std::ptrdiff_t n = plan.n, length = next_smooth(2 * n - 1);
    auto inner = std::make_shared<FftPlan>();
    inner->n = length;
    add_stages(*inner, factors(length));
    for (std::ptrdiff_t k = 0; k < n; ++k) append_root(plan.chirp, k * k % (2 * n), 2 * n);

    // The conjugate chirp around 0, in every lane, and its transform.
    using S = Simd<4>;
    constexpr std::ptrdiff_t size = 2 * S::lanes;
    const Scratch a(length * size), b(length * size), c(length * size);
    for (std::ptrdiff_t k = 0; k < length; ++k) {
        const std::ptrdiff_t at = k < n ? k : length - k;
        const bool inside = at < n;
        const float scale = 1.0f / static_cast<float>(length);
        const float re = inside ? plan.chirp[2 * at] : 0.0f;
        const float im = inside ? -plan.chirp[2 * at + 1] : 0.0f;
        Complex<S>{S::splat(re * scale), S::splat(im * scale)}.store(a.data() + k * size);
    }
    fft_smooth<S>(*inner, a.data(), b.data(), c.data());
    for (std::ptrdiff_t k = 0; k < length; ++k) {
        plan.filter.push_back(c.data()[k * size]);
        plan.filter.push_back(c.data()[k * size + S::lanes]);
    }
    plan.convolution = std::move(inner);
}

}  // namespace

std::shared_ptr<const FftPlan> fft_plan(std::ptrdiff_t n) {
    // Not destroyed at exit: the interpreter may still run kernels in other threads then.
    static auto* mutex = new std::mutex;
    static auto* plans = new std::map<std::ptrdiff_t, std::shared_ptr<const FftPlan>>;
    const std::lock_guard lock(*mutex);
    const auto found = plans->find(n);
    if (found != plans->end()) return found->second;
    auto plan = std::make_shared<FftPlan>();
    plan->n = n;
    const auto radices = factors(n);
    if (n > 1 && radices.empty()) add_convolution(*plan);
    else add_stages(*plan, radices);
    if (plans->size() >= kPlansKept) plans->clear();
    plans->emplace(n, plan);
    return plan;
}

}  // namespace fuse
