"""Passes: each does what it says and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fuseengine.models.observation import Blur, Downsample, Identity
from fuseengine.passes import PASSES, freeze_time, narrow, prune, run_passes
from fuseengine.program import Node, Value
from fuseengine.tracing import capture
from tests.helpers import picture_pair, tiny
from tests.test_tracing import execute, staged

SETTINGS = {
    "s": {},
    "official": {"patch": 1, "correct_last": True},
    "one step": {"steps": 1},
    "degraded": {"operators": (Blur.gaussian(0.8), Downsample(2))},
    "paper": {"update": "paper", "operators": (Identity(), Identity())},
}


@pytest.fixture(params=SETTINGS, scope="module")
def captured(request):
    model = tiny(**SETTINGS[request.param])
    program = capture(model, optimise=False)
    pair = picture_pair((16, 24))
    return model, program, pair, execute(program, model, pair)


def equal(x, y):
    # Relative to the picture's scale of 1: time constants are float64 after freezing.
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


class TestAll:
    @pytest.mark.parametrize("apply", PASSES, ids=lambda p: p.__name__)
    def test_one_changes_nothing(self, captured, apply):
        model, program, pair, expected = captured
        changed = apply(program, model)
        changed.check()
        result = execute(changed, model, pair)
        if apply is freeze_time:
            equal(result, expected)
        else:  # the same sums of the same numbers
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)

    def test_together_they_change_nothing(self, captured):
        model, program, pair, expected = captured
        equal(execute(run_passes(program, model), model, pair), expected)

    def test_they_come_to_an_end(self, captured):
        model, program, _, _ = captured
        once = run_passes(program, model)
        assert str(run_passes(once, model)) == str(once)


class TestFreezeTime:
    def test_time_calls_become_constants(self):
        model = tiny()
        program = capture(model, optimise=False)
        frozen = freeze_time(program, model)
        assert [n.target for n in program.stage_calls()].count("time") == 3
        assert [n.target for n in frozen.stage_calls()] == ["unet"] * 3
        shifts = [n.inputs[1] for n in frozen.stage_calls()]
        assert len(frozen.constants) == 3 == len(set(shifts))
        for name, t in zip(shifts, (3, 2, 1), strict=True):
            with torch.no_grad():
                exact = model.double().time(t)
            constant = torch.from_numpy(frozen.constants[name])
            assert constant.dtype == torch.float32
            assert torch.equal(constant, exact.float())  # computed in float64, rounded once

    def test_stages_that_see_the_picture_stay(self):
        model = staged(lambda self, a, b: self.net(a) + self.net(b))
        program = capture(model, optimise=False)
        assert freeze_time(program, model).nodes == program.nodes


class TestPrune:
    def test_mask_of_the_last_step_is_dropped(self):
        model = tiny()
        program = freeze_time(capture(model, optimise=False), model)
        assert [n.outputs.count(None) for n in program.stage_calls()] == [0, 0, 0]
        pruned = prune(program, model)
        assert [n.outputs.count(None) for n in pruned.stage_calls()] == [0, 0, 1]
        assert pruned.stage_calls()[-1].outputs[1] is None
        assert len(pruned.values) == len(program.values) - 1

    def test_mask_is_kept_where_it_is_used(self):
        model = tiny(correct_last=True)
        pruned = prune(capture(model, optimise=False), model)
        assert all(None not in n.outputs for n in pruned.stage_calls())

    def test_unread_calls_go(self):
        model = staged(lambda self, a, b: self.net(a))
        program = capture(model, optimise=False)
        unread = [
            Node("op", "mul", ("b",), ("twice",), {"scalar": 2.0}),
            Node("stage", "net", ("twice",), ("more",)),
        ]
        shape = program.values["b"].shape
        values = {**program.values, "twice": Value("twice", shape), "more": Value("more", shape)}
        program = program.with_nodes([*unread, *program.nodes], values=values)
        program.check()
        pruned = prune(program, model)
        assert [n.inputs for n in pruned.nodes] == [("a",)]
        assert pruned.inputs == ("a", "b")


class TestNarrow:
    def test_slice_moves_before_the_last_step(self):
        model = tiny()
        program = capture(model, optimise=False)
        narrowed = narrow(program, model)
        before, after = ([n.target for n in p.nodes] for p in (program, narrowed))
        assert before[-3:] == ["ddim_step", "slice", "clamp"]
        assert after[-4:] == ["slice", "slice", "ddim_step", "clamp"]
        step = narrowed.nodes[-2]
        assert {narrowed.values[n].shape for n in (*step.inputs, *step.outputs)} == {
            (1, 1, "H", "W")
        }

    def test_chains(self):
        """A slice moves up through all elementwise ops of its shape, and stops at a stage."""

        def forward(self, a, b):
            x = self.net(torch.cat([a, b], 1))
            return ((x * 2.0 + 1.0) / 3.0)[:, 1:2].clamp(0.0, 1.0)

        model = staged(forward)
        model.net = nn.Conv2d(2, 2, 1)
        program = capture(model, optimise=False)
        narrowed = narrow(program, model)
        targets = [n.target for n in narrowed.nodes]
        assert targets == ["concat", "net", "slice", "mul", "add", "div", "clamp"]
        pair = picture_pair((6, 8))
        assert torch.equal(execute(narrowed, model, pair), execute(program, model, pair))

    def test_a_result_that_others_read_stays(self):
        def forward(self, a, b):
            x = torch.cat([self.net(a), b], 1) * 2.0
            return x[:, 0:1] + x[:, 1:2]

        model = staged(forward)
        program = capture(model, optimise=False)
        assert narrow(program, model).nodes == program.nodes

    def test_joint_step_mixes_channels_and_stays(self):
        model = tiny(correct_last=True)
        program = capture(model, optimise=False)
        assert narrow(program, model).nodes == program.nodes

    def test_broadcasting_stays(self):
        model = staged(lambda self, a, b: (torch.cat([self.net(a), b], 1) * b)[:, :1])
        program = capture(model, optimise=False)
        assert narrow(program, model).nodes == program.nodes
