"""The filter's Triton kernels: plans of transforms, values in the interpreter, code for GPUs."""

from __future__ import annotations

import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch

from fuseengine.errors import SettingError
from fuseengine.kernels import _triton, _tuning, fft, wiener_filter, wiener_filter_reference
from fuseengine.kernels.wiener import launch, plan
from tests.kernels import test_wiener
from tests.kernels.tolerance import within

LAUNCH = "fuseengine.kernels.wiener:launch"
DTYPES = test_wiener.DTYPES
SETTINGS = {
    "method": "triton",
    "rows": 512,
    "columns": 512,
    "lines": 4,
    "num_warps": 4,
    "precision": "ieee",
}


class TestTransform:
    def test_every_length(self):
        for n in (*range(1, 200), *range(200, 4097, 7)):
            found = fft.transform(n)
            if found is None:
                assert n > 2048, n
                continue
            length = math.prod(found.factors)
            assert length >= 2 * n - 1 if found.chirp else length == n
            assert not found.chirp or 16 < n <= 2048
            for factor, side in zip(found.factors, found.sides, strict=True):
                assert factor <= side <= 16 and side & (side - 1) == 0
            # Matrix products take 8 and more columns; butterflies are exactly 2 or 4 wide.
            first, second, third = found.sides
            assert first >= 8 and (second == 1 or second >= 8)
            assert third >= 8 or third == found.factors[2]

    def test_usual_pictures_need_no_chirp(self):
        for n in (240, 256, 320, 480, 512, 600, 640, 720, 768, 800, 960, 1024, 1080, 1200, 1280,
                  1440, 1920, 2048, 2160, 2560, 3840, 4096):  # fmt: skip
            found = fft.transform(n)
            assert found is not None and not found.chirp, n

    def test_no_plan(self):
        assert fft.transform(2053) is None and fft.transform(8192) is None
        with pytest.raises(SettingError, match="2053 samples; expected .*use torch.fft"):
            fft.table(2053, torch.device("cpu"))

    @pytest.mark.parametrize("n", [1, 6, 30, 31, 60, 97, 480])
    def test_constants(self, n):
        """As many as the kernel reads; float32 of float64 values; made once."""
        found, cpu = fft.transform(n), torch.device("cpu")
        table = fft.table(n, cpu)
        assert table is fft.table(n, cpu) and table.dtype == torch.float32
        assert fft.table(n, torch.device("meta")).shape == table.shape
        s1, s2, s3 = found.sides
        size = s1 * s1 + s2 * s2 + s3 * s3 + s1 * s2 * s3 + s2 * s3
        size += 2 * s1 * s2 * s3 if found.chirp else 0
        assert table.numel() == 2 * size and table.isfinite().all()
        k = torch.arange(found.factors[0], dtype=torch.float64)
        matrix = table[: s1 * s1].reshape(s1, s1)[: len(k), : len(k)]
        expected = torch.cos(2 * math.pi * torch.outer(k, k) / len(k)).float()
        torch.testing.assert_close(matrix, expected, rtol=0, atol=6e-8)


# One pixel; strips; one, two and three factors, padded and not; butterflies of 2 and 4; primes and
# their double; an odd last row; columns with and without a mirror image; several programs, the
# last not full.
SIZES = [
    (1, 1), (1, 8), (7, 1), (2, 2), (5, 6), (6, 5), (16, 9), (17, 10), (6, 34), (30, 28), (33, 40),
    (37, 15), (5, 37), (20, 128), (128, 18), (9, 210),
]  # fmt: skip


def between_guards(x, spectrum):
    """The kernels' result in the middle of memory that they must not touch; runs interpreted."""
    memory = torch.full((x.numel() + 2048,), 42.0)
    out = memory[1024:-1024].view(x.shape)
    _triton.run(plan(x, spectrum, out, capability=87, settings=SETTINGS), x.device)
    return memory


