"""The joint observation model of DRFusion: degradation operators, their inverses, the correction.

A source picture x is observed as ``y = A x + n``. Each operator offers A and a pseudo-inverse A+
(paper's appendix C); operators compose as A = A_p ... A_1 with inverse A_1+ ... A_p+.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fuseengine.errors import SettingError
from fuseengine.kernels import block_mean, block_repeat, circular_convolution, wiener_deconvolution


class Operator(nn.Module):
    """A linear degradation A of pictures (N, C, H, W)."""

    multiple: int = 1
    """Height and width of the picture must be a multiple of this."""

    def apply_to(self, x: Tensor) -> Tensor:
        """A x."""
        raise TypeError(f"{type(self).__name__} does not define A x")

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A+ y."""
        raise TypeError(f"{type(self).__name__} does not define A+ y")

    def observed(self, frame: Tensor) -> Tensor:
        """The observation y behind a frame of the picture's size.

        A low-resolution frame comes enlarged, because both sources of a pair have one size; block
        means take that back (exactly, if each pixel was repeated).
        """
        return frame


class Identity(Operator):
    """Noise only: A = A+ = I."""

    def apply_to(self, x: Tensor) -> Tensor:
        """X itself."""
        return x

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Y itself."""
        return y


class Blur(Operator):
    """Circular convolution with a kernel; the inverse is the Wiener filter.

    ``A+ = F^-1[ conj(K) / (|K|^2 + regularisation) F[.] ]``.

    Args:
        kernel: (h, w) taps, h and w odd; the centre tap stands at the origin.
        regularisation: lambda of the Wiener filter, >= 0; 0 is the exact inverse, which only
            exists where the kernel's spectrum has no zero.
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor, regularisation: float = 1e-2) -> None:
        super().__init__()
        kernel = torch.as_tensor(kernel)
        if kernel.ndim != 2 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
            raise SettingError(
                f"blur kernel of shape {tuple(kernel.shape)}; expected (h, w), both odd"
            )
        if regularisation < 0:
            raise SettingError(f"regularisation={regularisation}; expected a number >= 0")
        self.register_buffer("kernel", kernel.detach().clone(), persistent=False)
        self.regularisation = float(regularisation)

    @classmethod
    def gaussian(cls, sigma: float, regularisation: float = 1e-2) -> Blur:
        """Gaussian blur with standard deviation sigma in pixels, cut off at 3 sigma."""
        radius = max(1, math.ceil(3 * sigma))
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        kernel = torch.outer(taps, taps)
        return cls(kernel / kernel.sum(), regularisation)

    def apply_to(self, x: Tensor) -> Tensor:
        """X convolved circularly."""
        return circular_convolution(x, self.kernel)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Y through the Wiener filter."""
        return wiener_deconvolution(y, self.kernel, self.regularisation)


class Downsample(Operator):
    """Average pooling by an integer factor; the inverse repeats each value over its cell.

    An exact pair: A A+ = I and A+ is the Moore-Penrose inverse.

    Args:
        scale: factor s >= 1.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        if scale < 1:
            raise SettingError(f"scale={scale}; expected an integer >= 1")
        self.scale = self.multiple = int(scale)

    def apply_to(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H / s, W / s)."""
        return block_mean(x, self.scale)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """(N, C, H / s, W / s) -> (N, C, H, W)."""
        return block_repeat(y, self.scale)

    def observed(self, frame: Tensor) -> Tensor:
        """Block means of the enlarged frame."""
        return self.apply_to(frame)


class Compose(Operator):
    """Operators applied one after the other, the first one first.

    Args:
        operators: A_1, ..., A_p for A = A_p ... A_1.
    """

    def __init__(self, *operators: Operator) -> None:
        super().__init__()
        self.parts = nn.ModuleList(operators)
        # A later pooling needs multiples on the already pooled picture, so factors multiply.
        self.multiple = math.prod(operator.multiple for operator in operators)

    def apply_to(self, x: Tensor) -> Tensor:
        """A_p ... A_1 x."""
        for part in self.parts:
            x = part.apply_to(x)
        return x

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A_1+ ... A_p+ y."""
        for part in reversed(self.parts):
            y = part.pseudo_inverse(y)
        return y

    def observed(self, frame: Tensor) -> Tensor:
        """The poolings alone: blur is in the frame already."""
        for part in self.parts:
            frame = part.observed(frame)
        return frame


