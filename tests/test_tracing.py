"""From a model's forward to a program."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fuseengine as fe
from fuseengine import kernels
from fuseengine.backends import BACKENDS
from fuseengine.errors import CaptureError
from fuseengine.models.observation import Blur, Compose, Downsample, Identity
from fuseengine.models.pictures import stretch
from fuseengine.models.sampling import standard_normal, stream_seed
from fuseengine.program import Program
from fuseengine.runtime.executor import Executor
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture
from tests.helpers import TINY, picture_pair, pictures_for, system, tiny


def execute(program, model, pair):
    """The program through the executor, its stages in eager float32."""
    source = ModelStages(model, program)
    runners = {
        variant: BACKENDS["torch"].lower(
            source, variant, (), precision="fp32", device="cpu", threads=1
        )
        for variant in program.variants()
    }
    executor = Executor(program, tuple(pair[0].shape[2:]), runners)
    for target, picture in zip(executor.inputs, pair, strict=True):
        target[...] = picture.numpy()
    executor.run()
    return torch.from_numpy(executor.output.copy())


class Staged(fe.FusionModel):
    """A forward to be filled in around one convolution."""

    stages = ("net",)

    def __init__(self, forward=None):
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)
        self.body = forward


def staged(body, **members):
    """A model whose forward is ``body(self, a, b)``."""
    return type("Mine", (Staged,), {"forward": body, **members})().eval()


class TestDRFusion:
    def test_small_one(self):
        model = tiny()
        program = capture(model)
        assert (program.model, program.channels, program.multiple) == ("drfusion-s", "luma", 4)
        calls = [(n.kind, n.target) for n in program.nodes if n.target in ("unet", "time")]
        assert calls == [("stage", "unet")] * 3  # one network called three times, time is frozen
        steps = [n for n in program.nodes if n.target.endswith("ddim_step")]
        assert [n.target for n in steps] == ["joint_ddim_step"] * 2 + ["ddim_step"]
        schedule = model.schedule()
        for node, step in zip(steps, schedule, strict=True):
            assert node.attrs["sqrt_abar"] == step.sqrt_abar  # float64, all digits
        assert steps[0].attrs["lam"] == 1.0 and steps[0].attrs["form"] == "code"
        assert [v.use for v in program.variants()] == [(0, 1), (0,)]
        assert str(program).startswith("program drfusion-s(a: f32[1, 1, H, W], b: ")

    @pytest.mark.parametrize("optimise", [True, False])
    @pytest.mark.parametrize("size", [(16, 24), (20, 36)])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"correct_last": True, "patch": 1},
            {"update": "paper", "steps": 2},
            {"operators": (Blur.gaussian(0.8), Identity())},
            {"operators": (Downsample(2), Compose(Blur.gaussian(0.6), Downsample(4)))},
        ],
        ids=["s", "official", "paper", "blur", "composed"],
    )
    def test_computes_the_same(self, settings, size, optimise):
        model = tiny(**settings)
        if size[0] % model.multiple or size[1] % model.multiple:
            size = tuple(8 * -(-n // 8) for n in size)
        pair = picture_pair(size)
        program = capture(model, optimise=optimise)
        with torch.no_grad():
            expected = model(*pair)
        # Float32 on both sides, with other orders of terms (and float64 time constants).
        torch.testing.assert_close(execute(program, model, pair), expected, rtol=0, atol=2e-5)

    def test_degraded_one_shows_its_operators(self):
        model = tiny(operators=(Blur.gaussian(0.8), Downsample(2)))
        program = capture(model)
        targets = {n.target for n in program.nodes}
        assert {
            "circular_convolution",
            "wiener_deconvolution",
            "block_mean",
            "block_repeat",
        } <= targets
        half = [v.shape for v in program.values.values() if v.shape[2:] == ("H/2", "W/2")]
        assert (1, 1, "H/2", "W/2") in half
        assert sum(a.shape == (7, 7) for a in program.constants.values()) == 1

    def test_round_trip_runs(self):
        model, pair = tiny(), picture_pair((16, 24))
        program = capture(model)
        again = Program.from_json(program.to_json(), program.constants)
        assert torch.equal(execute(again, model, pair), execute(program, model, pair))

    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_is_left_as_it_was(self, training):
        model = tiny().train(training)
        before = {n: v.clone() for n, v in model.state_dict().items()}
        members = set(vars(model))
        capture(model)
        assert model.training == training and set(vars(model)) == members
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.fixture(scope="module", params=TINY)
def captured_system(request):
    model = system(request.param)
    return model, capture(model)


class TestSystems:
    """Every family at its official structure and at its small one."""

    @pytest.mark.parametrize("blocks", [(2, 3), (3, 2)])
    def test_computes_the_same(self, captured_system, blocks):
        model, program = captured_system
        pair = pictures_for(model, tuple(model.multiple * n for n in blocks))
        with torch.no_grad():
            expected = model(*pair)
        result = execute(program, model, pair)
        # Float32 on both sides; samplers divide by sqrt(abar), 0.04 at their first step.
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
        assert result.std() > 1e-3

    def test_round_trip(self, captured_system):
        model, program = captured_system
        again = Program.from_json(program.to_json(), program.constants)
        assert str(again) == str(program) and again.variants() == program.variants()
        pair = pictures_for(model, (2 * model.multiple, 2 * model.multiple))
        assert torch.equal(execute(again, model, pair), execute(program, model, pair))

    def test_planes(self, captured_system):
        model, program = captured_system
        planes = 3 if model.channels == "rgb" else 1
        assert program.channels == model.channels
        for name in (*program.inputs, program.output):
            assert program.values[name].shape == (1, planes, "H", "W")

    def test_padding_is_part_of_the_program(self, captured_system):
        model, program = captured_system
        assert program.padding == model.padding
        assert Program.from_json(program.to_json(), program.constants).padding == model.padding

    def test_another_seed_is_another_program(self):
        model, other = system("drmf-s", seed=0), system("drmf-s", seed=0)
        other.seed = 7
        assert capture(model).to_json() != capture(other).to_json()
        pair = pictures_for(model, (32, 32))
        with torch.no_grad():
            expected = other(*pair)
            assert (expected - model(*pair)).abs().max() > 1e-2
        result = execute(capture(other), other, pair)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("drmf", {"task": "medical", "steps": 3}),
            ("drmf", {"task": "restore", "steps": 2}),
            ("drmf", {"update": "paper", "scaling": "clamp", "steps": 2}),
            ("dmfuse", {"update": "paper", "times": (9,)}),
            ("mask-difuser", {"eta": 0.0, "predict": "clean"}),
            ("mask-difuser", {"eta": 0.5, "scaling": "clamp", "steps": 2}),
        ],
        ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
    )
    def test_other_settings(self, name, settings):
        model = system(name, **settings)
        pair = pictures_for(model, (2 * model.multiple, 3 * model.multiple))
        with torch.no_grad():
            expected = model(*pair)
        result = execute(capture(model), model, pair)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


class TestForms:
    """A stage that is called with several shapes."""

    def two_sizes(self):
        def forward(self, a, b):
            half = self.net(kernels.block_mean(a, 2))
            return self.net(a) + kernels.block_repeat(half, 2) + self.net(b)

        return staged(forward, multiple=2)

    def test_each_shape_is_a_form(self):
        model = self.two_sizes()
        program = capture(model)
        forms = [n.attrs.get("form", 0) for n in program.stage_calls()]
        assert forms == [0, 1, 1]  # numbered in the order in which they are met
        variants = program.variants()
        assert [v.label for v in variants] == ["net-0", "net-0.form1"]
        assert [len(calls) for calls in variants.values()] == [1, 2]

    def test_runs(self):
        model, pair = self.two_sizes(), picture_pair((6, 10))
        with torch.no_grad():
            torch.testing.assert_close(execute(capture(model), model, pair), model(*pair))

    def test_shared_layers_of_the_pyramid(self):
        """DMFuse's decoder and projections serve every level."""
        program = capture(system("dmfuse"))
        labels = [v.label for v in program.variants()]
        assert {"decoder-0", "decoder-0.form1", "project-0-1-2.form2"} <= set(labels)


