"""Discrete Fourier transforms on the chip: functions that Triton kernels call, and their constants.

    X[f] = sum_t x[t] w_n^(t f)        w_n = e^(-2 pi i / n)

A program holds some lines of n complex samples, real and imaginary parts apart, in float32. With
n = n1 n2 n3, t = n2 n3 a + n3 b + g and f = c + n1 d + n1 n2 e (Cooley and Tukey 1965) it is three
products with dense matrices of at most 16 x 16, which the tensor cores do, and two multiplications:

    Y[c, b, g] = w_n^((n3 b + g) c)  sum_a w_n1^(a c) x[a, b, g]
    Z[c, d, g] = w_(n2 n3)^(g d)     sum_b w_n2^(b d) Y[c, b, g]
    X[c, d, e] =                     sum_g w_n3^(g e) Z[c, d, g]

``fft_down`` goes that way, from tiles of *samples* [(b, g, line), a] to tiles of *frequencies*
[(d, c, line), e]; ``fft_up`` is the same transform (it is symmetric in t and f) from tiles of the
second kind to tiles of the first, so that what follows a transform starts where it ended and
nothing is sorted. The inverse is the forward transform with real and imaginary parts exchanged
before and after; nobody scales.

Sides of tiles are powers of two: a factor between is padded with zeros that stay on the chip, which
changes no sample. :func:`transform` takes the cheapest factors, of at most 16 each; so any
length up to 16 has a plan, and up to 4096 most without a prime factor above 13. Padding the line
itself with zeros would give another transform, not a longer one; so the other lengths up to 2048
are done by Bluestein's (1970) identity 2 t f = t^2 + f^2 - (f - t)^2:

    X[f] = v[f] sum_t (x[t] v[t]) conj v[f - t]         v[t] = w_2n^(t^2)

which is a convolution with conj v, exact in a circle of m >= 2 n - 1 samples, m a power of two: one
transform of length m down, a multiplication, one up again. Longer lines have no plan here.

Each product is a sum of at most 16 terms. In precision "tf32x3" the terms have about 22 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fuseengine.errors import SettingError
from fuseengine.kernels._triton import kernel, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

LARGEST_FACTOR = 16
"""Side of the largest matrix: one tile of the tensor cores, so that it takes few registers."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """How lines of one length are transformed.

    Attributes:
        n: the length.
        factors: n1, n2, n3 of the length that is transformed on the chip: n, or Bluestein's m.
        chirp: whether by Bluestein's identity.
    """

    n: int
    factors: tuple[int, int, int]
    chirp: bool

    @property
    def sides(self) -> tuple[int, int, int]:
        """The factors padded; the tensor cores take 8 and 16, butterflies 2 and 4, none 1."""
        first, *rest = self.factors
        return power_of_two(first, least=8), *(
            f if f in exact else power_of_two(f, least=8)
            for f, exact in zip(rest, ((1,), (1, 2, 4)), strict=True)
        )

    @property
    def samples(self) -> int:
        """Of one line on the chip, padding included."""
        return math.prod(self.sides)

    @property
    def products(self) -> int:
        """Complex multiplications of one line in matrix products."""
        one = self.samples * sum(side for side in self.sides if side > 1)
        return 2 * one if self.chirp else one

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of a kernel."""
        names = ("R1", "R2", "R3", "N1", "N2", "N3")
        return {**dict(zip(names, self.factors + self.sides, strict=True)), "CHIRP": self.chirp}


@functools.cache
def transform(n: int) -> Transform | None:
    """The plan for lines of a length of at least 1; None for one that these kernels do not do."""
    whole = _cheapest(n, n, chirp=False)
    if whole is not None:
        return whole
    length = power_of_two(2 * n - 1)
    return _cheapest(n, length, chirp=True)


