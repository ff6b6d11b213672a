"""The filter and its spectrum as ops on the CPU: definition, native kernel, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library as torch_library

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels import (
    circular_convolution,
    kernel_spectrum,
    wiener_deconvolution,
    wiener_filter,
    wiener_filter_reference,
    wiener_spectrum,
    wiener_spectrum_reference,
)
from tests.kernels.tolerance import within

HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]
KINDS = [torch.complex64, torch.float32]
# Without and with batch dimensions; strips and one pixel; a prime, odd and even sides.
SHAPES = [
    (1, 1), (5, 6), (2, 1, 7), (3, 7, 1), (2, 3, 12, 13), (17, 40), (1, 1, 67, 33), (3, 96, 80),
]  # fmt: skip


def drawn(shape, dtype=torch.float64, kind=None, seed=0):
    """Pictures and a random half spectrum, which is that of no kernel."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    parts = torch.from_numpy(rng.normal(size=(2, shape[-2], shape[-1] // 2 + 1)))
    kind = kind or (torch.complex128 if dtype == torch.float64 else torch.complex64)
    return x, (torch.complex(*parts) if kind.is_complex else parts[0]).to(kind)


def wide(spectrum):
    return spectrum.to(torch.complex128 if spectrum.is_complex() else torch.float64)


def exactly(x, spectrum):
    return wiener_filter_reference(x.double(), wide(spectrum))


def plain(x, spectrum):
    """What plain PyTorch makes of it: torch.fft has no half precision."""
    return wiener_filter_reference(x.float(), spectrum).to(x.dtype)