class TestRandomNumbers:
    def noisy(self, **options):
        def forward(self, a, b):
            noise = standard_normal(a, "x_T", seed=3, **options)
            return self.net(a) + (noise * 0.5)[:, :1] + b * 0.0

        return staged(forward)

    @pytest.mark.parametrize("channels", [None, 2])
    def test_are_made_when_the_size_is_known(self, channels):
        model = self.noisy(channels=channels)
        program = capture(model)
        (node,) = [n for n in program.nodes if n.target == "standard_normal"]
        assert node.inputs == () and node.attrs == {"seed": stream_seed(3, "x_T")}
        shape = program.values[node.outputs[0]].shape
        assert shape == (1, channels or 1, "H", "W")
        for size in ((6, 8), (5, 11)):
            pair = picture_pair(size)
            with torch.no_grad():
                torch.testing.assert_close(execute(program, model, pair), model(*pair))

    def test_names_are_streams(self):
        seeds = {stream_seed(0, name) for name in ("x_T", "z_t800", "noise_ir_t5", "noise_vi_t5")}
        assert len(seeds) == 4
        attrs = [
            node.attrs["seed"]
            for node in capture(system("mask-difuser")).nodes
            if node.target == "standard_normal"
        ]
        assert attrs == [
            stream_seed(0, n) for n in ("x_T", *(f"z_t{t}" for t in (800, 600, 400, 200)))
        ]

    def test_full(self):
        model = staged(lambda self, a, b: self.net(torch.cat([a, torch.full_like(b, 0.25)], 1)))
        model.net = nn.Conv2d(2, 1, 3, padding=1)
        program = capture(model)
        (node,) = [n for n in program.nodes if n.target == "full"]
        assert node.inputs == () and node.attrs == {"value": 0.25}
        pair = picture_pair((6, 8))
        with torch.no_grad():
            torch.testing.assert_close(execute(program, model, pair), model(*pair))


