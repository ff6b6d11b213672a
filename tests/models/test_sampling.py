"""Schedules, steps and random numbers, against equations and the facts of the public codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn

from fuseengine.errors import SettingError
from fuseengine.models.pictures import stretch
from fuseengine.models.sampling import (
    Draws,
    cosine_schedule,
    diffuse,
    linear_schedule,
    make_steps,
    predict_noise,
    predict_x0,
    sample_ddim,
    spaced_timesteps,
    standard_normal,
    stream_seed,
)
from fuseengine.runtime import random

TABLE = linear_schedule()


def close(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestSchedules:
    def test_linear(self):
        assert len(TABLE) == 1001 and TABLE[0] == 1 and (np.diff(TABLE) < 0).all()
        abar = [TABLE[t + 1] for t in (800, 600, 400, 200, 0)]
        np.testing.assert_allclose(abar, [0.0015075, 0.025567, 0.193572, 0.656347, 0.9999], 1e-4)

    def test_cosine(self):
        table = cosine_schedule(2000)
        assert len(table) == 2001 and table[0] == 1 and (np.diff(table) < 0).all()
        levels = np.sqrt(table[[5, 4, 50, 49, 100, 99]])
        known = [0.99994, 0.99996, 0.99876, 0.99880, 0.99600, 0.99607]
        np.testing.assert_allclose(levels, known, atol=1e-5)
        assert (1 - table[1:] / table[:-1]).max() <= 0.999 + 1e-12

    @pytest.mark.parametrize(
        ("steps", "expected"),
        [(5, [800, 600, 400, 200, 0]), (3, [999, 666, 333, 0]), (1, [0])],
    )
    def test_spaced(self, steps, expected):
        assert spaced_timesteps(1000, steps) == expected

    @pytest.mark.parametrize("steps", [0, 1001, -1])
    def test_steps_refused(self, steps):
        with pytest.raises(SettingError, match=f"steps={steps}; expected 1 to 1000"):
            spaced_timesteps(1000, steps)

    def test_steps_are_numbers(self):
        steps = make_steps(TABLE, [800, 0])
        assert [s.t for s in steps] == [800, 0]
        assert all(type(scale) is float for s in steps for scale in s.scales())
        assert steps[0].sqrt_abar_prev == steps[1].sqrt_abar
        assert steps[1].scales()[2:] == (1.0, 0.0)
        assert make_steps(TABLE, [0], last=0.25)[0].sqrt_abar_prev == 0.5
        one, two, three, four = steps[0].scales()
        assert steps[0].scales_of_x0() == (two, one, four, three)


class TestSteps:
    def test_estimates_invert_diffusion(self):
        step = make_steps(TABLE, [400])[0]
        x0, eps = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
        x = diffuse(x0, eps, step.sqrt_abar)
        close(x, x0 * TABLE[401] ** 0.5 + eps * (1 - TABLE[401]) ** 0.5)
        close(predict_x0(x, eps, step), x0)
        close(predict_noise(x, x0, step), eps)

    def test_a_level_per_picture(self):
        x0, eps = noise(2, 1, 3, 3), noise(2, 1, 3, 3, seed=1)
        levels = torch.tensor([0.9, 0.6], dtype=torch.float64)
        both = diffuse(x0, eps, levels)
        for i, level in enumerate((0.9, 0.6)):
            close(both[i : i + 1], diffuse(x0[i : i + 1], eps[i : i + 1], level))

    @pytest.mark.parametrize("steps", [1, 7, 1000])
    def test_an_oracle_is_followed_to_its_picture(self, steps):
        """A network that knows x0 leads there in any number of steps."""
        x0 = noise(1, 1, 4, 4)
        schedule = make_steps(TABLE, spaced_timesteps(1000, steps))
        x = sample_ddim(
            lambda x, step: predict_noise(x, x0, step), noise(1, 1, 4, 4, seed=1), schedule
        )
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)

    def test_eta_one_over_all_timesteps_is_ddpm(self):
        """Ho et al. 2020, equations 6, 7 and 11, for one step."""
        schedule = make_steps(TABLE, spaced_timesteps(1000, 1000))[-3:]
        x, eps, z = (noise(1, 1, 3, 4, seed=seed) for seed in range(3))
        draws = Draws(["z_t2"], {"z_t2": z}, 0)
        got = sample_ddim(lambda *_: eps, x, schedule[:1], eta=1.0, draws=draws)
        abar, before = TABLE[3], TABLE[2]
        beta = 1 - abar / before
        mean = (x - beta / (1 - abar) ** 0.5 * eps) / (1 - beta) ** 0.5
        close(got, mean + (beta * (1 - before) / (1 - abar)) ** 0.5 * z)

    def test_no_noise_where_sampling_ends(self):
        x = noise(1, 1, 3, 4)
        draws = Draws([], None, 0)
        draws.normal = pytest.fail
        sample_ddim(lambda x, _: x, x, make_steps(TABLE, [0]), eta=1.0, draws=draws)


class TestDraws:
    def test_a_stream_per_name_and_seed(self):
        like = torch.zeros(2, 3, 4, 6)
        draws = Draws(["x_T", "z_t3"], None, seed=5)
        x = draws.normal("x_T", like)
        expected = random.normal((1, 3, 4, 6), seed=stream_seed(5, "x_T"))
        assert torch.equal(x, torch.from_numpy(expected).expand(2, -1, -1, -1))
        assert not torch.equal(x, draws.normal("z_t3", like))
        assert not torch.equal(x, Draws(["x_T"], None, seed=6).normal("x_T", like))
        assert draws.normal("x_T", like.double(), 1).shape == (2, 1, 4, 6)
        assert draws.normal("x_T", like.double()).dtype == torch.float64

    def test_uniform(self):
        like = torch.zeros(2, 1, 4, 4)
        found = [Draws(["u"], None, seed).uniform("u", 2.0, 6.0, like) for seed in range(500)]
        assert all(type(u) is float and 2 < u < 6 for u in found)
        assert np.mean(found) == pytest.approx(4, abs=0.3) and np.std(found) == pytest.approx(
            4 / 12**0.5, rel=0.1
        )
        given = torch.tensor([1.0, 2.0])
        assert torch.equal(Draws(["u"], {"u": given.numpy()}, 0).uniform("u", 2, 6, like), given)

    @pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 + 5, 2**64 - 1])
    def test_uniform_is_the_first_word_of_the_stream(self, seed):
        u = Draws(["u"], None, seed).uniform("u", 0.0, 1.0, torch.zeros(1, 1, 1, 1))
        word = random.words_reference(1, seed=stream_seed(seed, "u"))[0]
        assert u == (float(word) + 0.5) / 2.0**32

    def test_numbers_are_nobodys_to_change(self):
        like = torch.zeros(1, 1, 4, 4)
        one = standard_normal(like, "x_T").clone()
        standard_normal(like, "x_T").zero_()
        assert torch.equal(standard_normal(like, "x_T"), one)

    def test_streams_of_all_seeds_exist(self):
        assert 0 <= stream_seed(2**64 - 1, "x_T") < 2**64
        assert stream_seed(0, "a") != stream_seed(0, "b")

    def test_a_tracer_sees_one_call_each(self):
        class Model(nn.Module):
            def forward(self, x):
                return stretch(x + Draws(["x_T"], None, 3).normal("x_T", x))

        graph = fx.Tracer().trace(Model())
        called = [node for node in graph.nodes if node.op == "call_function"]
        assert [node.target for node in called][::2] == [standard_normal, stretch]
        assert called[0].args[1:] == ("x_T", None) and called[0].kwargs == {"seed": 3}
        x = torch.rand(1, 2, 4, 4)
        assert torch.equal(fx.GraphModule(Model(), graph)(x), Model()(x))