def on_tensor_cores(x, spectrum):
    """With products as "tf32x3" has them: operands as sums of two TF32 numbers, three products.

    A model: the sums inside of the tensor cores are taken to be float32's. Runs interpreted.
    """
    from triton.runtime import interpreter

    def halves(values):
        bits = np.ascontiguousarray(values).view(np.uint32)
        big = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        rest = (values - big).view(np.uint32)
        return big, ((rest + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    def create_dot(self, a, b, d, *_):
        (a_big, a_small), (b_big, b_small) = halves(a.data), halves(b.data)
        product = (a_small @ b_big + a_big @ b_small) + a_big @ b_big
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        return launch(x, spectrum, capability=87)


class TestInterpreted:
    @pytest.mark.parametrize(
        ("size", "kind"),
        [
            *itertools.product(SIZES, [torch.complex64]),
            *itertools.product([(5, 6), (17, 10), (30, 28)], [torch.float32]),
        ],
    )
    def test_values(self, interpreted, size, kind):
        """Random half spectra: of no kernel in the columns without a mirror image."""
        batch = 1 + size[0] % 3
        x, spectrum = test_wiener.drawn((batch, *size), torch.float32, kind)
        found = interpreted(LAUNCH, x, spectrum, capability=87, settings=SETTINGS)
        expected = test_wiener.exactly(x, spectrum)
        within(found, expected, test_wiener.plain(x, spectrum), floor=8)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(20, 15), (3, 12, 17), (2, 1, 11, 32)])
    def test_shipped_settings(self, interpreted, shape, dtype):
        x, spectrum = test_wiener.drawn(shape, dtype)
        found = interpreted(LAUNCH, x, spectrum, capability=90)
        assert found.shape == shape and found.dtype == dtype
        # The interpreter cuts bfloat16 off instead of rounding it.
        expected = test_wiener.exactly(x, spectrum)
        within(found, expected, test_wiener.plain(x, spectrum), floor=8)

    @pytest.mark.parametrize(("rows", "columns", "lines"), [(256, 4096, 16), (4096, 256, 1)])
    def test_other_blocks(self, interpreted, rows, columns, lines):
        x, spectrum = test_wiener.drawn((2, 19, 24), torch.float32)
        settings = {**SETTINGS, "rows": rows, "columns": columns, "lines": lines}
        found = interpreted(LAUNCH, x, spectrum, capability=87, settings=settings)
        expected = test_wiener.exactly(x, spectrum)
        within(found, expected, test_wiener.plain(x, spectrum), floor=8)

    @pytest.mark.parametrize("size", [(12, 14), (13, 15), (17, 6)])
    def test_nan_fills_its_picture_alone(self, interpreted, size):
        x, spectrum = test_wiener.drawn((3, *size), torch.float32)
        x[1, -1, 2] = float("nan")
        found = interpreted(LAUNCH, x, spectrum, capability=87, settings=SETTINGS)
        assert found[1].isnan().all() and not found[[0, 2]].isnan().any()

    @pytest.mark.parametrize(
        ("dtype", "white"), [(torch.float32, 65535.0), (torch.float16, 65504.0)]
    )
    def test_white_16_bit_frame(self, interpreted, dtype, white):
        x = torch.full((30, 64), white).to(dtype)
        x[3, 4] = 0
        spectrum = torch.ones(30, 33)
        found = interpreted(LAUNCH, x, spectrum, capability=87, settings=SETTINGS)
        within(found, x.double(), test_wiener.plain(x, spectrum), floor=8)

    def test_strided_inputs(self, interpreted):
        x, _ = test_wiener.drawn((2, 8, 14), torch.float32)
        for view in (x[:, ::2, 1:], x.transpose(1, 2), x.transpose(0, 1), x[:1].expand(3, 8, 14)):
            _, spectrum = test_wiener.drawn(view.shape, torch.float32)
            found = interpreted(LAUNCH, view, spectrum.conj(), capability=87, settings=SETTINGS)
            expected = test_wiener.exactly(view, spectrum.conj())
            within(found, expected, test_wiener.plain(view, spectrum.conj()), floor=8)

    @pytest.mark.parametrize("size", [(7, 9), (12, 10), (33, 5)])
    def test_nothing_beside(self, interpreted, size):
        x, spectrum = test_wiener.drawn((1, *size), torch.float32)
        memory = interpreted(f"{__name__}:between_guards", x, spectrum)
        expected, eager = test_wiener.exactly(x, spectrum), test_wiener.plain(x, spectrum)
        within(memory[1024:-1024].view(x.shape), expected, eager, floor=8)
        assert (memory[:1024] == 42).all() and (memory[-1024:] == 42).all()

    @pytest.mark.parametrize("size", [(48, 30), (17, 40)])
    def test_shipped_precision(self, interpreted, size):
        """Noise, and raw thermal counts of little contrast."""
        x, spectrum = test_wiener.drawn(size, torch.float32)
        for picture in (x, 30000 + 20 * x):
            found = interpreted(f"{__name__}:on_tensor_cores", picture, spectrum)
            expected = test_wiener.exactly(picture, spectrum)
            within(found, expected, test_wiener.plain(picture, spectrum))
            by_float32 = interpreted(LAUNCH, picture, spectrum, capability=87)
            assert not torch.equal(found, by_float32)  # the model is at work

    def test_what_cufft_does(self, interpreted):
        """The table's other method, and a line without a plan, whatever the table says."""
        for size, method in (((6, 10), "cufft"), ((2, 2053), "triton")):
            x, spectrum = test_wiener.drawn(size, torch.float32)
            settings = {**SETTINGS, "method": method}
            found = interpreted(LAUNCH, x, spectrum, capability=87, settings=settings)
            assert torch.equal(found, wiener_filter_reference(x, spectrum))


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
class TestCode:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    @pytest.mark.parametrize(
        ("size", "capability", "aligned", "labels"),
        [
            ((480, 640), 87, True, ["rows", "columns", "rows back"]),
            ((480, 640), 90, True, ["columns"]),
            ((480, 643), 87, False, ["rows"]),
        ],
    )
    def test_on_the_tensor_cores_without_spills(self, size, capability, aligned, labels):
        from fuseengine.kernels._resources import resources

        x = torch.empty((1, *size), device="meta")
        spectrum = torch.empty((size[0], size[1] // 2 + 1), dtype=torch.cfloat, device="meta")
        passes = plan(x, spectrum, torch.empty_like(x), capability=capability)
        for made in (p for p in passes if p.label in labels):
            built = _triton.build(made.kernel, made.variant(aligned=aligned), capability)
            found = resources(
                built.asm["cubin"],
                built.metadata.name,
                capability=capability,
                threads=32 * made.num_warps,
                shared_bytes=built.metadata.shared,
            )
            assert found.spill_bytes == 0, made.label
            assert found.tensor_core > 0, made.label
            # Both remainders of TF32 come from rounding, which halves the error of cutting off.
            assert "cvt.rna.tf32.f32" in built.asm["ptx"]


def test_settings_of_the_table():
    for found in _tuning.table()["wiener_filter"]["defaults"].values():
        assert set(found) == set(SETTINGS) and found["method"] in ("triton", "cufft")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize(
    ("shape", "dtype", "method"),
    [
        *itertools.product(
            [(1, 1), (3, 7, 5), (2, 97, 64), (1, 240, 321), (480, 640)], DTYPES, ["triton", "cufft"]
        ),
        ((2, 1080, 1920), torch.float32, "triton"),
    ],
)
def test_on_a_gpu(shape, dtype, method):
    """Compiled, with the shipped precision: TF32 in three products has about 22 bits."""
    x, spectrum = test_wiener.drawn(shape, dtype)
    where = _triton.device_capability(torch.device("cuda", 0))
    settings = {**_tuning.choose("wiener_filter", dtype, where, 1 << 19), "method": method}
    found = launch(x.cuda(), spectrum.cuda(), capability=where, settings=settings)
    expected, eager = test_wiener.exactly(x, spectrum), test_wiener.plain(x, spectrum)
    within(found.cpu(), expected, eager, floor=32.0 if dtype == torch.float32 else 8.0)
    public = wiener_filter(x.cuda(), spectrum.cuda())
    within(public.cpu(), expected, eager, floor=32.0 if dtype == torch.float32 else 8.0)
