"""The run side's float64 equations against the kernels' own references, and the native ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fuseengine.errors import CaptureError
from fuseengine.kernels.compose_priors import compose_priors_reference
from fuseengine.kernels.criss_cross_attention import criss_cross_attention_reference
from fuseengine.kernels.ddim_step import ddim_step_reference
from fuseengine.kernels.joint_ddim_step import joint_ddim_step_reference
from fuseengine.runtime import ops, reference

SIZE = (9, 14)
SCALES = {
    "sqrt_abar": 0.6,
    "sqrt_one_minus_abar": 0.8,
    "sqrt_abar_prev": 0.8,
    "sqrt_one_minus_abar_prev": 0.6,
}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def planes(channels, seed=0, batch=2):
    return noise(batch, channels, *SIZE, seed=seed)


BLUR = np.outer([1, 2, 1], [1, 3, 1]).astype(np.float32) / 20

CASES = {
    "add": ([planes(3), planes(3, 1)], {}),
    "sub scalar": ([planes(3)], {"scalar": 0.7, "scalar_first": True}),
    "mul scalar": ([planes(3)], {"scalar": 0.7}),
    "div": ([planes(3), np.abs(planes(3, 1)) + 1], {}),
    "concat": ([planes(3), planes(2, 1)], {"axis": 1}),
    "slice": ([planes(3)], {"bounds": [[None, None], [1, 3]]}),
    "clamp": ([planes(3)], {"min": -0.5, "max": 0.5}),
    "stretch image": ([planes(3)], {"per": "image"}),
    "stretch channel": ([np.concatenate([planes(2), 0 * planes(1)], 1)], {"per": "channel"}),
    "ddim_step": ([planes(3), planes(3, 1)], SCALES),
    "ddim_step noise": ([planes(3), planes(3, 1), planes(3, 2)], {**SCALES, "eta": 0.7}),
    "joint_ddim_step code": (
        [planes(3), planes(3, 1), planes(1, 2), planes(1, 3), planes(1, 4)],
        {**SCALES, "lam": 0.4, "form": "code"},
    ),
    "joint_ddim_step paper": (
        [planes(3), planes(3, 1), planes(1, 2), planes(1, 3), planes(1, 4)],
        {**SCALES, "lam": 0.4, "form": "paper"},
    ),
    "compose_priors code": (
        [planes(3), planes(3, 1), planes(3, 2), planes(1, 3)],
        {**SCALES, "form": "code"},
    ),
    "compose_priors paper": (
        [planes(3), planes(3, 1), planes(3, 2), planes(1, 3)],
        {**SCALES, "form": "paper"},
    ),
    "criss_cross_attention": ([planes(4), planes(4, 1), planes(6, 2)], {}),
    "block_mean": ([noise(2, 3, 8, 12)], {"scale": 4}),
    "block_repeat": ([planes(3)], {"scale": 3}),
    "circular_convolution": ([planes(3), BLUR], {}),
    "wiener_deconvolution": ([planes(3), BLUR], {"regularisation": 1e-2}),
}


def test_every_op_has_an_equation_and_a_case():
    assert set(reference._OPS) == set(ops.OPS) == {name.split()[0] for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_native_ops_compute_them(case):
    inputs, attrs = CASES[case]
    op = case.split()[0]
    expected = reference.compute(op, inputs, attrs)
    assert expected.dtype == np.float64
    made = np.full(expected.shape, np.nan, np.float32)
    ops.bind(op, inputs, made, attrs)()
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(made, expected, rtol=0, atol=3e-6 * scale)


REFERENCES = {
    "ddim_step": (ddim_step_reference, ()),
    "joint_ddim_step code": (joint_ddim_step_reference, ("form",)),
    "joint_ddim_step paper": (joint_ddim_step_reference, ("form",)),
    "compose_priors code": (compose_priors_reference, ("form",)),
    "compose_priors paper": (compose_priors_reference, ("form",)),
    "criss_cross_attention": (criss_cross_attention_reference, ()),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_they_are_the_kernels_own(case):
    inputs, attrs = CASES[case]
    function, named = REFERENCES[case]
    numbers = [value for name, value in attrs.items() if name not in named]
    tensors = [torch.from_numpy(x).double() for x in inputs]
    expected = function(*tensors, *numbers, **{name: attrs[name] for name in named}).numpy()
    made = reference.compute(case.split()[0], inputs, attrs)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-12)


def test_noise_like_the_kernel():
    inputs, attrs = CASES["ddim_step noise"]
    x, eps, z = (torch.from_numpy(a).double() for a in inputs)
    expected = ddim_step_reference(x, eps, *SCALES.values(), z, attrs["eta"]).numpy()
    np.testing.assert_allclose(
        reference.compute("ddim_step", inputs, attrs), expected, rtol=0, atol=1e-12
    )


def test_unknown():
    with pytest.raises(CaptureError, match="op 'x' is unknown"):
        reference.compute("x", [], {})