def correct_jointly(
    x0: Tensor,
    mask: Tensor,
    y1: Tensor,
    y2: Tensor,
    first: Operator,
    second: Operator,
    *,
    lam: float | Tensor = 1.0,
) -> Tensor:
    """``x0 - lam G (A x0 - y)`` with the block inverse G of the paper (equations 12 to 19).

    With ``d_i = A_i+ (A_i x_i - y_i)``: ``x_i' = x_i - lam d_i`` and
    ``f' = f - lam (W1 d1 + W2 d2 - (W1 x1 + W2 x2 - f))``, W1 = diag(mask), W2 = 1 - W1.

    Args:
        x0: (N, 3, H, W) estimate of [x1, x2, f].
        mask: (N, 1, H, W) weights of source 1, in [0, 1].
        y1: observation of source 1, in the shape that A1 gives.
        y2: observation of source 2, likewise.
        first: A1.
        second: A2.
        lam: scale of the correction; 1 makes f' = W1 x1' + W2 x2' exactly.

    Returns:
        (N, 3, H, W).
    """
    x1, x2, f = x0[:, 0:1], x0[:, 1:2], x0[:, 2:3]
    d1 = first.pseudo_inverse(first.apply_to(x1) - y1)
    d2 = second.pseudo_inverse(second.apply_to(x2) - y2)
    rest = 1.0 - mask
    df = mask * (d1 - x1) + rest * (d2 - x2) + f
    return torch.cat([x1 - d1 * lam, x2 - d2 * lam, f - df * lam], dim=1)


def project_jointly(
    x0: Tensor,
    mask: Tensor,
    y1: Tensor,
    y2: Tensor,
    first: Operator,
    second: Operator,
    *,
    iterations: int = 64,
    tolerance: float = 1e-12,
) -> Tensor:
    """The nearest point to x0 that meets all observations: the true projection.

    The block inverse of the paper is the Moore-Penrose inverse only for injective operators; this
    one is exact for every operator whose ``pseudo_inverse`` is its true inverse. With
    ``P_i = I - A_i+ A_i`` and ``a_i = x_i - A_i+ (A_i x_i - y_i)``:

        (I + W1 P1 W1 + W2 P2 W2) q = f - W1 a1 - W2 a2,
        x_i' = a_i + P_i W_i q,  f' = W1 x1' + W2 x2'.

    The symmetric positive definite system is solved by conjugate gradients without a matrix.

    Args:
        x0: (N, 3, H, W); the other arguments as in :func:`correct_jointly`.
        mask: (N, 1, H, W).
        y1: observation of source 1.
        y2: observation of source 2.
        first: A1.
        second: A2.
        iterations: most conjugate-gradient steps.
        tolerance: relative residual at which to stop.

    Returns:
        (N, 3, H, W).
    """
    x1, x2, f = x0[:, 0:1], x0[:, 1:2], x0[:, 2:3]
    w1, w2 = mask, 1.0 - mask

    def hidden(operator: Operator, v: Tensor) -> Tensor:
        return v - operator.pseudo_inverse(operator.apply_to(v))

    def system(q: Tensor) -> Tensor:
        return q + w1 * hidden(first, w1 * q) + w2 * hidden(second, w2 * q)

    a1 = x1 - first.pseudo_inverse(first.apply_to(x1) - y1)
    a2 = x2 - second.pseudo_inverse(second.apply_to(x2) - y2)
    q = _conjugate_gradients(system, f - w1 * a1 - w2 * a2, iterations, tolerance)
    x1 = a1 + hidden(first, w1 * q)
    x2 = a2 + hidden(second, w2 * q)
    return torch.cat([x1, x2, w1 * x1 + w2 * x2], dim=1)


def _conjugate_gradients(system, target: Tensor, iterations: int, tolerance: float) -> Tensor:  # noqa: ANN001
    """Solve system(q) = target per picture (Hestenes and Stiefel 1952)."""

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(dim=(1, 2, 3), keepdim=True)

    q = torch.zeros_like(target)
    residual = direction = target
    energy = dot(residual, residual)
    goal = energy * tolerance**2
    for _ in range(iterations):
        if bool((energy <= goal).all()):
            break
        image = system(direction)
        step = energy / dot(direction, image).clamp_min(torch.finfo(target.dtype).tiny)
        q = q + step * direction
        residual = residual - step * image
        energy, previous = dot(residual, residual), energy
        direction = (
            residual + energy / previous.clamp_min(torch.finfo(target.dtype).tiny) * direction
        )
    return q
