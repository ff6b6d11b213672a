"""The run side's ops on NumPy arrays against their PyTorch references."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fuseengine import kernels
from fuseengine.backends.cuda_device import TorchDevice
from fuseengine.errors import CaptureError
from fuseengine.models.pictures import stretch
from fuseengine.models.sampling import standard_normal, stream_seed
from fuseengine.program import Node
from fuseengine.runtime.ops import MAKERS, OPS, bind

SCALES = dict(
    zip(
        ("sqrt_abar", "sqrt_one_minus_abar", "sqrt_abar_prev", "sqrt_one_minus_abar_prev"),
        (0.6, 0.8, 0.8, 0.6),
        strict=True,
    )
)


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.25, 1.0, size=shape).astype(np.float32) for shape in shapes]


FULL, PLANE, HALF = (2, 3, 6, 8), (2, 1, 6, 8), (2, 3, 3, 4)


@dataclasses.dataclass
class Case:
    op: str
    shapes: tuple
    attrs: dict
    expected: object  # of torch tensors in float64

    def __str__(self):
        return f"{self.op} {' '.join(map(str, self.attrs))}"


CASES = [
    Case("add", (FULL, FULL), {}, lambda x, y: x + y),
    Case("add", (FULL, PLANE), {}, lambda x, y: x + y),
    Case("add", (FULL, ()), {}, lambda x, y: x + y),
    Case("sub", (FULL, FULL), {}, lambda x, y: x - y),
    Case("sub", (FULL,), {"scalar": 0.3}, lambda x: x - 0.3),
    Case("sub", (FULL,), {"scalar": 0.3, "scalar_first": True}, lambda x: 0.3 - x),
    Case("mul", (PLANE, FULL), {}, lambda x, y: x * y),
    Case("mul", (FULL,), {"scalar": -2.5}, lambda x: x * -2.5),
    Case("div", (FULL, PLANE), {}, lambda x, y: x / y),
    Case("div", (FULL,), {"scalar": 3.0, "scalar_first": True}, lambda x: 3.0 / x),
    Case("concat", (FULL, PLANE), {"axis": 1}, lambda x, y: torch.cat([x, y], 1)),
    Case("concat", (FULL, FULL, FULL), {"axis": -1}, lambda *p: torch.cat(p, -1)),
    Case("slice", (FULL,), {"bounds": [[None, None], [2, 3]]}, lambda x: x[:, 2:3]),
    Case("slice", (FULL,), {"bounds": [[1, None], [None, -1], [2, 5]]}, lambda x: x[1:, :-1, 2:5]),
    Case("clamp", (FULL,), {"min": 0.4, "max": 0.6}, lambda x: x.clamp(0.4, 0.6)),
    Case("clamp", (FULL,), {"min": None, "max": 0.6}, lambda x: x.clamp(max=0.6)),
    Case("clamp", (FULL,), {"min": 0.4, "max": None}, lambda x: x.clamp(min=0.4)),
    Case("ddim_step", (FULL, FULL), SCALES, lambda *x: kernels.ddim_step_reference(*x, **SCALES)),
    *(
        Case(
            "ddim_step",
            (FULL, FULL, FULL),
            {**SCALES, "eta": eta},
            lambda x, eps, z, eta=eta: kernels.ddim_step_reference(
                x, eps, **SCALES, noise=z, eta=eta
            ),
        )
        for eta in (0.0, 0.5, 1.0)
    ),
    *(
        Case(
            "compose_priors",
            (FULL, FULL, FULL, PLANE),
            {**SCALES, "form": form},
            lambda *x, form=form: kernels.compose_priors_reference(*x, **SCALES, form=form),
        )
        for form in ("code", "paper")
    ),
    Case(
        "criss_cross_attention",
        (PLANE, PLANE, FULL),
        {},
        kernels.criss_cross_attention_reference,
    ),
    Case("stretch", (FULL,), {"per": "channel"}, stretch),
    Case("stretch", (FULL,), {"per": "picture"}, lambda x: stretch(x, per="picture")),
    *(
        Case(
            "joint_ddim_step",
            (FULL, FULL, PLANE, PLANE, PLANE),
            {**SCALES, "lam": 0.3, "form": form},
            lambda *x, form=form: kernels.joint_ddim_step_reference(
                *x, **SCALES, lam=0.3, form=form
            ),
        )
        for form in ("code", "paper")
    ),
    Case("block_mean", (FULL,), {"scale": 2}, lambda x: kernels.block_mean(x, 2)),
    Case("block_mean", (FULL,), {"scale": 1}, lambda x: x),
    Case("block_repeat", (HALF,), {"scale": 2}, lambda x: kernels.block_repeat(x, 2)),
    Case("circular_convolution", (FULL, (3, 5)), {}, kernels.circular_convolution),
    Case("circular_convolution", (FULL, (9, 11)), {}, kernels.circular_convolution),
    Case(
        "wiener_deconvolution",
        (FULL, (3, 3)),
        {"regularisation": 0.1},
        lambda x, k: kernels.wiener_deconvolution(x, k, 0.1),
    ),
]

# Float32 results of order 1 to 10 from at most a few tens of roundings; a filter of random taps
# has gains of order 10.
TOLERANCE = {"circular_convolution": 2e-5, "wiener_deconvolution": 2e-5}


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == set(OPS)


class TestValues:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_numpy(self, case):
        inputs = arrays(*case.shapes)
        kept = [x.copy() for x in inputs]
        expected = case.expected(*(torch.from_numpy(x).double() for x in inputs)).numpy()
        output = np.full(expected.shape, np.nan, np.float32)  # an unwritten pixel shows
        call = bind(case.op, inputs, output, case.attrs)
        call()
        tolerance = TOLERANCE.get(case.op, 2e-6)
        np.testing.assert_allclose(output, expected, rtol=0, atol=tolerance)
        assert all(np.array_equal(x, k) for x, k in zip(inputs, kept, strict=True))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_bound_once_called_often(self, case):
        """A call reads its arrays anew: nothing but constants is remembered from binding."""
        inputs = arrays(*case.shapes)
        expected = case.expected(*(torch.from_numpy(x).double() for x in inputs)).numpy()
        output = np.empty(expected.shape, np.float32)
        first = inputs[0].copy()
        inputs[0][...] = 0.5
        call = bind(case.op, inputs, output, case.attrs)
        call()
        inputs[0][...] = first
        output[...] = np.nan
        call()
        np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE.get(case.op, 2e-6))

    @pytest.mark.parametrize(
        ("case", "index"),
        [(c, i) for c in CASES for i in OPS[c.op].in_place if c.shapes[i : i + 1] == (FULL,)],
        ids=str,
    )
    def test_in_place_where_allowed(self, case, index):
        """Every elementwise case's result is FULL, so it may take the place of such an input."""
        inputs = arrays(*case.shapes)
        expected = case.expected(*(torch.from_numpy(x).double() for x in inputs)).numpy()
        bind(case.op, inputs, inputs[index], case.attrs)()
        np.testing.assert_allclose(inputs[index], expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_torch_device(self, case):
        """The GPU device's ops, run on the CPU."""
        device = TorchDevice("cpu")
        inputs = [device.constant(x) for x in arrays(*case.shapes)]
        expected = case.expected(*(x.double() for x in inputs))
        output = device.empty(tuple(expected.shape)).fill_(torch.nan)
        node = Node("op", case.op, ("x",), ("y",), case.attrs)
        device.bind_op(node, inputs, output)()
        tolerance = TOLERANCE.get(case.op, 2e-6)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)