class TestFilter:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_values(self, shape, kind, dtype):
        x, spectrum = drawn(shape, dtype, kind)
        found = wiener_filter(x, spectrum)
        assert found.dtype == dtype and found.is_contiguous()
        within(found, exactly(x, spectrum), plain(x, spectrum))

    @pytest.mark.parametrize("kind", [torch.complex128, torch.float64, torch.complex64])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_float64_against_numpy(self, shape, kind):
        x, spectrum = drawn(shape, torch.float64, kind)
        expected = np.fft.irfft2(np.fft.rfft2(x.numpy()) * spectrum.numpy(), s=shape[-2:])
        found = wiener_filter(x, spectrum)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES), st.sampled_from(KINDS))
    def test_any_size(self, height, width, dtype, kind):
        x, spectrum = drawn((2, height, width), dtype, kind, seed=41 * height + width)
        within(wiener_filter(x, spectrum), exactly(x, spectrum), plain(x, spectrum))

    def test_native_kernel_unless_torch_is_quicker_or_wider(self, monkeypatch):
        """Every shape and dtype that goes there comes with dense float32 planes, apart from x."""
        seen = []

        def native(x, spectrum, out):
            arrays = x, out, spectrum
            assert all(a.flags.c_contiguous and a.flags.aligned for a in arrays)
            assert x.dtype == out.dtype == np.float32 and x.ndim == 3
            assert spectrum.dtype in (np.float32, np.complex64)
            seen.append(x.shape)
            out[:] = x + 1

        monkeypatch.setattr(_native, "wiener_filter", native)
        for shape, dtype, used in [
            ((12, 13), torch.float32, (1, 12, 13)),
            ((2, 3, 40, 12), torch.float16, (6, 40, 12)),
            ((2, 12, 12), torch.bfloat16, (2, 12, 12)),
            ((1, 11, 640), torch.float32, None),
            ((640, 11), torch.float32, None),
            ((64, 64), torch.float64, None),
        ]:
            x, spectrum = drawn(shape, dtype)
            before = x.clone()
            found = wiener_filter(x, spectrum)
            assert torch.equal(x, before)
            assert seen == ([] if used is None else [used]), (shape, dtype)
            if used is not None:
                assert torch.equal(found, (x.float() + 1).to(dtype))
            seen.clear()

    def test_strided_inputs(self):
        x, _ = drawn((2, 3, 30, 52), torch.float32)
        views = {
            "rows": lambda t: t[:, :, ::2],
            "columns": lambda t: t[..., 3:-4],
            "turned": lambda t: t.transpose(2, 3),
            "batches turned": lambda t: t.transpose(0, 1),
            "expanded": lambda t: t[:, :1].expand(2, 3, 30, 52),
            "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        }
        for name, view in views.items():
            given_ = view(x)
            _, spectrum = drawn(given_.shape, torch.float32)
            found = wiener_filter(given_, spectrum)
            assert found.is_contiguous(), name
            assert torch.equal(found, wiener_filter(given_.contiguous(), spectrum)), name
            sparse = torch.stack([spectrum, spectrum], 2)[:, :, 0]
            assert torch.equal(found, wiener_filter(given_, sparse)), name

    def test_lazily_conjugated_and_negated(self):
        """PyTorch's views that say "conjugate me" hold other numbers in memory."""
        x, spectrum = drawn((16, 20), torch.float32)
        complex_x = torch.complex(x, x)
        for given_, g in [
            (x, spectrum.conj()),
            (x, spectrum.conj().imag),
            (complex_x.conj().imag, spectrum),
        ]:
            assert g.is_conj() or g.is_neg() or given_.is_neg()
            expected = wiener_filter(given_.clone(), g.resolve_conj().resolve_neg().clone())
            assert torch.equal(wiener_filter(given_, g), expected)

    @pytest.mark.parametrize("shape", [(0, 16, 16), (2, 0, 16), (2, 16, 0), (0, 0)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_empty(self, shape, dtype):
        found = wiener_filter(torch.zeros(shape, dtype=dtype), drawn(shape)[1])
        assert found.shape == shape and found.dtype == dtype

    @pytest.mark.parametrize("size", [(16, 18), (5, 7)])
    def test_nan_fills_its_picture_alone(self, size):
        x, spectrum = drawn((3, *size), torch.float32)
        x[1, 2, 3] = float("nan")
        found = wiener_filter(x, spectrum)
        assert found[1].isnan().all() and not found[[0, 2]].isnan().any()

    @pytest.mark.parametrize(
        ("dtype", "white"),
        # 65535 is beyond float16: its largest number.
        [(torch.float32, 65535.0), (torch.bfloat16, 65535.0), (torch.float16, 65504.0)],
    )
    def test_white_16_bit_frame(self, dtype, white):
        """The sum of all pixels, 2e10, is inside."""
        x = torch.full((480, 640), white).to(dtype)
        spectrum = kernel_spectrum(torch.full((3, 3), 1 / 9), (480, 640))
        found = wiener_filter(x, spectrum)
        within(found, exactly(x, spectrum), plain(x, spectrum))

    def test_wide_spectrum_for_narrow_pictures(self):
        x, spectrum = drawn((16, 20), torch.float32, torch.complex128)
        assert torch.equal(wiener_filter(x, spectrum), wiener_filter(x, spectrum.cfloat()))

    @pytest.mark.parametrize(
        ("x", "spectrum", "message"),
        [
            (torch.zeros(4), torch.ones(3), r"x \(4,\), torch.float32; expected \(..., H, W\)"),
            (torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 3), "int32.*convert with"),
            (torch.zeros(4, 4, dtype=torch.cfloat), torch.ones(4, 3), "complex64; expected"),
            (torch.zeros(6, 5), torch.ones(5, 6), r"\(5, 6\); expected \(6, 3\) for x \(6, 5\)"),
            (torch.zeros(6, 5), torch.ones(1, 6, 3), r"\(1, 6, 3\); expected \(6, 3\)"),
            (torch.zeros(6, 5), torch.ones(6, 3).bool(), "spectrum torch.bool; expected floating"),
            (torch.zeros(6, 5), torch.ones(6, 3, device="meta"), "expected one device"),
        ],
    )
    def test_refused(self, x, spectrum, message):
        with pytest.raises(SettingError, match=message):
            wiener_filter(x, spectrum)


class TestGradients:
    @pytest.mark.parametrize("size", [(4, 5), (5, 4), (1, 6), (3, 1), (2, 2), (13, 14)])
    @pytest.mark.parametrize("kind", [torch.complex128, torch.float64])
    def test_as_torch_has_them(self, size, kind):
        """Any spectrum: the columns without a mirror image are not Hermitian."""
        x, spectrum = drawn((2, 3, *size), torch.float64, kind)
        upstream = drawn((2, 3, *size), seed=1)[0]
        found, expected = (
            torch.autograd.grad(function(*given_), given_, upstream)
            for function in (wiener_filter, wiener_filter_reference)
            for given_ in [(x.clone().requires_grad_(), spectrum.clone().requires_grad_())]
        )
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("size", [(3, 4), (4, 3)])
    def test_numerically_to_second_order(self, size):
        given_ = [t.requires_grad_() for t in drawn((2, *size))]
        assert torch.autograd.gradcheck(wiener_filter, given_)
        assert torch.autograd.gradgradcheck(wiener_filter, given_)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_low_precision(self, dtype):
        x, spectrum = drawn((2, 24, 15), dtype)
        upstream = drawn((2, 24, 15), dtype, seed=1)[0]
        given_ = x.requires_grad_(), spectrum.requires_grad_()
        of_x, of_spectrum = torch.autograd.grad(wiener_filter(*given_), given_, upstream)
        assert (of_x.dtype, of_spectrum.dtype) == (dtype, torch.complex64)
        exact = [t.detach().to(torch.promote_types(t.dtype, torch.float64)) for t in given_]
        exact = [t.requires_grad_() for t in exact]
        loss = wiener_filter_reference(*exact)
        of_x_exact, of_spectrum_exact = torch.autograd.grad(loss, exact, upstream.double())
        by_plain = plain(upstream, spectrum.detach().conj())
        within(of_x, of_x_exact, by_plain)
        scale = float(of_spectrum_exact.abs().max())
        assert (of_spectrum - of_spectrum_exact).abs().max() <= 1e-5 * scale

    def test_only_what_is_wanted(self):
        x, spectrum = drawn((16, 12), torch.float32)
        (found,) = torch.autograd.grad(wiener_filter(x.requires_grad_(), spectrum).sum(), x)
        assert found.shape == x.shape
        given_ = spectrum.requires_grad_()
        (found,) = torch.autograd.grad(wiener_filter(x.detach(), given_).sum(), given_)
        assert found.shape == given_.shape

    def test_empty(self):
        x, spectrum = (t.requires_grad_() for t in drawn((0, 4, 4)))
        of_x, of_spectrum = torch.autograd.grad(wiener_filter(x, spectrum).sum(), (x, spectrum))
        assert of_x.shape == (0, 4, 4) and torch.equal(of_spectrum, torch.zeros_like(spectrum))

    def test_through_the_deconvolution(self):
        kernel = drawn((3, 3), seed=1)[0].requires_grad_()
        x = drawn((1, 6, 5))[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda x, k: wiener_deconvolution(x, k, 0.3), (x, kernel))
        strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda s: wiener_deconvolution(x.detach(), kernel.detach(), s), (strength,)
        )


class TestSpectrum:
    @pytest.mark.parametrize("size", [(1, 1), (6, 9), (9, 6), (2, 3)])
    @pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
    def test_values(self, size, dtype):
        """Computed as wide as the kernel or in float32; small pictures: the kernel wraps."""
        kernel = drawn((3, 5), seed=2)[0].to(dtype)
        found = wiener_spectrum(kernel, size, 0.1)
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        assert found.dtype == kind and found.shape == (size[0], size[1] // 2 + 1)
        assert found.is_contiguous() and not found.is_conj()
        k = kernel_spectrum(kernel.double(), size)
        atol = 1e-14 if dtype == torch.float64 else 4e-6
        torch.testing.assert_close(
            found.to(torch.complex128), k.conj() / (k.abs() ** 2 + 0.1), rtol=0, atol=atol
        )

    def test_strided_kernel(self):
        kernel = drawn((5, 8), seed=2)[0]
        for view in (kernel.T, kernel[::2, 1:], kernel[:1].expand(3, 8)):
            expected = wiener_spectrum_reference(view.contiguous(), (9, 10), 0.1)
            assert torch.equal(wiener_spectrum(view, (9, 10), 0.1), expected)

    def test_no_regularisation_is_the_inverse(self):
        kernel = torch.tensor([[0.1, 0.7, 0.2]], dtype=torch.float64)
        x = drawn((8, 9))[0]
        undone = wiener_deconvolution(circular_convolution(x, kernel), kernel, 0.0)
        torch.testing.assert_close(undone, x, rtol=0, atol=1e-13)
        assert not wiener_spectrum(torch.zeros(1, 1), (4, 4), 0.0).isfinite().any()

    @pytest.mark.parametrize(
        ("kernel", "size", "strength", "message"),
        [
            (torch.ones(3), (4, 4), 0.1, r"kernel \(3,\), torch.float32; expected \(h, w\)"),
            (torch.ones(3, 3, dtype=torch.int32), (4, 4), 0.1, "int32; .*convert with"),
            (torch.ones(0, 3), (4, 4), 0.1, "at least one tap"),
            (torch.ones(3, 3), (0, 4), 0.1, r"size \(0, 4\); expected .* at least 1"),
            (torch.ones(3, 3), (4, 4), -0.1, "regularisation=-0.1; expected a number >= 0"),
            (torch.ones(3, 3), (4, 4), float("nan"), "regularisation=nan"),
        ],
    )
    def test_refused(self, kernel, size, strength, message):
        for given_ in (kernel, kernel.clone().requires_grad_(kernel.is_floating_point())):
            with pytest.raises(SettingError, match=message):
                wiener_spectrum(given_, size, strength)

    def test_program_ops_refuse(self):
        for function in (circular_convolution, lambda x, k: wiener_deconvolution(x, k, 0.1)):
            for x, kernel, message in [
                (torch.zeros(4), torch.ones(3, 3), r"x \(4,\)"),
                (torch.zeros(4, 4).int(), torch.ones(3, 3), "x .*int32"),
                (torch.zeros(4, 4), torch.ones(3), r"kernel \(3,\)"),
                (torch.zeros(4, 4), torch.ones(3, 3).cfloat(), "kernel .*complex64"),
                (torch.zeros(2, 0, 4), torch.ones(3, 3), r"size \(0, 4\)"),
                (torch.zeros(4, 4), torch.ones(3, 3, device="meta"), "expected one device"),
            ]:
                with pytest.raises(SettingError, match=message):
                    function(x, kernel)


class TestRegistration:
    @pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
    @pytest.mark.parametrize("shape", [(16, 13), (2, 3, 12, 16), (1, 5, 640), (0, 4, 4)])
    @pytest.mark.parametrize("turned", [False, True])
    def test_opcheck_filter(self, shape, dtype, turned):
        x = drawn(shape, dtype)[0]
        x = x.transpose(-1, -2) if turned else x
        for kind in (torch.complex64, torch.float32):
            _, spectrum = drawn(x.shape, dtype, kind)
            torch_library.opcheck(torch.ops.fuse.wiener_filter, (x, spectrum))

    @pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
    @pytest.mark.parametrize("size", [(1, 1), (9, 8), (7, 5)])
    def test_opcheck_spectrum(self, size, dtype):
        kernel = drawn((3, 5))[0].to(dtype)
        torch_library.opcheck(torch.ops.fuse.wiener_spectrum, (kernel, *size, 0.1))

    def test_compile_sees_one_op(self):
        graphs = []

        def keep(graph, inputs):
            graphs.append(graph)
            return graph.forward

        x, spectrum = drawn((2, 16, 20), torch.float32)
        compiled = torch.compile(wiener_filter, backend=keep, fullgraph=True)
        assert torch.equal(compiled(x, spectrum), wiener_filter(x, spectrum))
        called = [n.target for n in graphs[0].graph.nodes if n.op == "call_function"]
        assert called in (
            [torch.ops.fuse.wiener_filter],
            [torch.ops.fuse.wiener_filter.default],
        )

    # PyTorch's own tracer instantiates autograd functions.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiled_graphs_conjugate(self):
        """They run ops where arithmetic on lazily conjugated tensors does not conjugate."""

        def both(x, spectrum, kernel):
            filtered = wiener_filter(x, spectrum.conj())
            return filtered, wiener_spectrum(kernel, (16, 11), 0.1), filtered.square().sum()

        compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
        for dtype in (torch.float32, torch.float64):
            x, spectrum = drawn((16, 11), dtype)
            kernel = drawn((3, 5), dtype)[0]
            for given_ in (spectrum, spectrum.conj()):
                arguments = x.requires_grad_(), given_.detach().requires_grad_(), kernel
                for a, b in zip(compiled(*arguments), both(*arguments), strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
                found, expected = (
                    torch.autograd.grad(f(*arguments)[2], arguments[:2]) for f in (compiled, both)
                )
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_tracing_keeps_the_call(self):
        traced = torch.fx.symbolic_trace(
            lambda x, k: wiener_filter(x, wiener_spectrum(k, (4, 6), 0.1))
        )
        called = [n.target for n in traced.graph.nodes if n.op == "call_function"]
        assert called == [wiener_spectrum, wiener_filter]
        x, kernel = drawn((4, 6))[0], drawn((3, 3))[0]
        expected = wiener_filter(x, wiener_spectrum(kernel, (4, 6), 0.1))
        assert torch.equal(traced(x, kernel), expected)
