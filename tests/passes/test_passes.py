"""Passes: each does what it says and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fuseengine.models.observation import Blur, Downsample, Identity
from fuseengine.passes import (
    PASSES,
    batch_siblings,
    freeze_time,
    hoist,
    narrow,
    prune,
    run_passes,
)
from fuseengine.program import Node, Value
from fuseengine.tracing import capture
from tests.helpers import TINY, picture_pair, pictures_for, system, tiny
from tests.test_tracing import execute, staged

SETTINGS = {
    "s": {},
    "official": {"patch": 1, "correct_last": True},
    "one step": {"steps": 1},
    "degraded": {"operators": (Blur.gaussian(0.8), Downsample(2))},
    "paper": {"update": "paper", "operators": (Identity(), Identity())},
}


OTHERS = [name for name in TINY if not name.startswith("drfusion")]


@pytest.fixture(params=[*SETTINGS, *OTHERS], scope="module")
def captured(request):
    name = request.param
    model = system(name) if name in OTHERS else tiny(**SETTINGS[name])
    program = capture(model, optimise=False)
    unit = max(model.multiple, 8)
    pair = pictures_for(model, (2 * unit, 3 * unit))
    return model, program, pair, execute(program, model, pair)


def equal(x, y):
    # Relative to the picture's scale of 1: time constants are float64 after freezing.
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


class TestAll:
    @pytest.mark.parametrize("apply", [*PASSES, batch_siblings], ids=lambda p: p.__name__)
    def test_one_changes_nothing(self, captured, apply):
        model, program, pair, expected = captured
        changed = apply(program, model)
        changed.check()
        result = execute(changed, model, pair)
        if apply in (freeze_time, batch_siblings):  # other sums; samplers divide by sqrt(abar)
            torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
        elif apply is hoist:  # the same calls
            assert torch.equal(result, expected)
        else:  # the same sums of the same numbers
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)

    def test_together_they_change_nothing(self, captured):
        model, program, pair, expected = captured
        fast = run_passes(program, model)
        equal(execute(fast, model, pair), expected)
        torch.testing.assert_close(
            execute(batch_siblings(fast, model), model, pair), expected, rtol=0, atol=2e-5
        )

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


def in_loop(self, a, b):
    """A sampler whose author left everything in its loop."""
    x = a * 0.5
    for scale in (0.5, 0.25):
        features = self.encoder(b * 2.0) + self.encoder(a)
        x = x + self.net(torch.cat([x, features], 1)) * scale
    return x


def loop():
    model = staged(in_loop, stages=("encoder", "net"))
    model.encoder, model.net = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(2, 1, 1)
    return model


class TestHoist:
    def test_leaves_the_loop(self):
        model = loop()
        program = capture(model, optimise=False)
        hoisted = hoist(program, model)
        before, after = ([n.target for n in p.nodes] for p in (program, hoisted))
        assert before.count("encoder") == 4 and after.count("encoder") == 2
        assert after.count("net") == 2  # what depends on x stays
        assert len(before) - len(after) == 4  # with the encoder's mul and the sum
        pair = picture_pair((6, 8))
        assert torch.equal(execute(hoisted, model, pair), execute(program, model, pair))

    def test_numbers_tell_calls_apart(self):
        model = staged(lambda self, a, b: self.net(a * 2.0) + self.net(a * 3.0) + self.net(2.0 - a))
        program = capture(model, optimise=False)
        assert hoist(program, model).nodes == program.nodes

    def test_the_fused_picture_may_be_a_repeated_one(self):
        model = staged(lambda self, a, b: self.net(a))
        program = capture(model, optimise=False)
        (call,) = program.nodes
        values = {**program.values, "again": Value("again", program.values[call.outputs[0]].shape)}
        twice = program.with_nodes(
            [call, Node("stage", "net", call.inputs, ("again",))], values=values, output="again"
        )
        hoisted = hoist(twice, model)
        hoisted.check()
        assert hoisted.nodes == (call,) and hoisted.output == call.outputs[0]

    def test_equal_constants_are_one(self):
        """Frozen at the same timestep, a network's shifts are the same numbers."""
        model = tiny()
        frozen = freeze_time(capture(model, optimise=False), model)
        name, other, *_ = frozen.constants
        same = frozen.with_nodes(
            frozen.nodes, constants={**frozen.constants, other: frozen.constants[name].copy()}
        )
        assert len(hoist(same, model).constants) == len(frozen.constants) - 1

    def test_calls_that_make_less_are_left(self):
        model = tiny()
        program = capture(model)
        (last,) = (n for n in program.nodes if None in n.outputs)
        full = Node("stage", last.target, last.inputs, ("more_0", "more_1"))
        shapes = {n: Value(n, (1, 1, "H", "W")) for n in full.outputs}
        more = program.with_nodes([*program.nodes, full], values={**program.values, **shapes})
        assert hoist(more, model).nodes == more.nodes

    @pytest.mark.parametrize("name", TINY)
    def test_nothing_is_left_to_hoist(self, name):
        """No call is made twice, and no layer of a step's network sees only what never changes."""
        model = system(name)
        program = capture(model)
        calls = [(n.kind, n.target, n.inputs, str(n.attrs)) for n in program.nodes]
        assert len(set(calls)) == len(calls)
        for variant, nodes in program.variants().items():
            positions = zip(*(node.inputs for node in nodes), strict=True)
            constant = [len(set(names)) == 1 for names in positions]
            if len(nodes) > 1 and any(constant):
                module = model.get_submodule(variant.stage)
                assert layers_that_see_only(module, constant) == []

    def test_a_layer_that_sees_only_constants_is_found(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.outer = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

            def forward(self, x, source):
                return self.outer(x + self.inner(source))

        assert layers_that_see_only(Both(), [False, True]) == ["inner"]


def layers_that_see_only(module, chosen):
    """Layers with weights whose inputs all come from the chosen arguments of a module."""
    graph = torch.fx.Tracer().trace(module)
    depends = {}
    found = []
    arguments = iter(chosen)
    for node in graph.nodes:
        if node.op == "placeholder":
            depends[node] = next(arguments)
        else:
            given = [depends[n] for n in node.all_input_nodes]
            depends[node] = bool(given) and all(given)
            weighs = node.op == "call_module" and list(
                module.get_submodule(node.target).parameters()
            )
            if depends[node] and weighs:
                found.append(node.target)
    return found


class TestBatchSiblings:
    def test_calls(self):
        calls = {}
        for name in ("dmfuse", "dmnet", "mask-difuser", "drmf", "drfusion"):
            model = system(name)
            program = capture(model)
            batched = batch_siblings(program, model)
            calls[name] = [n.target for n in batched.stage_calls()]
            for node in batched.stage_calls():
                counts = {batched.values[v].shape[0] for v in (*node.inputs, *node.made())}
                assert len(counts) == 1  # time shifts too
        assert calls["dmfuse"].count("diffusion.unet") == 1  # two pictures, three noise levels
        assert calls["dmnet"] == ["encoder", "compress", "unet", "head"]
        assert calls["mask-difuser"] == ["semantic", "keys", "content", *["unet"] * 5]
        assert calls["drfusion"] == ["unet"] * 3  # each step waits for the one before
        assert len(calls["drmf"]) == 16  # two networks with other weights

    def test_batches_pass_from_network_to_network(self):
        """Taking a batch apart to put it together again would copy it twice."""
        model = system("mask-difuser")
        batched = batch_siblings(capture(model), model)
        semantic, keys = batched.stage_calls()[:2]
        assert keys.inputs == semantic.outputs
        slices = [n for n in batched.nodes if n.target == "slice" and n.inputs == keys.outputs]
        assert [n.attrs["bounds"] for n in slices] == [[[0, 1]], [[1, 2]]]

    def test_time_shifts_of_a_batch(self):
        model = system("dmnet")
        program = capture(model)
        batched = batch_siblings(program, model)
        (call,) = (n for n in batched.stage_calls() if n.target == "unet")
        shifts = batched.constants[call.inputs[1]]
        singles = [
            program.constants[n.inputs[1]] for n in program.stage_calls() if n.target == "unet"
        ]
        assert shifts.shape == (3, sum(model.unet.widths))
        assert torch.equal(torch.from_numpy(shifts), torch.cat([*map(torch.from_numpy, singles)]))

    def test_what_waits_is_not_batched(self):
        model = staged(lambda self, a, b: self.net(self.net(a) + self.net(b)))
        program = capture(model)
        batched = batch_siblings(program, model)
        assert [n.target for n in batched.nodes] == [
            "concat",
            "net",
            "slice",
            "slice",
            "add",
            "net",
        ]
        pair = picture_pair((6, 8))
        torch.testing.assert_close(execute(batched, model, pair), execute(program, model, pair))

    def test_two_groups_that_feed_each_other(self):
        """Merging f(a), f(g(b)) and g(b), g(f(a)) both ways would be a circle."""

        def forward(self, a, b):
            first, second = self.f(a), self.g(b)
            return self.f(second) + self.g(first)

        model = staged(forward, stages=("f", "g"))
        model.f, model.g = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
        program = capture(model)
        batched = batch_siblings(program, model)
        batched.check()
        assert sorted(n.target for n in batched.stage_calls()) == ["f", "g", "g"]
        pair = picture_pair((6, 8))
        torch.testing.assert_close(execute(batched, model, pair), execute(program, model, pair))

    def test_programs_are_not_changed(self):
        model = system("dmnet-s")
        program = capture(model)
        text = program.to_json()
        batch_siblings(program, model)
        assert program.to_json() == text


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
