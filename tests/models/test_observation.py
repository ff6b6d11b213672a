"""Degradation operators, their inverses and the joint correction."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuseengine.errors import SettingError
from fuseengine.models.observation import (
    Blur,
    Compose,
    Downsample,
    Identity,
    correct_jointly,
    project_jointly,
)
from tests.helpers import load_golden

NAMES = ("identity", "blur_exact", "blur_wiener_1e-2", "pool2", "pool2_of_blur_wiener_1e-2")
EXACT = ("identity", "blur_exact", "pool2")


@functools.cache
def golden():
    arrays, _ = load_golden("drfusion", "joint_operator.npz")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def make(name):
    kernel = golden()["in:kernel"]
    return {
        "identity": Identity,
        "blur_exact": lambda: Blur(kernel, 0.0),
        "blur_wiener_1e-2": lambda: Blur(kernel, 1e-2),
        "pool2": lambda: Downsample(2),
        "pool2_of_blur_wiener_1e-2": lambda: Compose(Blur(kernel, 1e-2), Downsample(2)),
    }[name]()


def observed(name1, name2):
    z = golden()
    first, second = make(name1), make(name2)
    truth = z["in:truth"][:, None, None]
    y1, y2 = first.apply_to(truth[0]), second.apply_to(truth[1])
    return z["in:x"][None], z["in:mask"][None, None], y1, y2, first, second


class TestGolden:
    # Both sides are float64; the inverse of the blur has a condition of a few hundred.
    @pytest.mark.parametrize(("kind", "lam"), [("block", 1.0), ("block_lambda_0.3", 0.3)])
    @pytest.mark.parametrize(("one", "two"), list(itertools.product(NAMES, NAMES)))
    def test_block(self, one, two, kind, lam):
        expected = golden()[f"out:{one}|{two}/{kind}"]
        torch.testing.assert_close(
            correct_jointly(*observed(one, two), lam=lam)[0], expected, rtol=0, atol=1e-11
        )

    @pytest.mark.parametrize(("one", "two"), list(itertools.product(EXACT, EXACT)))
    def test_orthogonal(self, one, two):
        expected = golden()[f"out:{one}|{two}/orthogonal"]
        torch.testing.assert_close(
            project_jointly(*observed(one, two))[0], expected, rtol=0, atol=1e-10
        )

    def test_all_results_are_compared(self):
        kinds = [n.rpartition("/")[2] for n in golden() if n.startswith("out:")]
        assert kinds.count("block") == kinds.count("block_lambda_0.3") == len(NAMES) ** 2
        assert kinds.count("orthogonal") == len(EXACT) ** 2

    def test_block_and_projection_differ_for_pooling(self):
        """facts.md: the block inverse moves further than needed when an operator is singular."""
        given_ = observed("pool2", "pool2")
        block, nearest = correct_jointly(*given_), project_jointly(*given_)
        assert (block - given_[0]).norm() > 1.01 * (nearest - given_[0]).norm()


def picture(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def close(x, y, atol=1e-10):
    torch.testing.assert_close(x, y, rtol=0, atol=atol)


class TestOperators:
    @given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
    def test_pooling_is_a_moore_penrose_pair(self, scale, rows, columns, channels):
        operator = Downsample(scale)
        x = picture((2, channels, rows * scale, columns * scale))
        y = picture((2, channels, rows, columns), seed=1)
        pooled = operator.apply_to(x)
        assert pooled.shape == y.shape
        close(operator.apply_to(operator.pseudo_inverse(pooled)), pooled)  # A A+ A = A
        spread = operator.pseudo_inverse(y)
        close(operator.pseudo_inverse(operator.apply_to(spread)), spread)  # A+ A A+ = A+
        # A+ is a multiple of the adjoint, so both products are symmetric.
        inner = (operator.apply_to(x) * y).sum()
        close(inner, (x * operator.pseudo_inverse(y)).sum() / scale**2)

    @given(
        st.sampled_from([(1, 1), (1, 3), (3, 1), (3, 3), (5, 3)]),
        st.integers(2, 9),
        st.integers(2, 9),
    )
    def test_exact_blur_is_undone(self, taps, height, width):
        """A kernel with a dominant centre has no zero in its spectrum."""
        kernel = picture(taps).abs() * 0.4 / (taps[0] * taps[1])
        kernel[taps[0] // 2, taps[1] // 2] += 1.0
        operator = Blur(kernel, 0.0)
        x = picture((2, 1, height, width))
        close(operator.pseudo_inverse(operator.apply_to(x)), x)
        close(operator.apply_to(operator.pseudo_inverse(x)), x)

    @pytest.mark.parametrize("size", [(1, 7), (6, 1), (5, 8), (2, 2)])
    def test_blur_is_the_sum_over_taps(self, size):
        """Against shifted sums, also where the kernel is larger than the picture."""
        kernel, x = picture((3, 5), 1), picture((1, 2, *size))
        expected = torch.zeros_like(x)
        for i, j in itertools.product(range(3), range(5)):
            expected += kernel[i, j] * torch.roll(x, (i - 1, j - 2), (2, 3))
        close(Blur(kernel).apply_to(x), expected)

    def test_wiener_damps_what_cannot_be_seen(self):
        """[1 2 1] has a zero at the highest frequency of even sizes; the filter stays finite."""
        operator = Blur(torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64), 1e-2)
        stripes = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(1, 1, 4, 4)
        close(operator.apply_to(stripes), torch.zeros_like(stripes))
        restored = operator.pseudo_inverse(operator.apply_to(stripes + 1))
        close(restored, torch.full_like(restored, 1 / 1.01))

    def test_gaussian_keeps_the_mean_and_is_symmetric(self):
        operator = Blur.gaussian(1.2)
        assert operator.kernel.shape == (9, 9)
        close(operator.kernel.sum(), torch.tensor(1.0), atol=1e-6)
        close(operator.kernel, operator.kernel.flip(0).T)

    def test_composition_order(self):
        """A = pool after blur: the inverse undoes the pooling first."""
        blur, pool = Blur.gaussian(0.7), Downsample(2)
        both = Compose(blur, pool)
        x, y = picture((1, 1, 8, 6)).float(), picture((1, 1, 4, 3)).float()
        assert both.multiple == 2
        close(both.apply_to(x), pool.apply_to(blur.apply_to(x)), atol=0)
        close(both.pseudo_inverse(y), blur.pseudo_inverse(pool.pseudo_inverse(y)), atol=0)
        # The frame is blurred already, but comes enlarged.
        close(both.observed(x), pool.apply_to(x), atol=0)
        close(blur.observed(x), x, atol=0)

    def test_multiples_of_poolings_multiply(self):
        assert Compose(Downsample(2), Downsample(3)).multiple == 6
        assert Compose(Downsample(2), Blur.gaussian(1.0), Downsample(2)).multiple == 4

    def test_kernel_follows_the_module(self):
        operator = Blur.gaussian(1.0).double()
        assert operator.kernel.dtype == torch.float64
        assert operator.state_dict() == {}  # what a user configures is no trained weight

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: Blur(torch.ones(2, 3)), r"shape \(2, 3\); expected \(h, w\), both odd"),
            (lambda: Blur(torch.ones(3)), "both odd"),
            (
                lambda: Blur(torch.ones(3, 3), -1e-3),
                "regularisation=-0.001; expected a number >= 0",
            ),
            (lambda: Downsample(0), "scale=0; expected an integer >= 1"),
            (lambda: Downsample(2).apply_to(torch.ones(1, 1, 5, 4)), "multiples of 2"),
        ],
    )
    def test_refused(self, build, message):
        with pytest.raises(SettingError, match=message):
            build()


class TestCorrection:
    @given(st.sampled_from(EXACT), st.sampled_from(EXACT))
    def test_observations_are_met(self, one, two):
        """With exact inverses A x' = y, for the block inverse and the projection alike."""
        x, mask, y1, y2, first, second = observed(one, two)
        for correct in (correct_jointly, project_jointly):
            new = correct(x, mask, y1, y2, first, second)
            x1, x2, f = new[:, 0:1], new[:, 1:2], new[:, 2:3]
            close(first.apply_to(x1), y1)
            close(second.apply_to(x2), y2)
            close(f, mask * x1 + (1 - mask) * x2)

    def test_a_point_that_fits_stays(self):
        x, mask, *_ = observed("pool2", "blur_exact")
        first, second = make("pool2"), make("blur_exact")
        x[:, 2:3] = mask * x[:, 0:1] + (1 - mask) * x[:, 1:2]
        y1, y2 = first.apply_to(x[:, 0:1]), second.apply_to(x[:, 1:2])
        for correct in (correct_jointly, project_jointly):
            close(correct(x, mask, y1, y2, first, second), x)

    def test_nothing_for_lambda_zero(self):
        given_ = observed("pool2", "blur_wiener_1e-2")
        close(correct_jointly(*given_, lam=0.0), given_[0], atol=0)

    def test_pictures_of_a_batch_do_not_meet(self):
        x, mask, y1, y2, first, second = observed("pool2", "blur_exact")
        twice = [torch.cat([t, 3 * t]) for t in (x, y1, y2)]
        masks = torch.cat([mask, 1 - mask])
        for correct in (correct_jointly, project_jointly):
            both = correct(twice[0], masks, twice[1], twice[2], first, second)
            close(both[:1], correct(x, mask, y1, y2, first, second))
            close(both[1:], correct(3 * x, 1 - mask, 3 * y1, 3 * y2, first, second))
