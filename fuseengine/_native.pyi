"""CPU kernels. Arrays are checked, never converted or copied; ValueError says what does not fit."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# uint8, uint16, float32 or float64, (H, W) or (H, W, 3): pixels adjacent, rows ascending.
Frame: TypeAlias = NDArray[Any]
Float32: TypeAlias = NDArray[np.float32]

def compose_priors(
    x: Float32,
    eps_a: Float32,
    eps_b: Float32,
    weight: Float32,
    out: Float32,
    x0_a: Float32 | None = None,
    *,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    direction: float = 0.0,
) -> None: ...
def criss_cross_attention(q: Float32, k: Float32, v: Float32, out: Float32) -> None: ...
def ddim_step(
    x: Float32,
    eps: Float32,
    noise: Float32 | None,
    out: Float32,
    *,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    direction: float,
    sigma: float = 0.0,
) -> None: ...
def frame_in(src: Frame, out: Float32, *, low: float = 0.0, scale: float) -> bool: ...
def frame_out(fused: Float32, visible: Frame | None, out: Frame) -> None: ...
def frame_range(src: Frame) -> tuple[float, float, bool]: ...
def group_norm_silu(
    x: Float32,
    weight: Float32,
    bias: Float32,
    shift: Float32 | None,
    out: Float32,
    *,
    groups: int,
    eps: float,
    silu: bool = True,
) -> None: ...
def joint_ddim_step(
    x: Float32,
    eps: Float32,
    mask: Float32,
    y1: Float32,
    y2: Float32,
    out: Float32,
    *,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    sqrt_one_minus_abar_prev: float,
    lam: float,
    form: int,
) -> None: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def wiener_filter(x: Float32, spectrum: NDArray[np.complex64] | Float32, out: Float32) -> None: ...
def set_simd_level(level: str) -> None: ...
def simd_level() -> str: ...
def philox_normal(out: Float32, seed: int, offset: int = 0) -> None: ...
def philox_words(out: NDArray[np.uint32], seed: int, offset: int = 0) -> None: ...
def philox4x32_10(
    c0: int, c1: int, c2: int, c3: int, k0: int, k1: int
) -> tuple[int, int, int, int]: ...
