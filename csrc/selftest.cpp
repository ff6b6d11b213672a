// Every kernel of this folder against plain loops in float64, without Python: for platforms on which
// only a compiler is at hand. Prints what fails; the exit status is the number of failures.
//
//   cmake -S . -B build/selftest -D FUSEENGINE_SELFTEST=ON && cmake --build build/selftest
//   build/selftest/fuse_selftest
//
// Each case runs with one, two and three threads and at every level of instructions that the
// processor has; outputs are NaN beforehand, and must be the same bits for any number of threads.
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "criss_cross.h"
#include "ddim.h"
#include "frames.h"
#include "group_norm.h"
#include "joint_ddim.h"
#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "storage.h"
#include "warp.h"
#include "wiener.h"
#include "yuv.h"

namespace {

using fuse::SimdLevel;
using Index = std::ptrdiff_t;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

int failures = 0;
int cases = 0;

void fail(const std::string& name, const std::string& what) {
    std::printf("FAIL %s: %s\n", name.c_str(), what.c_str());
    ++failures;
}

Floats normal(Index n, unsigned seed) {
    Floats out(static_cast<std::size_t>(n));
    fuse::philox_normal(out.data(), out.size(), seed, 0);
    return out;
}

Floats uniform(Index n, unsigned seed) {
    std::vector<std::uint32_t> words(static_cast<std::size_t>(n));
    fuse::philox_words(words.data(), words.size(), seed, 0);
    Floats out;
    for (const auto word : words) out.push_back(static_cast<float>(word >> 8) * 0x1p-24f);
    return out;
}

const char* name_of(SimdLevel level) {
    return level == SimdLevel::avx512 ? "avx512" : level == SimdLevel::avx2 ? "avx2" : "baseline";
}

// run(out) at all levels and numbers of threads, against `expected` within `tolerance`.
void check(const std::string& name, const Doubles& expected, double tolerance,
           const std::function<void(float*)>& run) {
    ++cases;
    for (const auto level : {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512}) {
        if (!fuse::set_simd_level(level)) continue;
        Floats first;
        for (const int threads : {1, 2, 3}) {
            const std::string where =
                name + " (" + name_of(level) + ", " + std::to_string(threads) + " threads)";
            fuse::set_num_threads(threads);
            Floats out(expected.size(), std::numeric_limits<float>::quiet_NaN());
            run(out.data());
            double worst = 0;
            for (std::size_t i = 0; i < out.size(); ++i) {
                const double error = std::fabs(static_cast<double>(out[i]) - expected[i]);
                if (!(error <= worst)) worst = error;  // a NaN stays
                if (std::isnan(error)) break;
            }
            if (!(worst <= tolerance)) fail(where, "off by " + std::to_string(worst));
            if (threads == 1) first = out;
            else if (std::memcmp(first.data(), out.data(), out.size() * sizeof(float)) != 0) {
                fail(where, "other bits than with one thread");
            }
        }
    }
    fuse::set_simd_level(fuse::best_simd_level());
}

void test_parallel() {
    ++cases;
    for (const int threads : {1, 2, 5}) {
        fuse::set_num_threads(threads);
        for (const Index count : {0, 1, 7, 64, 1000}) {
            std::vector<int> seen(static_cast<std::size_t>(count));
            fuse::parallel_for(count, 3, [&](Index begin, Index end) {
                for (Index i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
            });
            for (const int times : seen) {
                if (times != 1) return fail("parallel_for", "an index not seen exactly once");
            }
        }
    }
}

void test_philox() {
    ++cases;
    // Random123's known answers for Philox4x32-10.
    const auto ones = fuse::philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                                          {0xffffffff, 0xffffffff});
    const fuse::Words expected = {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
    if (ones != expected) fail("philox4x32_10", "not the published words");
    const Floats z = normal(20000, 7);
    double sum = 0, squares = 0;
    for (const float v : z) {
        sum += v;
        squares += static_cast<double>(v) * v;
    }
    const auto n = static_cast<double>(z.size());
    if (std::fabs(sum / n) > 0.03 || std::fabs(squares / n - 1) > 0.05) {
        fail("philox_normal", "not standard normal");
    }
}

// All 16-bit numbers there and back; nearest, ties to even, on the way.
void test_storage() {
    ++cases;
    for (std::uint32_t half = 0; half < 0x10000; ++half) {
        const std::uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
        const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : exponent == 0 ? std::ldexp(fraction, -24)
                                                 : std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25);
        const double value = half & 0x8000 ? -magnitude : magnitude;
        const float wide = fuse::float16_to_float(half);
        if (!(static_cast<double>(wide) == value || (std::isnan(wide) && std::isnan(value)))) {
            return fail("float16", "widened wrongly: " + std::to_string(half));
        }
        const bool nan = std::isnan(wide);
        if (!nan && fuse::float_to_float16(wide) != half) return fail("float16", "not kept");
        if (nan && !std::isnan(fuse::float16_to_float(fuse::float_to_float16(wide)))) {
            return fail("float16", "a NaN became a number");
        }
        const float upper = fuse::bfloat16_to_float(half);
        if (std::isnan(upper) ? !std::isnan(fuse::bfloat16_to_float(fuse::float_to_bfloat16(upper)))
                              : fuse::float_to_bfloat16(upper) != half) {
            return fail("bfloat16", "not kept: " + std::to_string(half));
        }
        // Between neighbours: to the nearer one, in the middle to the even one.
        if (half >= 0x7bff) continue;
        const float next = fuse::float16_to_float(half + 1), middle = 0.5f * (wide + next);
        const std::uint32_t even = half + (half & 1);
        if (fuse::float_to_float16(middle) != even ||
            fuse::float_to_float16(std::nextafter(middle, 0.0f)) != half ||
            fuse::float_to_float16(std::nextafter(middle, INFINITY)) != half + 1) {
            return fail("float16", "not the nearest of " + std::to_string(half));
        }
    }
    // The instruction, where there is one, says the same as the bits.
    std::vector<std::uint16_t> halves(0x10000), back(0x10000);
    Floats wide(0x10000), by_bits(0x10000);
    for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
    fuse::widen_float16(halves.data(), wide.data(), 0x10000);
    fuse::widen_float16_bits(halves.data(), by_bits.data(), 0x10000);
    if (std::memcmp(wide.data(), by_bits.data(), wide.size() * sizeof(float)) != 0) {
        fail("float16", "widened otherwise by its instruction");
    }
    for (float& v : wide) v *= 1.0f / 3.0f;
    std::vector<std::uint16_t> other(0x10000);
    fuse::narrow_float16(wide.data(), back.data(), 0x10000);
    fuse::narrow_float16_bits(wide.data(), other.data(), 0x10000);
    if (back != other) fail("float16", "narrowed otherwise by its instruction");
    if (fuse::float_to_float16(65519.0f) != 0x7bff || fuse::float_to_float16(65520.0f) != 0x7c00 ||
        fuse::float_to_bfloat16(fuse::bits_float(0x3f808000)) != 0x3f80 ||
        fuse::float_to_bfloat16(fuse::bits_float(0x3f818000)) != 0x3f82 ||
        fuse::float_to_bfloat16(3.4e38f) != 0x7f80) {
        fail("storage", "the border of the range, or a tie");
    }
}

void test_attention(Index pictures, Index cq, Index c, Index h, Index w) {
    const Index plane = h * w;
    const Floats q = normal(pictures * cq * plane, 1), k = normal(pictures * cq * plane, 2),
                 v = normal(pictures * c * plane, 3);
    Doubles expected(v.size());
    for (Index n = 0; n < pictures; ++n) {
        for (Index p = 0; p < plane; ++p) {
            const Index y = p / w, x = p % w;
            std::vector<Index> path;
            for (Index i = 0; i < w; ++i) path.push_back(y * w + i);
            for (Index i = 0; i < h; ++i) {
                if (i != y) path.push_back(i * w + x);
            }
            Doubles weight;
            double total = 0;
            for (const Index other : path) {
                double score = 0;
                for (Index i = 0; i < cq; ++i) {
                    const Index at = (n * cq + i) * plane;
                    score += static_cast<double>(q[at + p]) * k[at + other];
                }
                weight.push_back(std::exp(score));
                total += weight.back();
            }
            for (Index i = 0; i < c; ++i) {
                const Index at = (n * c + i) * plane;
                double value = 0;
                for (std::size_t j = 0; j < path.size(); ++j) value += weight[j] * v[at + path[j]];
                expected[at + p] = value / total;
            }
        }
    }
    check("criss_cross_attention " + std::to_string(h) + "x" + std::to_string(w), expected, 2e-5,
          [&](float* out) {
              fuse::criss_cross_attention({q.data(), k.data(), v.data(), out, nullptr, nullptr, cq,
                                           c, h, w},
                                          pictures);
          });
}

void test_norm(Index n, Index c, Index pixels, Index groups, double offset, double spread) {
    Floats x = normal(n * c * pixels, 4);
    for (float& v : x) v = static_cast<float>(offset + spread * v);
    const Floats weight = normal(c, 5), bias = normal(c, 6), shift = normal(n * c, 7);
    const Index length = c / groups * pixels;
    Doubles expected(x.size());
    for (Index g = 0; g < n * groups; ++g) {
        double mean = 0, variance = 0;
        for (Index i = 0; i < length; ++i) mean += x[g * length + i];
        mean /= static_cast<double>(length);
        for (Index i = 0; i < length; ++i) {
            const double d = x[g * length + i] - mean;
            variance += d * d;
        }
        variance /= static_cast<double>(length);
        for (Index i = 0; i < length; ++i) {
            const Index at = g * length + i, channel = at / pixels;
            const double z = (x[at] - mean) / std::sqrt(variance + 1e-5) * weight[channel % c] +
                             bias[channel % c] + shift[channel];
            expected[at] = z / (1 + std::exp(-z));
        }
    }
    check("group_norm_silu, mean " + std::to_string(offset), expected, 2e-5, [&](float* out) {
        fuse::GroupNorm a{};
        a.x = {x.data(), fuse::Storage::float32};
        a.weight = weight.data();
        a.bias = bias.data();
        a.shift = shift.data();
        a.out = {out, fuse::Storage::float32};
        a.n = n;
        a.c = c;
        a.pixels = pixels;
        a.groups = groups;
        a.shift_stride = c;
        a.eps = 1e-5;
        a.silu = true;
        fuse::group_norm_silu(a);
    });
}

using Complex = std::complex<double>;

std::vector<Complex> transformed(const std::vector<Complex>& x, double sign) {
    const auto n = static_cast<Index>(x.size());
    std::vector<Complex> out(x.size());
    for (Index j = 0; j < n; ++j) {
        for (Index k = 0; k < n; ++k) {
            const double angle = sign * 6.283185307179586476925 *
                                 static_cast<double>(j * k % n) / static_cast<double>(n);
            out[j] += x[k] * std::polar(1.0, angle);
        }
    }
    return out;
}

// Both directions of a plane, not scaled.
std::vector<Complex> transformed_2d(std::vector<Complex> x, Index h, Index w, double sign) {
    for (Index y = 0; y < h; ++y) {
        const auto row = transformed({x.begin() + y * w, x.begin() + (y + 1) * w}, sign);
        std::copy(row.begin(), row.end(), x.begin() + y * w);
    }
    for (Index column = 0; column < w; ++column) {
        std::vector<Complex> line;
        for (Index y = 0; y < h; ++y) line.push_back(x[y * w + column]);
        line = transformed(line, sign);
        for (Index y = 0; y < h; ++y) x[y * w + column] = line[y];
    }
    return x;
}

void test_wiener(Index pictures, Index h, Index w) {
    const Index half = w / 2 + 1, plane = h * w;
    const Floats x = normal(pictures * plane, 8), tap = normal(plane, 9);
    // The half spectrum of a real kernel: then the whole spectrum says the same.
    const auto whole = transformed_2d({tap.begin(), tap.end()}, h, w, -1);
    Floats spectrum;
    for (Index y = 0; y < h; ++y) {
        for (Index k = 0; k < half; ++k) {
            spectrum.push_back(static_cast<float>(whole[y * w + k].real()));
            spectrum.push_back(static_cast<float>(whole[y * w + k].imag()));
        }
    }
    Doubles expected;
    for (Index n = 0; n < pictures; ++n) {
        auto f = transformed_2d({x.begin() + n * plane, x.begin() + (n + 1) * plane}, h, w, -1);
        for (Index i = 0; i < plane; ++i) f[i] *= whole[i];
        f = transformed_2d(f, h, w, 1);
        for (const auto& v : f) expected.push_back(v.real() / static_cast<double>(plane));
    }
    double largest = 1;
    for (const double v : expected) largest = std::max(largest, std::fabs(v));
    check("wiener_filter " + std::to_string(h) + "x" + std::to_string(w), expected, 2e-6 * largest,
          [&](float* out) {
              fuse::Wiener a{};
              a.x = x.data();
              a.spectrum = spectrum.data();
              a.out = out;
              a.h = h;
              a.w = w;
              a.complex_spectrum = true;
              fuse::wiener_filter(a, pictures);
          });
}

void test_steps(Index n) {
    const Floats x = normal(3 * n, 10), e = normal(3 * n, 11), z = normal(3 * n, 12),
                 m = uniform(n, 13), y1 = uniform(n, 14), y2 = uniform(n, 15);
    const double now = 0.8, rest = 0.6, before = 0.95, direction = 0.25, sigma = 0.18, lam = 0.4;
    const fuse::DdimCoefficients k{static_cast<float>(1 / now), static_cast<float>(rest),
                                   static_cast<float>(before), static_cast<float>(direction),
                                   static_cast<float>(sigma)};
    Doubles plain, noisy, composed;
    for (Index i = 0; i < 3 * n; ++i) {
        const double w = m[i % n], both = w * e[i] + (1 - w) * z[i];
        plain.push_back(before * (x[i] - rest * e[i]) / now + direction * e[i]);
        noisy.push_back(plain.back() + sigma * z[i]);
        composed.push_back(before * (x[i] - rest * both) / now + direction * both);
    }
    const double tolerance = 4e-6;
    check("ddim_step", plain, tolerance,
          [&](float* out) { fuse::ddim_step(x.data(), e.data(), out, 3 * n, k); });
    check("ddim_step with noise", noisy, tolerance, [&](float* out) {
        fuse::ddim_step_noise(x.data(), e.data(), z.data(), out, 3 * n, k);
    });
    check("compose_priors", composed, tolerance, [&](float* out) {
        for (Index c = 0; c < 3; ++c) {
            fuse::compose_priors(x.data() + c * n, e.data() + c * n, z.data() + c * n, m.data(),
                                 out + c * n, n, k);
        }
    });
    const fuse::JointCoefficients j{static_cast<float>(1 / now), static_cast<float>(rest),
                                    static_cast<float>(before), static_cast<float>(direction),
                                    static_cast<float>(lam)};
    for (const bool code : {true, false}) {
        Doubles expected(static_cast<std::size_t>(3 * n));
        for (Index i = 0; i < n; ++i) {
            const double w = m[i], first = y1[i], second = y2[i];
            const double a = (x[i] - rest * e[i]) / now, b = (x[n + i] - rest * e[n + i]) / now,
                         f = (x[2 * n + i] - rest * e[2 * n + i]) / now;
            const double a2 = a - lam * (a - first), b2 = b - lam * (b - second);
            const double residual =
                code ? w * (a2 - first) + (1 - w) * (b2 - second) - w * first - (1 - w) * second + f
                     : w * (a - first) + (1 - w) * (b - second) - (w * a + (1 - w) * b - f);
            const double all[3] = {a2, b2, f - lam * residual};
            for (Index c = 0; c < 3; ++c) {
                expected[c * n + i] = before * all[c] + direction * e[c * n + i];
            }
        }
        const auto step = code ? fuse::joint_ddim_pixels<fuse::JointForm::code>
                               : fuse::joint_ddim_pixels<fuse::JointForm::paper>;
        check(code ? "joint_ddim_step, code" : "joint_ddim_step, paper", expected, tolerance,
              [&](float* out) {
                  step(x.data(), e.data(), m.data(), y1.data(), y2.data(), out, n, n, j);
              });
    }
}

void test_frames(Index h, Index w, Index to_h, Index to_w) {
    std::vector<std::uint8_t> frame;
    for (const float v : uniform(3 * h * w, 16)) {
        frame.push_back(static_cast<std::uint8_t>(v * 255.99f));
    }
    const fuse::Image<const std::uint8_t> image{frame.data(), h, w, 3, 3 * w};
    const auto mirrored = [](Index i, Index n) {
        while (n > 1 && i >= n) i = std::abs(2 * (n - 1) - i);
        return n > 1 ? i : 0;
    };
    Doubles luma;
    for (Index y = 0; y < to_h; ++y) {
        for (Index x = 0; x < to_w; ++x) {
            const std::uint8_t* p = &frame[3 * (mirrored(y, h) * w + mirrored(x, w))];
            luma.push_back((0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]) / 255);
        }
    }
    check("frame_in", luma, 1e-6, [&](float* out) {
        const fuse::Planes<float> planes{out, 1, to_h, to_w};
        fuse::frame_in<std::uint8_t>(image, planes, fuse::Colour::rgb, 0.0f, 1.0f / 255.0f);
    });
    // Luma back under its own chroma is the frame.
    const Floats fused(luma.begin(), luma.end());
    const Doubles same(frame.begin(), frame.end());
    check("frame_out", same, 0, [&](float* out) {
        std::vector<std::uint8_t> back(frame.size());
        fuse::frame_out<std::uint8_t>({fused.data(), 1, to_h, to_w}, image,
                                      {back.data(), h, w, 3, 3 * w});
        std::copy(back.begin(), back.end(), out);
    });
}

