"""CPU kernels. Arrays are checked, never converted or copied; ValueError says what does not fit."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# uint8, uint16, float32 or float64, (H, W) or (H, W, 3): pixels adjacent, rows ascending.
Frame: TypeAlias = NDArray[Any]
Float32: TypeAlias = NDArray[np.float32]
# float32, float16, or bfloat16 as a NumPy type of that name or as its bits in uint16: one type for
# all arrays of a call. Arithmetic is float32's, rounded once.
Stored: TypeAlias = NDArray[Any]

# uint8 or uint16 counts, (H, W): pixels adjacent, rows ascending.
Counts: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]

def column_offsets(
    x: Counts, offsets: NDArray[np.float64], *, radius: int, most: float
) -> None: ...
def compose_priors(
    x: Stored,
    eps_a: Stored,
    eps_b: Stored,
    weight: Stored,
    out: Stored,
    x0_a: Stored | None = None,
    *,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    direction: float = 0.0,
) -> None: ...
def criss_cross_attention(q: Float32, k: Float32, v: Float32, out: Float32) -> None: ...
def ddim_step(
    x: Stored,
    eps: Stored,
    noise: Stored | None,
    out: Stored,
    *,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    direction: float,
    sigma: float = 0.0,
) -> None: ...
def equalise_locally(
    x: Counts,
    bins: NDArray[np.uint16],
    out: Float32,
    *,
    tiles: tuple[int, int],
    count: int,
    limit: float,
) -> None: ...
def frame_in(
    src: Frame, out: Float32, *, low: float = 0.0, scale: float, ycbcr: bool = False
) -> bool: ...
def frame_out(fused: Float32, visible: Frame | None, out: Frame) -> None: ...
def frame_warp(
    src: Frame,
    coordinates: Float32,
    out: Float32,
    *,
    size: tuple[int, int],
    low: float = 0.0,
    scale: float,
    table: Float32 | None = None,
    kept: Frame | None = None,
    clamp: bool = False,
) -> bool: ...
def frame_range(src: Frame) -> tuple[float, float, bool]: ...
def group_norm_silu(
    x: Stored,
    weight: Float32,
    bias: Float32,
    shift: Float32 | None,
    out: Stored,
    *,
    groups: int,
    eps: float,
    silu: bool = True,
) -> None: ...
def histogram(x: Counts, counts: NDArray[np.uint32]) -> None: ...
def joint_ddim_step(
    x: Stored,
    eps: Stored,
    mask: Stored,
    y1: Stored,
    y2: Stored,
    out: Stored,
    *,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    sqrt_one_minus_abar_prev: float,
    lam: float,
    form: int,
) -> None: ...
def look_up(x: Counts, table: NDArray[Any], out: NDArray[Any]) -> None: ...
def num_threads() -> int: ...
def pad_reflect(x: Float32, out: Float32) -> None: ...
def phase_energy(
    real: NDArray[np.float64],
    imaginary: NDArray[np.float64],
    energy: NDArray[np.float64],
    spread: NDArray[np.float64],
    amplitude: NDArray[np.float64],
    power: NDArray[np.float64],
    *,
    tiny: float,
) -> None: ...
def rgb_to_ycbcr(x: Float32, out: Float32) -> None: ...
def set_num_threads(count: int) -> None: ...
def subtract_columns(x: Counts, offsets: Float32, out: Counts) -> None: ...
def warp(x: Float32, coordinates: Float32, out: Float32, *, clamp: bool = False) -> None: ...
def ycbcr_to_rgb(x: Float32, out: Float32) -> None: ...
def yuv_to_rgb(
    image: NDArray[np.uint8],
    out: NDArray[np.uint8],
    *,
    format: str,
    full_range: bool,
    matrix: str,
) -> None: ...
def window_information(
    x: NDArray[np.float64], f: NDArray[np.float64], out: NDArray[np.float64]
) -> None: ...
def wiener_filter(x: Float32, spectrum: NDArray[np.complex64] | Float32, out: Float32) -> None: ...
def set_simd_level(level: str) -> None: ...
def simd_level() -> str: ...
def philox_normal(out: Float32, seed: int, offset: int = 0) -> None: ...
def philox_words(out: NDArray[np.uint32], seed: int, offset: int = 0) -> None: ...
def philox4x32_10(
    c0: int, c1: int, c2: int, c3: int, k0: int, k1: int
) -> tuple[int, int, int, int]: ...

class SharedRing:
    """A ring of frames in POSIX shared memory (csrc/fuse_shm.h); missing on Windows.

    OSError carries errno: ENOENT no such name, EAGAIN not ready, EPROTO no ring of this version.
    """

    @staticmethod
    def create(
        name: str, width: int, height: int, format: int, flags: int, slots: int
    ) -> SharedRing: ...
    @staticmethod
    def open(name: str) -> SharedRing: ...
    def write(self, picture: NDArray[Any], capture_ns: int) -> None: ...
    def beat(self) -> None: ...
    def read(self, frame: int, out: NDArray[Any]) -> int | None: ...
    def wait(self, frame: int, seconds: float) -> bool: ...
    def close(self) -> None: ...
    @property
    def written(self) -> int: ...
    @property
    def heartbeat_ns(self) -> int: ...
    @property
    def ended(self) -> bool: ...
    @property
    def replaced(self) -> bool: ...
    @property
    def producer(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def format(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def slots(self) -> int: ...