def _cheapest(n: int, length: int, *, chirp: bool) -> Transform | None:
    factors = range(1, LARGEST_FACTOR + 1)
    plans = [
        Transform(n, (first, second, length // (first * second)), chirp)
        for first in factors
        for second in factors
        if length % (first * second) == 0 and length // (first * second) <= LARGEST_FACTOR
    ]

    def cost(plan: Transform) -> tuple[int, int]:
        # Outer factors that need no padding keep neighbours in memory together.
        padded = sum(f != s for f, s in zip(plan.factors[::2], plan.sides[::2], strict=True))
        return plan.products, padded

    return min(plans, key=cost, default=None)


@functools.cache
def table(n: int, device: torch.device) -> Tensor:
    """The constants of the plan of a length: flat, float32, made in float64.

    The three matrices, the numbers between the products and, with a chirp, v and the transform of
    conj v over m; of each the real parts before the imaginary ones, padded with zeros, in the order
    of the tile that they belong to. At most 100 KB. Never dropped: a CUDA graph may still read it.

    Raises:
        SettingError: the length has no plan.
    """
    plan = transform(n)
    if plan is None:
        raise SettingError(
            f"lines of {n} samples; expected at most 2048, or up to 4096 that are a product of "
            "three factors of at most 16: use torch.fft"
        )
    n1, n2, n3 = plan.factors
    sides = s1, s2, s3 = plan.sides
    length = math.prod(plan.factors)
    parts = [_padded(_roots(_outer(k, k), k), (s, s)) for k, s in zip(plan.factors, sides)]  # noqa: B905
    between = _roots(_outer(n2 * n3, n1), length).reshape(n2, n3, n1)
    parts += [_padded(between, (s2, s3, s1)), _padded(_roots(_outer(n3, n2), n2 * n3), (s3, s2))]
    if plan.chirp:
        t = torch.arange(n)
        chirp = torch.zeros(length, dtype=torch.complex128)
        chirp[:n] = _roots(t * t, 2 * n)
        circle = chirp.conj().resolve_conj()
        circle[length - n + 1 :] = circle[1:n].flip(0)
        # Divided by m: the way up is an inverse transform.
        response = torch.fft.fft(circle) / length
        parts += [
            _padded(chirp.reshape(n1, n2, n3).permute(1, 2, 0), (s2, s3, s1)),
            _padded(response.reshape(n3, n2, n1).permute(1, 2, 0), (s2, s1, s3)),
        ]
    flat = torch.cat([torch.cat([p.real.reshape(-1), p.imag.reshape(-1)]) for p in parts])
    return flat.to(device=device, dtype=torch.float32)


def _outer(rows: int, columns: int) -> Tensor:
    return torch.outer(torch.arange(rows), torch.arange(columns))


def _roots(k: Tensor, n: int) -> Tensor:
    """w_n^k, complex128."""
    angle = (k % n).double() * (-2 * math.pi / n)
    return torch.polar(torch.ones_like(angle), angle)


def _padded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    out = x.new_zeros(shape)
    out[tuple(slice(0, size) for size in x.shape)] = x
    return out


# --- Triton --------------------------------------------------------------------------------------
#
# R1, R2, R3: the factors; N1, N2, N3: the sides; LINES: lines of a tile. ACROSS: neighbours in
# memory belong to different lines (columns of a picture), so the line is a tile's fastest index;
# else it is the slowest.


@kernel
def _row(ROWS: tl.constexpr, LINES: tl.constexpr, ACROSS: tl.constexpr):
    """Row within its line, and line, of each row of a tile."""
    row = tl.arange(0, ROWS * LINES)[:, None]
    if ACROSS:
        row, line = row // LINES, row % LINES
    else:
        row, line = row % ROWS, row // ROWS
    return row, line


@kernel
def _index(row, R: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """The row that two digits, the lower one of R padded to N, have without padding."""
    if R == N:
        index, inside = row, row < COUNT * R
    else:
        index, inside = (row // N) * R + row % N, (row // N < COUNT) & (row % N < R)
    return index, inside


@kernel
def fft_samples(
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    LINES: tl.constexpr, ACROSS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """t, line, and whether an element is no padding, of tiles of samples, [N2 N3 LINES, N1]."""
    row, line = _row(N2 * N3, LINES, ACROSS)
    a = tl.arange(0, N1)[None, :]
    low, inside = _index(row, R3, N3, R2)
    return low + a * (R2 * R3), line, inside & (a < R1)


@kernel
def fft_frequencies(
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    LINES: tl.constexpr, ACROSS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """f, line, and whether an element is no padding, of tiles of frequencies, [N2 N1 LINES, N3]."""
    row, line = _row(N2 * N1, LINES, ACROSS)
    e = tl.arange(0, N3)[None, :]
    low, inside = _index(row, R1, N1, R2)
    return low + e * (R1 * R2), line, inside & (e < R3)


@kernel
def _times(re, im, factor, row, ROWS: tl.constexpr, SIDE: tl.constexpr):
    """Each row of a tile [.., SIDE] times a row of complex numbers [ROWS, SIDE]."""
    at = factor + row * SIDE + tl.arange(0, SIDE)[None, :]
    by_re, by_im = tl.load(at), tl.load(at + ROWS * SIDE)
    return re * by_re - im * by_im, re * by_im + im * by_re


@kernel
def _relaid(re, im, SHAPE: tl.constexpr, ORDER: tl.constexpr, SIDE: tl.constexpr):
    """Both parts with another digit as the columns."""
    rows: tl.constexpr = re.shape[0] * re.shape[1] // SIDE
    re = tl.reshape(tl.permute(tl.reshape(re, SHAPE), ORDER), [rows, SIDE])
    im = tl.reshape(tl.permute(tl.reshape(im, SHAPE), ORDER), [rows, SIDE])
    return re, im


@kernel
def _butterfly_2(x):
    first, second = tl.split(x)
    return tl.join(first + second, first - second)


@kernel
def _quarters(x):
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@kernel
def _from_quarters(x0, x1, x2, x3):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [x0.shape[0], 4])


@kernel
def _butterfly_4(re, im):
    re0, re1, re2, re3 = _quarters(re)
    im0, im1, im2, im3 = _quarters(im)
    even_re, even_im, odd_re, odd_im = re0 + re2, im0 + im2, re1 + re3, im1 + im3
    rest_re, rest_im, turn_re, turn_im = re0 - re2, im0 - im2, im1 - im3, re3 - re1
    re = _from_quarters(even_re + odd_re, rest_re + turn_re, even_re - odd_re, rest_re - turn_re)
    im = _from_quarters(even_im + odd_im, rest_im + turn_im, even_im - odd_im, rest_im - turn_im)
    return re, im


@kernel
def _product(re, im, matrix, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    """A tile [.., SIDE] times the matrix of a transform of at most SIDE samples."""
    if SIDE == 2:
        re, im = _butterfly_2(re), _butterfly_2(im)
    elif SIDE == 4:
        re, im = _butterfly_4(re, im)
    elif SIDE > 4:
        at = matrix + tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        by_re, by_im = tl.load(at), tl.load(at + SIDE * SIDE)
        out_re = tl.dot(re, by_re, input_precision=PRECISION)
        out_re -= tl.dot(im, by_im, input_precision=PRECISION)
        out_im = tl.dot(re, by_im, input_precision=PRECISION)
        im = tl.dot(im, by_re, out_im, input_precision=PRECISION)
        re = out_re
    return re, im


@kernel
def fft_down(
    re, im, table,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    LINES: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """From samples to frequencies; padding must be zero."""
    second = table + 2 * N1 * N1
    third = second + 2 * N2 * N2
    between_1 = third + 2 * N3 * N3
    between_2 = between_1 + 2 * N1 * N2 * N3

    re, im = _product(re, im, table, N1, PRECISION)
    row, _ = _row(N2 * N3, LINES, ACROSS)
    if N2 * N3 > 1:
        re, im = _times(re, im, between_1, row, N2 * N3, N1)
    if ACROSS:
        re, im = _relaid(re, im, (N2, N3, LINES, N1), (3, 1, 2, 0), N2)
    else:
        re, im = _relaid(re, im, (LINES, N2, N3, N1), (0, 3, 2, 1), N2)

    re, im = _product(re, im, second, N2, PRECISION)
    row, _ = _row(N1 * N3, LINES, ACROSS)
    if N2 > 1 and N3 > 1:
        re, im = _times(re, im, between_2, row % N3, N3, N2)
    if ACROSS:
        re, im = _relaid(re, im, (N1, N3, LINES, N2), (3, 0, 2, 1), N3)
    else:
        re, im = _relaid(re, im, (LINES, N1, N3, N2), (0, 3, 1, 2), N3)
    return _product(re, im, third, N3, PRECISION)


@kernel
def fft_up(
    re, im, table,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    LINES: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """From frequencies to samples; padding must be zero."""
    second = table + 2 * N1 * N1
    third = second + 2 * N2 * N2
    between_1 = third + 2 * N3 * N3
    between_2 = between_1 + 2 * N1 * N2 * N3

    re, im = _product(re, im, third, N3, PRECISION)
    if ACROSS:
        re, im = _relaid(re, im, (N2, N1, LINES, N3), (1, 3, 2, 0), N2)
    else:
        re, im = _relaid(re, im, (LINES, N2, N1, N3), (0, 2, 3, 1), N2)
    row, _ = _row(N1 * N3, LINES, ACROSS)
    if N2 > 1 and N3 > 1:
        re, im = _times(re, im, between_2, row % N3, N3, N2)

    re, im = _product(re, im, second, N2, PRECISION)
    if ACROSS:
        re, im = _relaid(re, im, (N1, N3, LINES, N2), (3, 1, 2, 0), N1)
    else:
        re, im = _relaid(re, im, (LINES, N1, N3, N2), (0, 3, 2, 1), N1)
    row, _ = _row(N2 * N3, LINES, ACROSS)
    if N2 * N3 > 1:
        re, im = _times(re, im, between_1, row, N2 * N3, N1)
    return _product(re, im, table, N1, PRECISION)


@kernel
def _fft_chirp(
    re, im, table,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    LINES: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bluestein's transform, from samples to samples."""
    chirp = table + 2 * (N1 * N1 + N2 * N2 + N3 * N3 + N1 * N2 * N3 + N2 * N3)
    response = chirp + 2 * N1 * N2 * N3
    row, _ = _row(N2 * N3, LINES, ACROSS)
    re, im = _times(re, im, chirp, row, N2 * N3, N1)
    re, im = fft_down(re, im, table, N1, N2, N3, LINES, ACROSS, PRECISION)
    # Constants are loaded again for the way up, instead of staying in registers.
    tl.debug_barrier()
    place, _ = _row(N2 * N1, LINES, ACROSS)
    re, im = _times(re, im, response, place, N2 * N1, N3)
    im, re = fft_up(im, re, table, N1, N2, N3, LINES, ACROSS, PRECISION)
    return _times(re, im, chirp, row, N2 * N3, N1)


@kernel
def fft_to(
    re, im, table,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, CHIRP: tl.constexpr,
    LINES: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Tiles of samples to the transform, whose elements :func:`fft_places` names."""
    if CHIRP:
        re, im = _fft_chirp(re, im, table, N1, N2, N3, LINES, ACROSS, PRECISION)
    else:
        re, im = fft_down(re, im, table, N1, N2, N3, LINES, ACROSS, PRECISION)
    return re, im


@kernel
def fft_from(
    re, im, table,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, CHIRP: tl.constexpr,
    LINES: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """A forward transform as well, of tiles as :func:`fft_places` names them, to samples."""
    if CHIRP:
        re, im = _fft_chirp(re, im, table, N1, N2, N3, LINES, ACROSS, PRECISION)
    else:
        re, im = fft_up(re, im, table, N1, N2, N3, LINES, ACROSS, PRECISION)
    return re, im


@kernel
def fft_places(
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, CHIRP: tl.constexpr,
    LINES: tl.constexpr, ACROSS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """f, line, and whether an element is no padding, of a transform's tiles."""
    if CHIRP:
        f, line, inside = fft_samples(R1, R2, R3, N1, N2, N3, LINES, ACROSS)
    else:
        f, line, inside = fft_frequencies(R1, R2, R3, N1, N2, N3, LINES, ACROSS)
    return f, line, inside