// By H.273's equations, in float64 and not rounded; frames of all 8-bit values, legal or not.
void test_yuv(fuse::YuvFormat format, bool full_range, fuse::YuvMatrix matrix, Index h, Index w) {
    const bool packed = format == fuse::YuvFormat::yuyv;
    const Index bytes = packed ? 2 * h * w : h * w * 3 / 2;
    std::vector<std::uint8_t> frame;
    for (const float v : uniform(bytes, 19)) frame.push_back(static_cast<std::uint8_t>(v * 256));
    const double red = matrix == fuse::YuvMatrix::bt601 ? 0.299 : 0.2126;
    const double blue = matrix == fuse::YuvMatrix::bt601 ? 0.114 : 0.0722;
    Doubles expected;
    for (Index y = 0; y < h; ++y) {
        for (Index x = 0; x < w; ++x) {
            Index luma = y * w + x, u = 0, v = 0;
            if (packed) {
                luma *= 2;
                u = 2 * (y * w + x / 2 * 2) + 1;
                v = u + 2;
            } else if (format == fuse::YuvFormat::nv12) {
                u = h * w + y / 2 * w + x / 2 * 2;
                v = u + 1;
            } else {
                u = h * w + y / 2 * (w / 2) + x / 2;
                v = u + h * w / 4;
            }
            const double level = full_range ? frame[luma] : (frame[luma] - 16) / 219.0 * 255;
            const double unit = full_range ? 1 : 255.0 / 224;
            const double r = level + 2 * (1 - red) * unit * (frame[v] - 128);
            const double b = level + 2 * (1 - blue) * unit * (frame[u] - 128);
            const double g = (level - red * r - blue * b) / (1 - red - blue);
            for (const double value : {r, g, b}) {
                expected.push_back(std::min(std::max(value, 0.0), 255.0));
            }
        }
    }
    const fuse::YuvFrame image{frame.data(), h, w, packed ? 2 * w : w, format};
    check("yuv_to_rgb " + std::to_string(h) + "x" + std::to_string(w), expected, 0.5 + 1e-4,
          [&](float* out) {
              std::vector<std::uint8_t> rgb(expected.size());
              const fuse::Image<std::uint8_t> to{rgb.data(), h, w, 3, 3 * w};
              fuse::yuv_to_rgb(image, fuse::YuvWeights(full_range, matrix), to);
              std::copy(rgb.begin(), rgb.end(), out);
          });
}