class Concat(nn.Module):
    """A network of a user's own, with nothing marked."""

    def __init__(self, planes=1):
        super().__init__()
        self.net = nn.Conv2d(2 * planes, planes, 3, padding=1)

    def forward(self, a, b):
        h = torch.exp(-self.net(torch.cat([a, b], 1)).abs())
        return h if h.sum() > 0 else a  # what no tracer can follow


class TestOwnModels:
    def test_without_stages_the_whole_is_one_stage(self):
        model = Concat()
        program = capture(model)
        assert [(n.kind, n.target) for n in program.nodes] == [("stage", "")]
        assert (program.model, program.channels, program.multiple) == ("Concat", "luma", 1)
        pair = picture_pair((9, 14))
        with torch.no_grad():
            torch.testing.assert_close(execute(program, model, pair), model(*pair))

    def test_colour(self):
        model = Concat(planes=3)
        model.channels, model.multiple = "rgb", 2
        program = capture(model)
        assert program.values["a"].shape == (1, 3, "H", "W") and program.multiple == 2

    def test_every_op(self):
        """Each op a program knows, and numbers on either side."""

        def forward(self, a, b):
            x = (1.0 - self.net(a)) * 0.5 + 2 * b / 4 - a
            x = torch.cat([x, self.net(b)], dim=1)[:, :1] / (2.0 + b * b)
            x = x + kernels.block_repeat(kernels.block_mean(b, 2), 2)
            x = kernels.ddim_step(x, a, 0.6, 0.8, 0.8, 0.6)
            x = kernels.ddim_step(x, a, 0.6, 0.8, 0.8, 0.6, b, 0.5)
            x = kernels.compose_priors(x, a, b, b * 0.5, 0.6, 0.8, 0.8, 0.6, form="paper")
            x = x + kernels.criss_cross_attention(a, b, x)
            x = stretch(x, per="picture") + stretch(x)
            return torch.clamp(3.0 / (x.clamp(min=0.1) + torch.sub(b, 0.25)), -1.0, 1.0)

        model = staged(forward, multiple=2)
        program = capture(model)
        used = {n.target for n in program.nodes if n.kind == "op"}
        expected = {"add", "sub", "mul", "div", "concat", "slice", "clamp", "ddim_step", "stretch"}
        expected |= {"compose_priors", "criss_cross_attention"}
        assert used == expected | {"block_mean", "block_repeat"}
        pair = picture_pair((10, 6))
        with torch.no_grad():
            torch.testing.assert_close(
                execute(program, model, pair), model(*pair), rtol=0, atol=1e-5
            )

    def test_a_source_that_is_not_used(self):
        model = staged(lambda self, a, b: self.net(a))
        program = capture(model)
        assert program.inputs == ("a", "b") and "b" in program.values
        pair = picture_pair((6, 8))
        with torch.no_grad():
            torch.testing.assert_close(execute(program, model, pair), model(*pair))

    def test_a_learned_number_outside_the_stages(self):
        model = staged(lambda self, a, b: self.net(a) * self.gain + b)
        model.gain = nn.Parameter(torch.tensor(0.75))
        program = capture(model)
        assert [a.ravel().tolist() for a in program.constants.values()] == [[0.75]]
        pair = picture_pair((6, 8))
        with torch.no_grad():
            torch.testing.assert_close(execute(program, model, pair), model(*pair))


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (lambda self, a, b: torch.exp(self.net(a)), "exp stands outside the stages"),
            (lambda self, a, b: self.net(a).add(b), "add stands outside the stages"),
            (lambda self, a, b: self.net(a) // 2, "floordiv stands outside"),
            (lambda self, a, b: -self.net(a), "put it into a stage, or use one of"),
            (
                lambda self, a, b: self.net(a) if a.sum() > 0 else b,
                "control flow belongs into a stage",
            ),
            (lambda self, a, b: self.net(a)[:, :, ::2], "expected plain slices"),
            (lambda self, a, b: self.net(a)[0], "expected plain slices"),
            (lambda self, a, b: self.net(input=a), "'net' is called with keywords; use positions"),
            (lambda self, a, b: self.net(stretch(a) + b), "net reads what stretch made"),
            (
                lambda self, a, b: torch.full_like(a, True) + b,
                "full_like with True; expected a number",
            ),
        ],
    )
    def test_what_a_program_cannot_say(self, body, message):
        with pytest.raises(CaptureError, match=message):
            capture(staged(body))

    def test_one_source(self):
        with pytest.raises(CaptureError, match=r"too many positional arguments; expected \(a, b\)"):
            capture(staged(lambda self, a: self.net(a)))

    def test_a_size_that_is_no_ratio(self):
        model = staged(lambda self, a, b: self.net(a))
        model.net = nn.Conv2d(1, 1, 3)  # two rows and columns fewer
        with pytest.raises(CaptureError, match="a dimension is 30 at"):
            capture(model)