class TestMakers:
    """Ops whose result is known when the picture's size is."""

    def test_standard_normal_is_the_models(self):
        like = torch.zeros(2, 3, 5, 7)
        expected = standard_normal(like, "z_t800", 2, seed=11).numpy()
        made = MAKERS["standard_normal"]((2, 2, 5, 7), {"seed": stream_seed(11, "z_t800")})
        np.testing.assert_array_equal(made, expected)
        np.testing.assert_array_equal(made[0], made[1])  # a picture has no neighbours
        assert not np.array_equal(made[0, 0], made[0, 1])

    def test_full(self):
        made = MAKERS["full"]((1, 2, 3), {"value": -1.0})
        assert made.shape == (1, 2, 3) and made.dtype == np.float32 and (made == -1).all()

    def test_are_no_ops_of_a_frame(self):
        assert not set(MAKERS) & set(OPS)


def test_unknown_op():
    x = np.zeros((1, 1, 2, 2), np.float32)
    with pytest.raises(CaptureError, match="'sharpen' is unknown; a newer version"):
        bind("sharpen", [x], x, {})
    with pytest.raises(CaptureError, match="'sharpen' is unknown on cpu"):
        TorchDevice("cpu").bind_op(Node("op", "sharpen", ("x",), ("y",)), [], None)