void test_warp(Index h, Index w) {
    const Floats x = normal(2 * h * w, 17);
    const Floats matrix = {0.9f, 0.1f, 0.4f, -0.05f, 1.1f, -0.3f, 1e-3f, -2e-3f, 1.0f};
    Doubles expected;
    for (Index c = 0; c < 2; ++c) {
        for (Index i = 0; i < h * w; ++i) {
            const auto column = static_cast<double>(i % w), row = static_cast<double>(i / w);
            const double scale = matrix[6] * column + matrix[7] * row + matrix[8];
            const double u = (matrix[0] * column + matrix[1] * row + matrix[2]) / scale;
            const double v = (matrix[3] * column + matrix[4] * row + matrix[5]) / scale;
            double sum = 0;
            for (Index y = 0; y < h; ++y) {
                for (Index z = 0; z < w; ++z) {
                    const double hats = std::max(0.0, 1 - std::fabs(v - static_cast<double>(y))) *
                                        std::max(0.0, 1 - std::fabs(u - static_cast<double>(z)));
                    sum += hats * x[(c * h + y) * w + z];
                }
            }
            expected.push_back(sum);
        }
    }
    check("warp " + std::to_string(h) + "x" + std::to_string(w), expected, 2e-5, [&](float* out) {
        fuse::warp({x.data(), matrix.data(), out, 1, 2, h, w, h, w, false, true, false});
    });
}

}  // namespace

