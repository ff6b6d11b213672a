"""Diffusion sampling, in one place: schedules, timesteps, steps, random numbers.

Everything that depends on the timestep alone is a Python number from float64 tables. The update
of a step is one op (:func:`~fuseengine.kernels.ddim_step` and its relatives); random numbers come
from the counter-based generator of :mod:`fuseengine.runtime.random`, by name, so that a seed gives
the same picture on every backend and a user can hand in each of them.

Sources: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol and Dhariwal 2021 (cosine schedule).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine.errors import SettingError
from fuseengine.kernels import ddim_step
from fuseengine.kernels._library import register
from fuseengine.runtime import random

# --- schedules ------------------------------------------------------------------------------------

Table = NDArray[np.float64]
"""abar after 0, 1, ..., T noising steps: (T + 1,) falling from 1."""


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 2e-2) -> Table:
    """Table of abar for betas that grow linearly (Ho et al. 2020, section 4)."""
    return np.concatenate([[1.0], np.cumprod(1.0 - np.linspace(first, last, steps))])


def cosine_schedule(steps: int, *, offset: float = 0.008, largest: float = 0.999) -> Table:
    """abar(k) = cos^2((k / T + s) / (1 + s) pi / 2) / abar(0), no beta above ``largest``.

    Nichol and Dhariwal 2021, equation 17; s is ``offset``.
    """
    angle = (np.arange(steps + 1) / steps + offset) / (1.0 + offset) * np.pi / 2
    wave = np.cos(angle) ** 2
    beta = np.minimum(1.0 - wave[1:] / wave[:-1], largest)
    return np.concatenate([[1.0], np.cumprod(1.0 - beta)])


def spaced_timesteps(total: int, steps: int) -> list[int]:
    """``range(0, total, total // steps)`` backwards: 800, 600, 400, 200, 0 for 5 of 1000.

    A number of steps that does not divide ``total`` gives one or more too many (3 of 1000: 999,
    666, 333, 0), as in the public codes.

    Raises:
        SettingError: steps outside 1..total.
    """
    if not 1 <= steps <= total:
        raise SettingError(f"steps={steps}; expected 1 to {total}")
    return list(range(0, total, total // steps))[::-1]


# --- steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One sampling step: numbers at inference, 0-d tensors where a schedule is learned.

    Attributes:
        t: timestep that the network is told.
        sqrt_abar: sqrt(abar_t).
        sqrt_one_minus_abar: sqrt(1 - abar_t).
        sqrt_abar_prev: sqrt(abar) of the step that comes next in sampling; 1 at the last.
        sqrt_one_minus_abar_prev: sqrt(1 - abar) of it.
    """

    t: int
    sqrt_abar: float | Tensor
    sqrt_one_minus_abar: float | Tensor
    sqrt_abar_prev: float | Tensor
    sqrt_one_minus_abar_prev: float | Tensor

    def scales(self) -> tuple[float | Tensor, ...]:
        """The four scales of the DDIM update, in the order the step ops take them."""
        return (
            self.sqrt_abar,
            self.sqrt_one_minus_abar,
            self.sqrt_abar_prev,
            self.sqrt_one_minus_abar_prev,
        )

    def scales_of_x0(self) -> tuple[float | Tensor, ...]:
        """The same for a network that predicts x0 in place of the noise.

        ``x' = sqrt(1 - abar') e + sqrt(abar') x0`` with ``e = (x - sqrt(abar) x0) / sqrt(1 -
        abar)`` has the form of the DDIM update with x0 and e, and their scales, exchanged.
        """
        abar, rest, abar_prev, rest_prev = self.scales()
        return rest, abar, rest_prev, abar_prev


def make_steps(table: Table, timesteps: Sequence[int], *, last: float = 1.0) -> list[Step]:
    """The steps through timesteps t = 0 .. T - 1 in descending order.

    Args:
        table: abar of a schedule; timestep t stands at index t + 1.
        timesteps: as from :func:`spaced_timesteps`.
        last: abar at which sampling ends.
    """
    abar = [float(table[t + 1]) for t in timesteps] + [last]
    return [
        Step(t, now**0.5, (1.0 - now) ** 0.5, then**0.5, (1.0 - then) ** 0.5)
        for t, (now, then) in zip(timesteps, pairwise(abar), strict=True)
    ]


def predict_x0(x: Tensor, eps: Tensor, step: Step) -> Tensor:
    """``(x - sqrt(1 - abar) eps) / sqrt(abar)``: the step that ends at abar = 1."""
    return ddim_step(x, eps, step.sqrt_abar, step.sqrt_one_minus_abar, 1.0, 0.0)


def predict_noise(x: Tensor, x0: Tensor, step: Step) -> Tensor:
    """``(x - sqrt(abar) x0) / sqrt(1 - abar)``: the inverse of :func:`predict_x0`."""
    return ddim_step(x, x0, step.sqrt_one_minus_abar, step.sqrt_abar, 1.0, 0.0)


def diffuse(x0: Tensor, noise: Tensor, sqrt_abar: float | Tensor) -> Tensor:
    """``sqrt(abar) x0 + sqrt(1 - abar) noise``: the step that starts at abar = 1.

    Args:
        x0: (N, C, H, W).
        noise: standard normal numbers, x0's shape.
        sqrt_abar: a number, or (N,), one per picture.
    """
    if isinstance(sqrt_abar, Tensor):
        sqrt_abar = sqrt_abar.reshape(-1, 1, 1, 1)
    return ddim_step(x0, noise, 1.0, 0.0, sqrt_abar, (1.0 - sqrt_abar**2) ** 0.5)


def sample_ddim(
    predict: Callable[[Tensor, Step], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    eta: float = 0.0,
    draws: Draws | None = None,
) -> Tensor:
    """DDIM from x_T to x_0; eta 1 over all timesteps is DDPM's ancestral sampling.

    Args:
        predict: (x_t, step) -> noise, x_t's shape.
        x: x_T, (N, C, H, W).
        steps: from :func:`make_steps`.
        eta: 0 (deterministic) to 1.
        draws: for eta above 0, where the noise ``z_t<t>`` of each step comes from.

    Returns:
        x_0, not clamped.
    """
    for step in steps:
        eps = predict(x, step)
        # A step that ends at abar = 1 adds no noise whatever eta is.
        if draws is None or eta == 0.0 or step.sqrt_one_minus_abar_prev == 0.0:
            x = ddim_step(x, eps, *step.scales())
        else:
            x = ddim_step(x, eps, *step.scales(), draws.normal(f"z_t{step.t}", x), eta)
    return x


# --- random numbers -------------------------------------------------------------------------------


class Draws:
    """The random numbers of one forward, by name: handed in, or drawn from a seed's streams.

    Args:
        names: every name that the model may ask for.
        given: name -> tensor for what is handed in; the rest is drawn.
        seed: of the generator.

    Raises:
        SettingError: a name that the model does not ask for.
    """

    def __init__(
        self, names: Collection[str], given: Mapping[str, Tensor] | None, seed: int
    ) -> None:
        self.given = dict(given or {})
        self.seed = seed
        unknown = [name for name in self.given if name not in names]
        if unknown:
            raise SettingError(f"noise: got {unknown}; expected names out of {sorted(names)}")

    def normal(self, name: str, like: Tensor, channels: int | None = None) -> Tensor:
        """Standard normal numbers (N, channels, H, W) for a tensor (N, C, H, W).

        Drawn numbers are the same for every picture of a batch, so that a picture's result does
        not depend on its neighbours.

        Raises:
            SettingError: what was handed in has another shape.
        """
        if name not in self.given:
            return standard_normal(like, name, channels, seed=self.seed)
        noise = torch.as_tensor(self.given[name]).to(like)
        expected = (like.shape[0], channels or like.shape[1], *like.shape[2:])
        if tuple(noise.shape) != expected:
            raise SettingError(
                f"noise[{name!r}]: got {tuple(noise.shape)}; expected {expected}, the padded "
                "pictures' size"
            )
        return noise

    def uniform(self, name: str, low: float, high: float, like: Tensor) -> float | Tensor:
        """A number between low and high for the whole batch, or (N,) as handed in.

        Raises:
            SettingError: what was handed in is not (N,).
        """
        if name not in self.given:
            word = _first_word(stream_seed(self.seed, name))
            return low + (high - low) * (word + 0.5) / 2.0**32
        levels = torch.as_tensor(self.given[name]).to(like)
        if tuple(levels.shape) != (like.shape[0],):
            raise SettingError(
                f"noise[{name!r}]: got {tuple(levels.shape)}; expected {(like.shape[0],)}, one "
                "number per picture"
            )
        return levels


def stream_seed(seed: int, name: str) -> int:
    """The seed of a named stream: the FNV-1a hash of the name stands in the upper 32 bits."""
    # In plain Python, like _first_word: torch.compile then folds both into constants.
    code = 0x811C9DC5
    for character in name:
        code = ((code ^ ord(character)) * 0x01000193) % 2**32
    return (seed ^ (code << 32)) % 2**64


def _first_word(seed: int) -> int:
    """Word 0 of a seed's stream, as :func:`fuseengine.runtime.random.words_reference` has it."""
    c0 = c1 = c2 = c3 = 0
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0


def standard_normal(
    like: Tensor, name: str, channels: int | None = None, *, seed: int = 0
) -> Tensor:
    """Standard normal numbers of a named stream, the same for every picture of the batch.

    One call for a tracer, so that a program can hold the numbers as a constant of its size.

    Args:
        like: (N, C, H, W): gives batch, size, dtype and device.
        name: of the stream, see :func:`stream_seed`.
        channels: of the result; C by default.
        seed: 0 to 2**64 - 1.

    Returns:
        (N, channels, H, W).
    """
    if has_torch_function((like,)):
        return handle_torch_function(standard_normal, (like,), like, name, channels, seed=seed)
    stream = stream_seed(seed, name)
    signed = stream - 2**64 if stream >= 2**63 else stream  # what an op's integer can hold
    return torch.ops.fuse.philox_normal(like.detach(), channels or like.shape[1], signed)


@lru_cache(maxsize=8)
def _numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, because a model asks for the same numbers in every forward."""
    return torch.from_numpy(random.normal(shape, seed=seed)).to(device, dtype)


def _philox_normal(like: Tensor, channels: int, seed: int) -> Tensor:
    batch, _, height, width = like.shape
    one = _numbers((1, channels, height, width), seed % 2**64, like.dtype, like.device)
    return one.repeat(batch, 1, 1, 1)


def _shape_only(like: Tensor, channels: int, seed: int) -> Tensor:
    return like.new_empty((like.shape[0], channels, *like.shape[2:]))


register(
    "philox_normal(Tensor like, int channels, int seed) -> Tensor",
    general=_philox_normal,
    cpu=_philox_normal,
    fake=_shape_only,
)
