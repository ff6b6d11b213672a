"""The metrics against their formulas, written down a second time in the plainest way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
from scipy.signal import convolve2d

from fuseengine import metrics
from fuseengine.metrics import METRICS, evaluate
from fuseengine.metrics.gradient import sobel
from tests.metrics.pictures import triple

EXACT = {"rel": 1e-9, "abs": 1e-9}


def floats(*given):
    return [x.astype(np.float64) for x in given]


def window(size, sigma):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    w = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    return w / w.sum()


def local(w, x, y=None):
    """Mean under a window, or covariance."""

    def mean(z):
        return convolve2d(z, w[::-1, ::-1], mode="valid")

    return mean(x) if y is None else mean(x * y) - mean(x) * mean(y)


def ssim_map(w, x, y, c1, c2, unbiased=1.0):
    mx, my = local(w, x), local(w, y)
    vx, vy, cov = (unbiased * local(w, *pair) for pair in ((x, x), (y, y), (x, y)))
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class TestStatistics:
    def test_by_hand(self):
        f = np.array([[0, 0], [0, 4]], np.uint8)
        assert metrics.entropy(f) == pytest.approx(0.75 * np.log2(4 / 3) + 0.25 * 2)
        assert metrics.standard_deviation(f) == pytest.approx(np.sqrt(3))
        assert metrics.spatial_frequency(f) == pytest.approx(np.sqrt(16 / 2 + 16 / 2))
        # One-sided differences at the border: sqrt((gx^2 + gy^2) / 2) of 0 0, 0 4, 4 0, 4 4.
        assert metrics.average_gradient(f) == pytest.approx(0 + 2 * np.sqrt(8) + 4)
        assert metrics.mse(f, f * 0, f) == pytest.approx(16 / 4 / 255**2 / 2)
        assert metrics.psnr(f, f * 0, f) == pytest.approx(10 * np.log10(255**2 / 2))

    def test_correlations(self):
        given = triple()
        f, a, b = (x.ravel() for x in floats(*given))

        def corr(x, y):
            return np.corrcoef(x, y)[0, 1]

        cc = (corr(a, f) + corr(b, f)) / 2
        assert metrics.correlation_coefficient(*given) == pytest.approx(cc, **EXACT)
        assert metrics.scd(*given) == pytest.approx(corr(f - b, a) + corr(f - a, b), **EXACT)
        assert metrics.standard_deviation(given[0]) == pytest.approx(f.std(), **EXACT)


class TestInformation:
    def entropy(self, *levels):
        counts = np.unique(np.stack([x.ravel() for x in levels]), axis=1, return_counts=True)[1]
        p = counts / counts.sum()
        return -(p * np.log2(p)).sum()

    def test_values(self):
        f, a, b = triple()
        stretched = [
            np.round(255 * (x - x.min()) / (x.max() - x.min()) + 1e-9) for x in floats(f, a, b)
        ]
        h = self.entropy
        mi = sum(h(x) + h(f) - h(x, f) for x in (a, b))
        assert metrics.mutual_information(f, a, b) == pytest.approx(mi, **EXACT)
        sf, sa, sb = stretched
        q_mi = 2 * sum((h(x) + h(sf) - h(x, sf)) / (h(x) + h(sf)) for x in (sa, sb))
        assert metrics.q_mi(f, a, b) == pytest.approx(q_mi, **EXACT)
        r = np.array(
            [[1 if i is j else (h(i) + h(j) - h(i, j)) / 8 for i in stretched] for j in stretched]
        )
        share = np.linalg.eigvalsh(r) / 3
        q_ncie = 1 + (share * np.log(share)).sum() / np.log(256)
        assert metrics.q_ncie(f, a, b) == pytest.approx(q_ncie, **EXACT)

    def test_joined_levels(self):
        """254 and 255 are one level in the joint histogram alone."""
        x = np.array([[254, 255], [254, 255]], np.uint8)
        assert metrics.mutual_information(x, x, x) == pytest.approx(2)
        assert metrics.mi_joint254(x, x, x) == pytest.approx(4)


class TestGradients:
    def sobel(self, x, mode):
        x = np.pad(x, 1, mode=mode)
        kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        dx = convolve2d(x, kernel[::-1, ::-1], mode="valid")
        dy = convolve2d(x, kernel.T[:, ::-1], mode="valid")  # 1 2 1 above, -1 -2 -1 below
        return dx, dy

    def test_sobel(self):
        f, *_ = triple((9, 11))
        for mode in ("constant", "reflect", "edge"):
            for ours, plain in zip(sobel(f, mode), self.sobel(f.astype(int), mode), strict=True):
                np.testing.assert_array_equal(ours, plain)
        step = np.zeros((5, 5), np.uint8)
        step[:, 3:] = 1
        assert sobel(step, "edge")[0].max() == 4 and not sobel(step, "edge")[1].any()
        assert sobel(step.T.copy(), "edge")[1].min() == -4

    def edges(self, x, mode="constant"):
        dx, dy = self.sobel(x, mode)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.hypot(dx, dy), np.where(dx == 0, np.pi / 2, np.arctan(dy / dx))

    def test_qabf(self):
        f, a, b = floats(*triple())
        gf, af = self.edges(f)
        kept = total = 0.0
        for x in (a, b):
            g, angle = self.edges(x)
            ratio = np.where(g == gf, gf, np.minimum(g, gf) / np.maximum(np.maximum(g, gf), 1e-9))
            d = 1 - abs(angle - af) / (np.pi / 2)
            q = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (d - 0.8)))
            kept, total = kept + (q * g).sum(), total + g.sum()
        assert metrics.qabf(*triple()) == pytest.approx(kept / total, **EXACT)

    def test_petrovic(self):
        f, a, b = floats(*triple())

        def edges(x):
            dx, dy = self.sobel(x, "reflect")
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.hypot(dx, dy) / 8, np.nan_to_num(np.arctan(dx / -dy), nan=0)

        gf, af = edges(f)
        ga, gb = edges(a)[0], edges(b)[0]
        stronger = (gf > ga) & (gf > gb)
        kept = lost = added = total = 0.0
        for x in (a, b):
            g, angle = edges(x)
            ratio = np.minimum(g, gf) / np.maximum(np.maximum(g, gf), 1e-12)
            d = abs(abs(angle - af) - np.pi / 2) * 2 / np.pi
            q = 0.9999 / (1 + np.exp(-19 * (ratio - 0.5))) * 0.9995 / (1 + np.exp(-22 * (d - 0.5)))
            q, w = np.sqrt(q), np.where(g >= 2, g**1.5, 0.001)
            kept += (q * w).sum()
            added += ((1 - q) * w)[stronger].sum()
            lost += ((1 - q) * w)[~stronger].sum()
            total += w.sum()
        given = triple()
        assert metrics.qpv(*given) == pytest.approx(kept / total, **EXACT)
        assert metrics.labf(*given) == pytest.approx(lost / total, **EXACT)
        assert metrics.nabf(*given) == pytest.approx(added / total, **EXACT)
        assert metrics.qpv(*given) + metrics.labf(*given) + metrics.nabf(*given) == pytest.approx(1)

    def test_q_g(self):
        f, a, b = floats(*triple())

        def edges(x):
            dx, dy = self.sobel(x, "constant")
            dx = np.where(dx == 0, 1e-5, dx)
            return np.hypot(dx, dy), np.arctan(dy / dx)

        gf, af = edges(f)
        kept = total = 0.0
        for x in (a, b):
            g, angle = edges(x)
            ratio = np.minimum(g, gf) / np.maximum(g, gf)
            d = abs(abs(angle - af) - np.pi / 2) * 2 / np.pi
            q = 1 / (1 + np.exp(-10 * (ratio - 0.5))) / (1 + np.exp(-20 * (d - 0.75)))
            kept, total = kept + q * g, total + g
        assert metrics.q_g(*triple()) == pytest.approx((kept / total).mean(), **EXACT)


class TestStructure:
    def test_ssim(self):
        f, a, b = floats(*triple())
        w = window(11, 1.5)
        value = sum(ssim_map(w, x, f, C1, C2).mean() for x in (a, b)) / 2
        assert metrics.ssim(*triple()) == pytest.approx(value, **EXACT)
        value = sum(ssim_map(w, x, f, 1e-4, 9e-4).mean() for x in (a, b)) / 2
        assert metrics.ssim_range1(*triple()) == pytest.approx(value, **EXACT)
        w = np.full((7, 7), 1 / 49)
        value = sum(ssim_map(w, x, f, 4e-4, 3.6e-3, 49 / 48).mean() for x in (a, b))
        assert metrics.ssim_uniform7_r2_sum(*triple()) == pytest.approx(value, **EXACT)

    def test_ms_ssim(self):
        """An odd side is bordered by zeros at both ends, which count."""
        weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
        w, given = window(11, 1.5), triple((165, 172))

        def halve(x):
            x = np.pad(x, [(n % 2, n % 2) for n in x.shape])
            x = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
            return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4

        def value(x, f):
            product = 1.0
            for level, weight in enumerate(weights):
                # With an infinite first constant the luminance term is 1.
                c1 = C1 if level == 4 else 1e30
                product *= max(ssim_map(w, x, f, c1, C2).mean(), 0) ** weight
                x, f = halve(x), halve(f)
            return product

        f, a, b = floats(*given)
        mean = (value(a, f) + value(b, f)) / 2
        assert metrics.ms_ssim(*given) == pytest.approx(mean, rel=1e-8)
        double = [255 * x for x in (f, a, b)]
        total = value(double[1], double[0]) + value(double[2], double[0])
        assert metrics.ms_ssim_x255_sum(*given) == pytest.approx(total, rel=1e-8)

    def test_mef_ssim(self):
        """Patch by patch."""
        given = triple((17, 19))
        f, a, b = floats(*given)
        w = window(11, 1.5).ravel()
        values = []
        for y in range(7):
            for x in range(9):
                patch = slice(y, y + 11), slice(x, x + 11)
                centred = [source[patch].ravel() - source[patch].mean() for source in (a, b)]
                norms = [np.linalg.norm(v) for v in centred]
                ratio = np.linalg.norm(sum(centred)) / sum(norms)
                power = min(np.tan(np.pi / 2 * min(ratio, 1 - 1e-15)), 10)
                strength = [norm + 0.001 for norm in norms]
                weights = [(e / 11) ** power for e in strength]
                wanted = sum(
                    wk / sum(weights) * v / e
                    for wk, v, e in zip(weights, centred, strength, strict=True)
                )
                wanted *= max(strength) / np.linalg.norm(wanted)
                fused = f[patch].ravel()
                wanted, fused = wanted - (w * wanted).sum(), fused - (w * fused).sum()
                numerator = 2 * (w * wanted * fused).sum() + C2
                values.append(numerator / ((w * wanted**2).sum() + (w * fused**2).sum() + C2))
        assert metrics.mef_ssim(*given) == pytest.approx(np.mean(values), rel=1e-8)

    def test_piella(self):
        f, a, b = floats(*triple())

        def indices(f, a, b):
            w = window(11, 1.5)
            va, vb = local(w, a, a), local(w, b, b)
            share = va / (va + vb)
            q = share * ssim_map(w, a, f, C1, C2) + (1 - share) * ssim_map(w, b, f, C1, C2)
            weight = np.maximum(va, vb)
            return q.mean(), (weight * q).sum() / weight.sum()

        def prewitt(x):
            kernel = np.ones((3, 1)) @ [[1, 0, -1]]
            parts = (convolve2d(x, k, mode="same") for k in (kernel, kernel.T))
            return np.hypot(*parts)

        q_s, q_w = indices(f, a, b)
        assert metrics.q_s(*triple()) == pytest.approx(q_s, **EXACT)
        assert metrics.q_w(*triple()) == pytest.approx(q_w, **EXACT)
        _, edges = indices(*(prewitt(x) for x in (f, a, b)))
        assert metrics.q_e(*triple()) == pytest.approx(q_w * edges, **EXACT)

    def test_yang_and_cvejic(self):
        f, a, b = floats(*triple())
        w, tiny = window(7, 1.5), 2e-16
        sa, sb, sab = (ssim_map(w, *pair, tiny, tiny) for pair in ((a, f), (b, f), (a, b)))
        va, vb = local(w, a, a), local(w, b, b)
        share = va / (va + vb)
        q_y = np.where(sab >= 0.75, share * sa + (1 - share) * sb, np.maximum(sa, sb))
        assert metrics.q_y(*triple()) == pytest.approx(q_y.mean(), **EXACT)
        t = local(w, a, f) / (local(w, a, f) + local(w, b, f))
        q_c = np.where(t < 0, 0, np.where(t > 1, 1, t * sa + (1 - t) * sb))
        assert metrics.q_c(*triple()) == pytest.approx(q_c.mean(), **EXACT)


class TestFidelity:
    def scales(self, f, a, b):
        for scale in range(4):
            n = 2 ** (4 - scale) + 1
            w = window(n, n / 5)
            if scale:
                f, a, b = (local(w, x)[::2, ::2] for x in (f, a, b))
            yield w, f, a, b

    def gain(self, w, x, f):
        s1, s2 = (np.maximum(local(w, y, y), 0) for y in (x, f))
        s12 = local(w, x, f)
        g = s12 / (s1 + 1e-10)
        v = s2 - g * s12
        v, g = np.where(g < 0, s2, v), np.maximum(g, 0)
        return g, np.maximum(v, 1e-10), s1

    def test_values(self):
        given = triple((75, 83))
        kept, whole, v_s = np.zeros(2), np.zeros(2), []
        for w, f, a, b in self.scales(*floats(*given)):
            parts = [self.gain(w, x, f) for x in (a, b)]
            for k, (g, v, s) in enumerate(parts):
                kept[k] += np.log(1 + g**2 * s / (v + 2)).sum()
                whole[k] += np.log(1 + s / 2).sum()
            noise = 0.005 * 255**2
            n = [np.log10(1 + g**2 * s / (v + noise)) for g, v, s in parts]
            d = [np.log10(1 + s / noise) for g, v, s in parts]
            first = parts[0][0] < parts[1][0]
            n, d = np.where(first, *n) + 1e-7, np.where(first, *d) + 1e-7
            v_s.append(n.sum() / d.sum())
        assert metrics.vif(*given) == pytest.approx((kept / whole).sum(), rel=1e-7)
        viff = np.dot([1, 0, 0.15, 1], v_s) / 2.15
        assert metrics.viff(*given) == pytest.approx(viff, rel=1e-7)


class TestContrast:
    def stretched(self, given):
        return [np.floor(255 * (x - x.min()) / (x.max() - x.min()) + 0.5) for x in floats(*given)]

    def filtered(self, x, divisor, response):
        height, width = x.shape
        fy, fx = ((np.arange(n) - n // 2) * 2 / n for n in x.shape)
        r = np.hypot((height / divisor * fy)[:, None], width / divisor * fx)
        spectrum = scipy.fft.fftshift(scipy.fft.fft2(x)) * response(r)
        return scipy.fft.ifft2(scipy.fft.ifftshift(spectrum)).real

    @pytest.mark.parametrize("shape", [(40, 50), (41, 53)])
    def test_q_cb(self, shape):
        given = triple(shape)
        grid = np.hypot(*np.mgrid[-15:16, -15:16])

        def contrast(x):
            x = self.filtered(
                x,
                30,
                lambda r: np.exp(-((r / 15.387) ** 2)) - 0.7622 * np.exp(-((r / 1.3456) ** 2)),
            )
            fine, coarse = (
                convolve2d(x, np.exp(-(grid**2) / (2 * s**2)) / (2 * np.pi * s**2), mode="same")
                for s in (2, 4)
            )
            c = abs(fine / coarse - 1)
            return c**3 / (c**2 + 1e-4)

        f, a, b = (contrast(x) for x in self.stretched(given))
        share = a**2 / (a**2 + b**2)
        q = [np.minimum(x, f) / np.maximum(x, f) for x in (a, b)]
        value = (share * q[0] + (1 - share) * q[1]).mean()
        assert metrics.q_cb(*given) == pytest.approx(value, **EXACT)

    @pytest.mark.parametrize("shape", [(40, 50), (41, 53), (48, 64)])
    def test_q_cv(self, shape):
        given = triple(shape)
        f, a, b = self.stretched(given)

        def blocks(x):
            x = np.pad(x, [(0, -n % 16) for n in x.shape])
            height, width = x.shape
            return x.reshape(height // 16, 16, width // 16, 16).swapaxes(1, 2)

        saliency, error = [], []
        for x in (a, b):
            kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
            g = np.hypot(*(convolve2d(x, k, mode="same") for k in (kernel, kernel.T)))
            saliency.append((blocks(g) ** 5).sum((2, 3)))
            d = self.filtered(
                x - f, 8, lambda r: 2.6 * (0.0192 + 0.144 * r) * np.exp(-((0.144 * r) ** 1.1))
            )
            error.append((blocks(d) ** 2).mean((2, 3)))
        value = sum((s * e).sum() for s, e in zip(saliency, error, strict=True))
        value /= sum(s.sum() for s in saliency)
        assert metrics.q_cv(*given) == pytest.approx(value, rel=1e-9)


def plain_congruency(x):
    """Phase congruency and its moments by complex filters on the whole plane."""
    height, width = x.shape

    def frequencies(n):
        return (np.arange(n) - n // 2) / (n - n % 2)

    fy, fx = np.meshgrid(frequencies(height), frequencies(width), indexing="ij")
    rho, theta = (scipy.fft.ifftshift(m) for m in (np.hypot(fy, fx), np.arctan2(-fy, fx)))
    ly, lx = ((np.arange(n) - n // 2) / n for n in x.shape)
    low_pass = scipy.fft.fftshift(1 / (1 + (np.hypot(ly[:, None], lx) / 0.45) ** 30))
    rho[0, 0] = 1
    spectrum = scipy.fft.fft2(x)
    total, amplitudes = np.zeros(x.shape), np.zeros(x.shape)
    cx, cy, cxy = np.zeros((3, *x.shape))
    for orientation in range(6):
        angle = orientation * math.pi / 6
        d = abs((theta - angle + math.pi) % (2 * math.pi) - math.pi)
        spread = np.exp(-(d**2) / (2 * (math.pi / 7.2) ** 2))
        filters = [
            np.exp(-(np.log(rho * 3 * 2.1**s) ** 2) / (2 * math.log(0.55) ** 2)) * low_pass * spread
            for s in range(4)
        ]
        for g in filters:
            g[0, 0] = 0
        e = np.array([scipy.fft.ifft2(spectrum * g) for g in filters])
        amplitude = abs(e)
        unit = e.sum(0) / (abs(e.sum(0)) + 1e-4)
        turned = e * unit.conj()
        energy = (turned.real - abs(turned.imag)).sum(0)
        f = np.array([scipy.fft.ifft2(g).real for g in filters]) * math.sqrt(x.size)
        power = np.median(amplitude[0] ** 2) / math.log(2) / (filters[0] ** 2).sum()
        squares = (f**2).sum()
        pairs = sum((f[s] * f[t]).sum() for s in range(4) for t in range(s + 1, 4))
        tau = math.sqrt((2 * power * squares + 4 * power * pairs) / 2)
        noise = (tau * math.sqrt(math.pi / 2) + 2 * tau * math.sqrt(2 - math.pi / 2)) / 1.7
        width_of = amplitude.sum(0) / (amplitude.max(0) + 1e-4) / 4
        energy = np.maximum(energy - noise, 0) / (1 + np.exp(10 * (0.5 - width_of)))
        total += energy
        amplitudes += amplitude.sum(0)
        pc = energy / amplitude.sum(0)
        cx += (pc * math.cos(angle)) ** 2 / 3
        cy += (pc * math.sin(angle)) ** 2 / 3
        cxy += pc**2 * math.cos(angle) * math.sin(angle) / 6
    d = np.sqrt(cxy**2 + (cx - cy) ** 2) + 1e-4
    return total / (amplitudes + 1e-4), (cx + cy + d) / 2, (cx + cy - d) / 2


@pytest.mark.parametrize("shape", [(48, 64), (41, 52), (40, 53), (45, 51)])
def test_q_p(shape):
    """Odd sides shift the low-pass against the other filters."""
    given = triple(shape)
    f, a, b = (plain_congruency(x) for x in floats(*given))
    masks = [a[0] > 0.1, b[0] > 0.1, np.maximum(a[0], b[0]) > 0.1]
    w, value = window(11, 1.5), 1.0
    for kind in range(3):
        maximum = np.where(a[0] >= b[0], a[kind], b[kind])
        padded_f = np.pad(f[kind], 5)
        found = []
        for source, mask in zip((a[kind], b[kind], maximum), masks, strict=True):
            x = np.pad(source * mask, 5)
            scale = np.sqrt(abs(local(w, x, x) * local(w, padded_f, padded_f)))
            found.append(np.where(mask, (local(w, x, padded_f) + 1e-4) / (scale + 1e-4), 0))
        value *= np.maximum.reduce(found).sum() / masks[2].sum()
    assert metrics.q_p(*given) == pytest.approx(value, rel=1e-9)


RECORDED = {
    "EN": 6.98071273559,
    "SD": 30.7533263158,
    "SF": 47.3417299031,
    "AG": 14.6742289469,
    "CC": 0.319273239527,
    "SCD": 0.506161166328,
    "MI": 2.45425079645,
    "MSE": 0.040476174992,
    "PSNR": 13.9280053516,
    "VIF": 0.266745129344,
    "VIFF": 0.00422557989228,
    "Qabf": 0.275567759729,
    "Nabf": 0.00814829507107,
    "Labf": 0.41421035037,
    "Qpv": 0.577641354559,
    "SSIM": 0.329355646092,
    "MS_SSIM": 0.444019068552,
    "MEF_SSIM": 0.467913330604,
    "MEF_MS_SSIM": 0.410755014085,
    "FMI_edge": 0.932515337423,
    "FMI_none": 0.330483972271,
    "FMI_gradient": 0.293264980453,
    "FMI_dct": 0.152964963532,
    "Q_MI": 0.339735467681,
    "Q_NCIE": 0.805737706298,
    "Q_G": 0.295551920405,
    "Q_P": 0.232791716202,
    "Q_S": 0.343650887389,
    "Q_W": 0.347042794066,
    "Q_E": 0.121704481858,
    "Q_C": 0.882982190904,
    "Q_Y": 0.763138157964,
    "Q_CB": 0.5707304133,
    "Q_CV": 897.322930282,
    "SD_u8": 9.72944521481,
    "SF_unit_range": 0.185653842757,
    "AG_hw": 14.5033543709,
    "MI_nats": 1.70115701995,
    "MI_joint254": 2.45425079645,
    "PSNR_plus48": 62.0588089603,
    "PSNR_peak_max": 12.032278964,
    "VIF_mean": 0.133372564672,
    "VIF_u8": 0.596559331361,
    "Qabf_unit_range": 0.275569843451,
    "Nabf_swapped": 0.0854458962872,
    "SSIM_range1": 0.311557213652,
    "SSIM_uniform7_R2_sum": 0.61089123454,
    "MS_SSIM_x255_sum": 0.87148041626,
}


def test_recorded():
    """Values of one made-up case, written down when all reference values were met."""
    values = evaluate(*triple((165, 178)), METRICS)
    assert values == pytest.approx(RECORDED, rel=1e-8, abs=1e-10)