int main() {
    test_parallel();
    test_philox();
    test_storage();
    const Index attention[][5] = {{1, 4, 8, 9, 21}, {2, 3, 5, 1, 7}, {1, 4, 1, 6, 1},
                                  {1, 1, 3, 1, 1},  {1, 8, 19, 35, 40}};
    for (const auto& s : attention) test_attention(s[0], s[1], s[2], s[3], s[4]);
    test_norm(2, 6, 35, 3, 0, 1);
    test_norm(1, 4, 1, 2, 0, 1);
    test_norm(1, 2, 5000, 1, 30000, 20);  // raw thermal counts
    const Index filters[][3] = {{1, 12, 20}, {2, 15, 9}, {1, 7, 67}, {1, 1, 1}, {1, 1, 8}, {1, 71, 2}};
    for (const auto& s : filters) test_wiener(s[0], s[1], s[2]);
    for (const Index n : {1, 7, 1000}) test_steps(n);
    test_frames(5, 7, 8, 12);
    test_frames(1, 1, 4, 4);
    test_frames(33, 50, 33, 50);
    for (const auto format :
         {fuse::YuvFormat::yuyv, fuse::YuvFormat::nv12, fuse::YuvFormat::i420}) {
        for (const auto matrix : {fuse::YuvMatrix::bt601, fuse::YuvMatrix::bt709}) {
            for (const bool full_range : {false, true}) {
                test_yuv(format, full_range, matrix, 2, 2);
                test_yuv(format, full_range, matrix, 38, 1030);  // more than a block and a range
            }
        }
    }
    test_warp(9, 13);
    test_warp(1, 5);
    std::printf("%d cases, %d failures\n", cases, failures);
    return failures;
}
