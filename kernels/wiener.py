"""Filters on the half spectrum: circular blur and its Wiener pseudo-inverse.

    wiener_filter(x, G) = irfft2(G . rfft2(x))
    blur:    G = K                                K = rfft2 of the kernel, centre tap at the origin
    inverse: G = conj(K) / (|K|^2 + lambda)

x is (..., H, W), floating point; G is (H, W // 2 + 1), real or complex; the result has x's shape
and dtype. Wiener, "Extrapolation, Interpolation, and Smoothing of Stationary Time Series", 1949;
as DRFusion's operator: its appendix C. Half precision is computed in float32 and rounded once. The
convolution is circular on the picture's own size: padding it would change the answer. As irfft2
does, the filter ignores what column 0 and, for an even W, column W / 2 of G . rfft2(x) hold
of an imaginary part after the transform over H; a NaN spreads over its picture and no further.

Real pictures in complex transforms: rows 2p and 2p + 1, a and b, ride in z = a + i b. Their
spectra come apart by A(k) = (Z(k) + conj Z(-k)) / 2, B(k) = (Z(k) - conj Z(-k)) / 2i. Two rows of
one picture and not two pictures, so that pictures do not mix, one picture saves as much, and only
W // 2 + 1 columns are left. Three passes:

    rows        Z of each pair
    columns     unpack A and B of column k from columns k and -k of Z; transform over H; times G;
                transform back; A' and B' to where Z(k) and Z(-k) were
    rows back   A' + i B' of each pair; its real and imaginary parts are the rows

Traffic in bytes per pixel, with e bytes per element of x: each pass reads and writes 4 for the
half spectrum or e for the picture, and G, complex64, is 4 (for further pictures it comes from the
cache): 2 e + 20, so 28 for float32 and 24 for half precision. Memory: 4 per pixel. The native
kernel on the CPU does the same in float32: 28, and 12 more to convert half precision. cuFFT through
PyTorch reads and writes 8 in each of four transforms, 12 to multiply and 8 to scale: 52, and 12
more to convert half precision.

On a GPU "method" in the tuning table says which of the two runs; lengths that :mod:`.fft` has no
plan for are cuFFT's. The shipped default, "triton", follows from this traffic and from three
launches instead of six; it has not been measured: ``python -m benchmarks.gpu_ops --tune`` does. On
the CPU float32 and half precision run in the native kernel (the same three passes), float64 and
strips through ``torch.fft``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels import _tuning, fft
from fuseengine.kernels._library import needs_reference, register
from fuseengine.kernels._triton import (
    Kernel,
    Launch,
    blocks,
    device_capability,
    kernel,
    power_of_two,
    run,
    usable,
)
from fuseengine.kernels.fft import fft_from, fft_places, fft_samples, fft_to

if TYPE_CHECKING:
    import triton.language as tl


def kernel_spectrum(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Half spectrum of a kernel whose centre tap is the origin; differentiable.

    Args:
        kernel: (h, w), floating point, at least one tap; one larger than the picture wraps around,
            as the circular convolution does.
        size: height and width of the pictures, at least 1.

    Returns:
        (H, W // 2 + 1), complex128 for a float64 kernel, else complex64.

    Raises:
        SettingError: the kernel's rank or dtype, or the size.
    """
    _check_kernel(kernel, size)
    height, width = size
    kernel = _wide(kernel)
    rows = (torch.arange(kernel.shape[0], device=kernel.device) - kernel.shape[0] // 2) % height
    columns = (torch.arange(kernel.shape[1], device=kernel.device) - kernel.shape[1] // 2) % width
    padded = kernel.new_zeros(height * width)
    index = (rows[:, None] * width + columns[None]).reshape(-1)
    padded = padded.index_add(0, index, kernel.reshape(-1)).reshape(height, width)
    return torch.fft.rfft2(padded)


def wiener_spectrum_reference(
    kernel: Tensor, size: tuple[int, int], regularisation: float
) -> Tensor:
    """The definition of :func:`wiener_spectrum`, differentiable."""
    spectrum = kernel_spectrum(kernel, size)
    # Not conj(): compiled graphs run ops where arithmetic on its lazy views is wrong.
    return spectrum.conj_physical() / (spectrum.abs().square() + regularisation)


def wiener_filter_reference(x: Tensor, spectrum: Tensor) -> Tensor:
    """The definition of :func:`wiener_filter`, differentiable, in the dtype of x."""
    return torch.fft.irfft2(torch.fft.rfft2(x) * spectrum, s=x.shape[-2:])


def wiener_spectrum(kernel: Tensor, size: tuple[int, int], regularisation: float) -> Tensor:
    """``conj(K) / (|K|^2 + regularisation)`` for pictures of a size.

    Computed once per kernel, so by ``torch.fft`` on every device. With gradients the
    differentiable reference runs.

    Args:
        kernel: (h, w), floating point, the centre tap at the origin; larger ones wrap around.
        size: height and width of the pictures, at least 1.
        regularisation: >= 0; with 0 the result is infinite or NaN where the spectrum is 0.

    Returns:
        (H, W // 2 + 1), complex128 for a float64 kernel, else complex64.

    Raises:
        SettingError: the kernel's rank or dtype, the size or the regularisation.
    """
    if has_torch_function((kernel,)):
        return handle_torch_function(wiener_spectrum, (kernel,), kernel, size, regularisation)
    _check_kernel(kernel, size)
    learned = isinstance(regularisation, Tensor)
    if not learned and not regularisation >= 0:
        raise SettingError(f"regularisation={regularisation}; expected a number >= 0")
    if learned or needs_reference(kernel):
        return wiener_spectrum_reference(kernel, size, regularisation)
    height, width = size
    return torch.ops.fuse.wiener_spectrum(kernel, height, width, regularisation)


def wiener_filter(x: Tensor, spectrum: Tensor) -> Tensor:
    """``irfft2(spectrum . rfft2(x))``; see the module's docstring.

    Differentiable: the gradient of x is the gradient of the result through the conjugate spectrum.

    Args:
        x: (..., H, W), floating point, any strides; half precision is computed in float32.
        spectrum: (H, W // 2 + 1), floating point or complex, on x's device; computed with in
            float32 unless x is float64.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        SettingError: ranks, dtypes or devices, or a spectrum that does not belong to x's size.
    """
    if has_torch_function((x, spectrum)):
        return handle_torch_function(wiener_filter, (x, spectrum), x, spectrum)
    _check(x, spectrum)
    if needs_reference(x, spectrum):
        return _Differentiable.apply(x, spectrum)
    return torch.ops.fuse.wiener_filter(x, spectrum)


def _check_kernel(kernel: Tensor, size: tuple[int, int]) -> None:
    if kernel.ndim != 2 or not kernel.dtype.is_floating_point or not kernel.numel():
        raise SettingError(
            f"kernel {tuple(kernel.shape)}, {kernel.dtype}; expected (h, w), floating point, at "
            "least one tap: convert with kernel.to(dtype)"
        )
    if len(size) != 2 or min(size) < 1:
        raise SettingError(f"size {tuple(size)}; expected height and width of at least 1")


def _check_pictures(x: Tensor) -> None:
    if x.ndim < 2 or not x.dtype.is_floating_point:
        raise SettingError(
            f"x {tuple(x.shape)}, {x.dtype}; expected (..., H, W), floating point: convert with "
            "x.to(dtype)"
        )


def _check(x: Tensor, spectrum: Tensor) -> None:
    _check_pictures(x)
    expected = (x.shape[-2], x.shape[-1] // 2 + 1)
    if tuple(spectrum.shape) != expected:
        raise SettingError(
            f"spectrum {tuple(spectrum.shape)}; expected {expected} for x {tuple(x.shape)}: make "
            "it for this size, for example with wiener_spectrum(kernel, x.shape[-2:], lambda)"
        )
    if not (spectrum.dtype.is_floating_point or spectrum.dtype.is_complex):
        raise SettingError(
            f"spectrum {spectrum.dtype}; expected floating point or complex: convert with "
            "spectrum.to(dtype)"
        )
    if spectrum.device != x.device:
        raise SettingError(
            f"x on {x.device}, spectrum on {spectrum.device}; expected one device: move one with "
            ".to(device)"
        )


def circular_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """X (..., H, W) convolved circularly with a kernel (h, w), the centre tap at the origin."""
    if has_torch_function((x, kernel)):
        return handle_torch_function(circular_convolution, (x, kernel), x, kernel)
    _check_pictures(x)
    return wiener_filter(x, kernel_spectrum(_as_wide(kernel, x), x.shape[-2:]))


def wiener_deconvolution(x: Tensor, kernel: Tensor, regularisation: float) -> Tensor:
    """The Wiener pseudo-inverse of :func:`circular_convolution`, regularisation >= 0."""
    if has_torch_function((x, kernel)):
        return handle_torch_function(wiener_deconvolution, (x, kernel), x, kernel, regularisation)
    _check_pictures(x)
    spectrum = wiener_spectrum(_as_wide(kernel, x), x.shape[-2:], regularisation)
    return wiener_filter(x, spectrum)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _as_wide(kernel: Tensor, x: Tensor) -> Tensor:
    """A real kernel as wide as the filter computes; a complex one is refused later."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return kernel if kernel.dtype.is_complex else kernel.to(wide)


# --- gradients -----------------------------------------------------------------------------------


class _Differentiable(torch.autograd.Function):
    """The filter is linear in x and in the spectrum; its backward pass is differentiable too."""

    @staticmethod
    def forward(x: Tensor, spectrum: Tensor) -> Tensor:
        return torch.ops.fuse.wiener_filter(x, spectrum)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, spectrum = ctx.saved_tensors
        x_wanted, spectrum_wanted = ctx.needs_input_grad
        # A column that is its own mirror acts by its Hermitian part, on both ways.
        of_x = wiener_filter(grad, spectrum.conj()) if x_wanted else None
        return of_x, _spectrum_gradient(grad, x, spectrum) if spectrum_wanted else None


def _spectrum_gradient(grad: Tensor, x: Tensor, spectrum: Tensor) -> Tensor:
    """``c(k) rfft2(grad) conj(rfft2(x)) / (H W)``, summed over pictures.

    c(k) is how often the whole spectrum has column k: 2, and 1 for its own mirror images.
    """
    height, width = x.shape[-2:]
    if x.numel() == 0:
        return torch.zeros_like(spectrum)
    product = torch.fft.rfft2(_wide(grad)) * torch.fft.rfft2(_wide(x)).conj()
    product = product.reshape(-1, *spectrum.shape).sum(0)
    column = torch.arange(spectrum.shape[1], device=x.device)
    alone = (column == 0) | (2 * column == width)
    product = torch.where(alone, product, 2 * product) / (height * width)
    return (product if spectrum.is_complex() else product.real).to(spectrum.dtype)


# --- Triton --------------------------------------------------------------------------------------


@kernel
def _load_complex(at, mask):
    at = at[:, :, None] + tl.arange(0, 2)[None, None, :]
    return tl.split(tl.load(at, mask=mask[:, :, None], other=0.0))


@kernel
def _store_complex(at, re, im, mask):
    at = at[:, :, None] + tl.arange(0, 2)[None, None, :]
    tl.store(at, tl.join(re, im), mask=mask[:, :, None])


@kernel
def wiener_rows(
    x, packed, table, height, width, pairs, stride,
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    WORDS: tl.constexpr, CHIRP: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """LINES pairs of rows of one picture, each pair transformed as one complex line."""
    if WORDS:  # a width that 8 divides, said in a way that the compiler understands
        width = width // 8 * 8
    groups = tl.cdiv(pairs, LINES)
    program = tl.program_id(0)
    picture = (program // groups).to(tl.int64)
    first = (program % groups) * LINES

    t, line, inside = fft_samples(R1, R2, R3, N1, N2, N3, LINES, False)
    inside = inside & (t < width)
    top = 2 * (first + line)
    at = x + picture * height * width + (top * width + t)
    re = tl.load(at, mask=inside & (top < height), other=0.0).to(tl.float32)
    im = tl.load(at + width, mask=inside & (top + 1 < height), other=0.0).to(tl.float32)
    re, im = fft_to(re, im, table, N1, N2, N3, CHIRP, LINES, False, PRECISION)

    k, line, inside = fft_places(R1, R2, R3, N1, N2, N3, CHIRP, LINES, False)
    pair = first + line
    inside = inside & (k < width) & (pair < pairs)
    _store_complex(packed + picture * pairs * stride * 2 + (pair * stride + k) * 2, re, im, inside)


@kernel
def wiener_columns(
    packed, spectrum, table, height, width, pairs, stride, scale,
    COMPLEX: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    CHIRP: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """LINES columns of the half spectrum: unpack, transform, filter, transform back, in place.

    Column k of rows 2p and 2p + 1 comes from places k and -k of pair p and goes back there, the
    even row's to k. A column that is its own mirror image has a place behind the line for the odd
    row's.
    """
    half = width // 2 + 1
    groups = tl.cdiv(half, LINES)
    program = tl.program_id(0)
    packed += (program // groups).to(tl.int64) * pairs * stride * 2
    first = (program % groups) * LINES

    y, line, inside = fft_samples(R1, R2, R3, N1, N2, N3, LINES, True)
    k = first + line
    inside = inside & (y < height) & (k < half)
    mirror = tl.where(k == 0, 0, width - k)
    odd = y % 2 == 1
    start = (y // 2) * stride
    z_re, z_im = _load_complex(packed + 2 * (start + k), inside)
    m_re, m_im = _load_complex(packed + 2 * (start + mirror), inside)
    # Twice the row's own transform: the half is in the scale.
    re = tl.where(odd, z_im + m_im, z_re + m_re)
    im = tl.where(odd, m_re - z_re, z_im - m_im)
    re, im = fft_to(re, im, table, N1, N2, N3, CHIRP, LINES, True, PRECISION)
    # All threads have read what any of them overwrites; and constants are loaded again for the way
    # back instead of staying in registers.
    tl.debug_barrier()

    f, line, present = fft_places(R1, R2, R3, N1, N2, N3, CHIRP, LINES, True)
    at = f * half + first + line
    present = present & (f < height) & (first + line < half)
    number = tl.cast(scale, tl.float32)
    if COMPLEX:
        g_re, g_im = _load_complex(spectrum + 2 * at, present)
        g_re *= number
        g_im *= number
        re, im = re * g_re - im * g_im, re * g_im + im * g_re
    else:
        g = tl.load(spectrum + at, mask=present, other=0.0) * number
        re *= g
        im *= g
    im, re = fft_from(im, re, table, N1, N2, N3, CHIRP, LINES, True, PRECISION)

    behind = tl.where(mirror == k, tl.where(k == 0, width, width + 1), mirror)
    _store_complex(packed + 2 * (start + tl.where(odd, behind, k)), re, im, inside)


@kernel
def wiener_rows_back(
    packed, out, table, height, width, pairs, stride,
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    WORDS: tl.constexpr, CHIRP: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """LINES pairs of rows: what :func:`wiener_columns` left, packed again and transformed back."""
    if WORDS:  # a width that 8 divides, said in a way that the compiler understands
        width = width // 8 * 8
    groups = tl.cdiv(pairs, LINES)
    program = tl.program_id(0)
    picture = (program // groups).to(tl.int64)
    first = (program % groups) * LINES

    k, line, inside = fft_places(R1, R2, R3, N1, N2, N3, CHIRP, LINES, False)
    pair = first + line
    inside = inside & (k < width) & (pair < pairs)
    low = 2 * k <= width
    column = tl.where(low, k, width - k)
    alone = (column == 0) | (2 * column == width)
    partner = tl.where(alone, tl.where(k == 0, width, width + 1), width - column)
    start = packed + picture * pairs * stride * 2 + pair * stride * 2
    a_re, a_im = _load_complex(start + 2 * column, inside)
    b_re, b_im = _load_complex(start + 2 * partner, inside & (2 * pair + 1 < height))
    # A + i B, past the middle of the conjugates; of columns without a mirror image, the real parts.
    a_im = tl.where(alone, 0.0, tl.where(low, a_im, -a_im))
    b_im = tl.where(alone, 0.0, tl.where(low, b_im, -b_im))
    im, re = fft_from(a_im + b_re, a_re - b_im, table, N1, N2, N3, CHIRP, LINES, False, PRECISION)

    t, line, inside = fft_samples(R1, R2, R3, N1, N2, N3, LINES, False)
    inside = inside & (t < width)
    top = 2 * (first + line)
    at = out + picture * height * width + (top * width + t)
    tl.store(at, re.to(out.dtype.element_ty), mask=inside & (top < height))
    tl.store(at + width, im.to(out.dtype.element_ty), mask=inside & (top + 1 < height))


_PER_THREAD = 8
"""Complex samples that a thread holds, unless the tuning table allows too few warps."""

_FEWEST = 256
"""Samples of a program: the tensor cores multiply at least 16 rows of a tile by 16 columns."""


def _pass(
    function: Kernel,
    label: str,
    arguments: dict[str, Any],
    length: int,
    lines: int,
    settings: dict[str, Any],
    **flags: bool,
) -> Launch:
    """The launch that transforms so many lines of a length in each picture."""
    transform = fft.transform(length)
    assert transform is not None, length  # fft.table() has refused it
    columns = function is wiener_columns
    samples = settings["columns" if columns else "rows"]
    if transform.chirp:  # two transforms in one hold more
        samples //= 2
    most = max(1, samples // transform.samples)
    if columns:
        most = min(most, settings["lines"])
    at_once = power_of_two(lines, least=blocks(_FEWEST, transform.samples), most=most)
    warps = at_once * transform.samples // (32 * _PER_THREAD)
    return Launch(
        kernel=function,
        label=label,
        grid=(arguments["packed"].shape[0] * blocks(lines, at_once),),
        grid_rule="(batch * ceil(lines / LINES),)",
        arguments=arguments,
        constants={
            **flags,
            **transform.constants(),
            "LINES": at_once,
            "PRECISION": settings["precision"],
        },
        num_warps=power_of_two(warps, most=settings["num_warps"]),
        num_stages=1,
        multiples=("stride",),
    )


def plan(
    x: Tensor,
    spectrum: Tensor,
    out: Tensor,
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launches of the op.

    Args:
        x: (N, H, W), contiguous.
        spectrum: (H, W // 2 + 1), float32 or complex64, contiguous.
        out: as x; may be x.
        capability: compute capability as two digits.
        settings: instead of the tuning table's, for tuning itself: "rows" and
            "columns" say how many complex samples a program of these passes holds at most,
            "lines" how many columns: four of one row are a sector of memory, 32 bytes.

    Returns:
        Rows, columns, rows back.

    Raises:
        SettingError: H or W has no plan in :mod:`.fft`.
    """
    batch, height, width = x.shape
    if settings is None:
        settings = _tuning.choose("wiener_filter", x.dtype, capability, height * width)
    row_table, column_table = (fft.table(length, x.device) for length in (width, height))
    pairs = blocks(height, 2)
    # Two places behind each line; lines begin on 128 bytes.
    stride = 16 * blocks(width + 2, 16)
    packed = torch.empty((batch, pairs, stride, 2), dtype=torch.float32, device=x.device)
    sizes = {"height": height, "width": width, "pairs": pairs, "stride": stride}
    is_complex = spectrum.is_complex()
    gain = torch.view_as_real(spectrum) if is_complex else spectrum
    return [
        _pass(
            wiener_rows,
            "rows",
            {"x": x, "packed": packed, "table": row_table, **sizes},
            width,
            pairs,
            settings,
            WORDS=width % 8 == 0,
        ),
        _pass(
            wiener_columns,
            "columns" if is_complex else "columns, real",
            {
                "packed": packed,
                "spectrum": gain,
                "table": column_table,
                **sizes,
                "scale": 0.5 / (height * width),
            },
            height,
            width // 2 + 1,
            settings,
            COMPLEX=is_complex,
        ),
        _pass(
            wiener_rows_back,
            "rows back",
            {"packed": packed, "out": out, "table": row_table, **sizes},
            width,
            pairs,
            settings,
            WORDS=width % 8 == 0,
        ),
    ]


def launch(
    x: Tensor, spectrum: Tensor, *, capability: int, settings: dict[str, Any] | None = None
) -> Tensor:
    """Run the Triton kernels or cuFFT, as the settings say; ``settings`` as in :func:`plan`.

    Lengths without a plan in :mod:`.fft` are cuFFT's whatever the settings say.
    """
    height, width = x.shape[-2:]
    if settings is None:
        settings = _tuning.choose("wiener_filter", x.dtype, capability, height * width)
    planned = fft.transform(height) is not None and fft.transform(width) is not None
    if settings["method"] != "triton" or not planned:
        return _general(x, spectrum)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    planes = (-1, height, width)
    run(
        plan(
            _resolved(x).contiguous().view(planes),
            _narrow(spectrum).contiguous(),
            out.view(planes),
            capability=capability,
            settings=settings,
        ),
        x.device,
    )
    return out


# --- the ops -------------------------------------------------------------------------------------


_STRIP = 12
"""Pictures with a shorter side leave lanes of the native kernel empty; ``torch.fft`` is quicker."""


def _resolved(x: Tensor) -> Tensor:
    """X with nothing left to conjugate or negate in memory, as lazy views of PyTorch have."""
    return x.resolve_conj().resolve_neg()


def _narrow(spectrum: Tensor) -> Tensor:
    """The spectrum in complex64 or float32."""
    return _resolved(spectrum).to(torch.complex64 if spectrum.is_complex() else torch.float32)


def _general(x: Tensor, spectrum: Tensor) -> Tensor:
    """By ``torch.fft``: cuFFT on a GPU, whose plans PyTorch keeps."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = _wide(_resolved(x))
    given = _resolved(spectrum) if wide.dtype == torch.float64 else _narrow(spectrum)
    out = torch.fft.irfft2(torch.fft.rfft2(wide).mul_(given), s=x.shape[-2:])
    return out.to(x.dtype).contiguous()


def _cuda(x: Tensor, spectrum: Tensor) -> Tensor:
    if x.numel() == 0 or not usable(x):
        return _general(x, spectrum)
    return launch(x, spectrum, capability=device_capability(x.device))


def _cpu(x: Tensor, spectrum: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    by_torch = x.dtype == torch.float64 or x.numel() == 0 or min(height, width) < _STRIP
    if by_torch or not hasattr(_native, "wiener_filter"):
        return _general(x, spectrum)
    source = _resolved(x).float().contiguous().view(-1, height, width)
    # A converted copy takes the result.
    out = torch.empty_like(source) if source.data_ptr() == x.data_ptr() else source
    _native.wiener_filter(source.numpy(), _narrow(spectrum).contiguous().numpy(), out.numpy())
    return out.view(x.shape).to(x.dtype)


def _general_spectrum(kernel: Tensor, height: int, width: int, regularisation: float) -> Tensor:
    return wiener_spectrum_reference(kernel, (height, width), regularisation).contiguous()


def _fake_spectrum(kernel: Tensor, height: int, width: int, regularisation: float) -> Tensor:
    dtype = torch.complex128 if kernel.dtype == torch.float64 else torch.complex64
    return kernel.new_empty((height, width // 2 + 1), dtype=dtype)


register(
    "wiener_filter(Tensor x, Tensor spectrum) -> Tensor",
    general=_cuda,
    cpu=_cpu,
    fake=lambda x, spectrum: x.new_empty(x.shape),
)
register(
    "wiener_spectrum(Tensor kernel, SymInt height, SymInt width, float regularisation) -> Tensor",
    general=_general_spectrum,
    cpu=_general_spectrum,
    fake=_fake_spectrum,
)
