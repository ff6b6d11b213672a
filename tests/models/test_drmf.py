"""DRMF against the cases computed with the official code, and what its settings promise."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch

import fuseengine as fe
import fuseengine.models.drmf as drmf
from fuseengine.errors import CheckpointError, FrameError, SettingError, SizeMismatchError
from fuseengine.models.pictures import stretch
from fuseengine.models.sampling import Step, predict_noise, predict_x0
from tests.helpers import load_golden, picture_pair, shared_path, tiny
from tests.models.tools import (
    GAPS,
    assert_close,
    golden_weights,
    official_shapes,
    operations,
    outer_graph,
    recorded,
)

TASKS = {"ivif": "infrared-visible", "mif": "medical", "restore": "restore"}
PARTS = {"ir": "infrared", "vi": "visible", "weight": "weight"}
CASES = [("golden_small", c) for c in TASKS] + [("golden_recipe", "ivif")]


@functools.cache
def golden(file, case):
    """Arrays and config of a golden file, and the model of one of its cases."""
    arrays, config = load_golden("drmf", f"{file}.npz")
    settings = next(c for c in config["cases"] if c["name"] == case)
    torch.set_num_threads(1)
    model = fe.build(
        "drmf",
        task=TASKS[case],
        steps=settings["steps"],
        width=config["config"]["model"]["ch"],
        weight_width=config["config"]["weight"]["ch"],
        groups=config["norm_groups"],
    )
    parts = model.official_parts()
    shapes = {k: official_shapes(model, part) for k, part in PARTS.items() if part in parts}
    weights = golden_weights(arrays, config, shapes)
    fe.load_checkpoint(model, **{PARTS[network]: w for network, w in weights.items()})
    return arrays, config, model


def run_case(file, case):
    """Results by golden name, per step and at the end: (seen, expected, gaps)."""
    arrays, config, model = golden(file, case)
    given = {n: torch.from_numpy(arrays[f"in:{case}/{n}"]) for n in inputs_of(case)}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        record = restoration_steps if case == "restore" else fusion_steps
        steps = record(model, patch)
        x_t = torch.from_numpy(arrays[f"in:{case}/x_T"])
        image = model(given["ir"], given.get("vi"), noise={"x_T": x_t})
    seen = {f"out:{case}/image": image}
    for t, results in steps:
        seen.update({f"mid:{case}/t{t}/{name}": tensor for name, tensor in results.items()})
    height, width = given["ir"].shape[2:]
    seen[f"out:{case}/x"] = steps[-1][1]["x_next"][:, :, :height, :width]
    abar = [step.sqrt_abar**2 for step in model.schedule()]
    seen[f"mid:{case}/alpha_bar"] = torch.tensor(abar, dtype=torch.float64)
    expected = {n: a for n, a in arrays.items() if n[4:].startswith(f"{case}/") and n[:2] != "in"}
    expected = {n: a for n, a in expected.items() if "/first/" not in n}
    gaps = dict(config["f32_vs_f64_max_abs"])
    return seen, expected, gaps


def inputs_of(case):
    return ("ir",) if case == "restore" else ("ir", "vi")


def fusion_steps(model, patch):
    """Filled while the model runs: (t, results) of each step."""
    steps, edges, compose = [], [], model.compose

    def recording(x, prior_a, prior_b, weight, step):
        out = compose(x, prior_a, prior_b, weight, step)
        results = {
            "eps_ir": prior_a,
            "eps_vi": prior_b,
            "weight_ir": weight,
            "x0_fused": out / step.sqrt_abar_prev,  # the official step has no other term
            "x_next": out,
        }
        if edges:
            results["edge"] = edges[-1]
        steps.append((step.t, results))
        return out

    weigh = model.weight.forward

    def weighing(*inputs):
        weight, edge = weigh(*inputs)
        edges.append(edge)
        return weight, edge

    patch.setattr(model, "compose", recording)
    patch.setattr(model.weight, "forward", weighing)
    return steps


def restoration_steps(model, patch):
    """The same for restoration, which goes through the common sampler."""
    steps, sample = [], drmf.sample_ddim

    def recording(predict, x, schedule):
        def predicting(x, step):
            eps = predict(x, step)
            if steps:
                steps[-1][1]["x_next"] = x
            steps.append((step.t, {"eps_ir": eps, "x0": predict_x0(x, eps, step)}))
            return eps

        x = sample(predicting, x, schedule)
        steps[-1][1]["x_next"] = x
        return x

    patch.setattr(drmf, "sample_ddim", recording)
    return steps


class TestGolden:
    @pytest.mark.parametrize(("file", "case"), CASES)
    def test_every_step(self, file, case):
        seen, expected, gaps = run_case(file, case)
        assert len(expected) == {"ivif": 32, "mif": 27, "restore": 15}[case]
        assert_close(seen, expected, {**gaps, f"mid:{case}/alpha_bar": 0.0})

    @pytest.mark.parametrize("network", ["ir", "weight"])
    def test_every_module(self, network):
        """The results of the official modules in their first call, one by one."""
        arrays, config, model = golden("golden_small", "ivif")
        part, seen = PARTS[network], {}

        def keep(name, index=None, inputs=False):
            def hook(given, output):
                result = given[0] if inputs else output
                seen.setdefault(name, result if index is None else result[index])

            return hook

        hooks = [
            (model.get_submodule(own), keep(official))
            for own, official in modules(model.official_parts()[part]).items()
        ]
        unet = getattr(model, part).unet
        # The official first convolution is our stem plus our hint: what the first block sees.
        hooks.append((unet.down[0].blocks[0], keep("conv_in", inputs=True)))
        if network == "weight":
            hooks.append((unet, keep("edge_head", index=1)))
        with recorded(hooks), torch.no_grad():
            model(
                *(torch.from_numpy(arrays[f"in:ivif/{n}"]) for n in ("ir", "vi")), noise_of(arrays)
            )
        start = f"mid:ivif/first/{network}."
        expected = {n[len(start) :]: a for n, a in arrays.items() if n.startswith(start)}
        # No gap is recorded per module; that of the networks' results bounds it.
        gap = config["f32_vs_f64_max_abs"]["mid:ivif/t800/eps_ir"]
        assert_close(seen, expected, {}, fallback=gap)

    def test_parity_notices_a_changed_weight(self):
        """The tolerance is no blanket: one weight changed by 1 % of its scale shows."""
        arrays, config, model = golden("golden_small", "ivif")
        weight = model.infrared.unet.stem.conv.weight.data
        pair = [torch.from_numpy(arrays[f"in:ivif/{n}"]) for n in ("ir", "vi")]
        try:
            weight[0, 0, 1, 1] += 0.003
            with torch.no_grad():
                image = model(*pair, noise_of(arrays))
        finally:
            weight[0, 0, 1, 1] -= 0.003
        difference = np.abs(image.numpy() - arrays["out:ivif/image"]).max()
        assert difference > GAPS * config["f32_vs_f64_max_abs"]["out:ivif/image"]


def noise_of(arrays):
    return {"x_T": torch.from_numpy(arrays["in:ivif/x_T"])}


def modules(names):
    """Own module path -> official path, for modules whose results the golden file holds."""
    found = {}
    for own, entry in names.items():
        if not own.endswith(".weight") or "conv_in" in entry.names[0]:
            continue
        path, official = own.removesuffix(".weight"), entry.names[0].removesuffix(".weight")
        last = path.rpartition(".")[2]
        if last in ("norm1", "qkv"):
            found[path.rpartition(".")[0]] = official.rpartition(".")[0]
        elif last == "resample":
            found[path] = official.removesuffix(".conv")
        elif "time.embed" in path or path.endswith(("unet.norm", "unet.head")):
            found[path] = official.removesuffix(".0") if "conv_out" in official else official
    return found


class TestSizes:
    def test_parameters_and_names_of_the_official_networks(self):
        with torch.device("meta"):
            model = fe.build("drmf")
        count = {
            part: sum(p.numel() for p in getattr(model, part).parameters())
            for part in PARTS.values()
        }
        assert count == {"infrared": 82_962_435, "visible": 82_962_435, "weight": 5_058_946}
        assert sum(p.numel() for p in model.parameters()) == 170_983_816
        files = json.loads(shared_path("reference", "drmf", "state_dict.json").read_text())["files"]
        for part, file in (("infrared", files[0]), ("visible", files[0]), ("weight", files[1])):
            official = {e["name"]: tuple(e["shape"]) for e in file["entries"]}
            assert official_shapes(model, part) == official
        assert {own for names in model.official_parts().values() for own in names} == set(
            model.state_dict()
        )

    def test_operations_of_the_official_networks(self):
        """Multiply-adds of the convolutions at 64x64, as counted in the official code."""
        with torch.device("meta"):
            model = fe.build("drmf")
            x = torch.empty(1, 3, 64, 64)
            _, restoration = operations(model.infrared, x, 800, model.infrared.condition(x))
            _, condition = operations(model.infrared.condition, x)
            _, weight = operations(model.weight, torch.empty(1, 7, 64, 64), 1)
        assert (restoration + condition) / 2e9 == pytest.approx(29.7, abs=0.05)
        assert weight / 2e9 == pytest.approx(1.6, abs=0.05)

    def test_the_small_one_fits_an_edge_device(self):
        with torch.device("meta"):
            model = fe.build("drmf-s")
            x = torch.empty(1, 3, 480, 640)
            total, _ = operations(model, x, x)
        assert sum(p.numel() for p in model.parameters()) == 2_107_825  # in the docstring
        assert total / 1e9 == pytest.approx(103, abs=0.5)  # likewise; 120 is the limit

    @pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 48), (21, 29)])
    @pytest.mark.parametrize("name", ["drmf", "drmf-s"])
    def test_any_size_works(self, name, size):
        model = tiny(name, weight_width=8, steps=2)
        a, b = colour_pair(size)
        with torch.no_grad():
            fused = model(a, b)
        assert fused.shape == a.shape
        assert torch.isfinite(fused).all() and fused.min() >= 0 and fused.max() <= 1

    def test_grey_is_tripled(self):
        model = tiny("drmf-s", weight_width=8, steps=2)
        a, b = picture_pair((32, 32))
        with torch.no_grad():
            assert torch.equal(model(a, b), model(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))

    def test_pictures_of_a_batch_do_not_meet(self):
        model = tiny("drmf-s", weight_width=8, steps=2)
        a, b = colour_pair((32, 64), batch=2)
        with torch.no_grad():
            together = model(a, b)
            apart = torch.cat([model(a[i : i + 1], b[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)

    def test_float64(self):
        model = tiny("drmf-s", weight_width=8, steps=2)
        a, b = colour_pair((32, 32))
        with torch.no_grad():
            single, wide = model(a, b), model.double()(a.double(), b.double())
        assert wide.dtype == torch.float64
        torch.testing.assert_close(single.double(), wide, rtol=0, atol=1e-4)


def colour_pair(size, batch=1):
    planes = [picture_pair(size, batch=batch, seed=seed) for seed in range(3)]
    return tuple(torch.cat([pair[i] for pair in planes], dim=1) for i in range(2))


class TestSampling:
    def test_weights_of_the_first_steps(self):
        """1/2 at first; then phi sees the second step's estimate, and itself."""
        model = tiny("drmf", weight_width=8, steps=4)
        shown = []
        a, b = colour_pair((16, 16))
        hook = model.weight.register_forward_hook(lambda m, i, o: shown.append((*i, o[0])))
        with torch.no_grad():
            model(a, b)
        hook.remove()
        assert [t for _, t, _ in shown] == [1, 1, 1]
        one, two, last = (x for x, _, _ in shown)
        assert (one[:, 6:] == 0.5).all() and torch.equal(one[:, :3], one[:, 3:6])
        assert torch.equal(two[:, :3], one[:, :3]) and torch.equal(two[:, 6:], shown[0][2])
        assert torch.equal(last[:, :6], two[:, :6]) and torch.equal(last[:, 6:], shown[1][2])

    def test_medical_weighs_once(self):
        model = tiny("drmf", weight_width=8, task="medical", steps=3)
        shown = []
        model.weight.register_forward_hook(lambda m, i, o: shown.append(i[0]))
        with torch.no_grad():
            model(*colour_pair((16, 16)))
        assert len(shown) == 1 and (shown[0][:, 6:] == -1.0).all()
        assert [s.t for s in model.schedule()] == [999, 666, 333, 0]

    @pytest.mark.parametrize("update", ["code", "paper"])
    def test_weighing_clean_pictures_is_weighing_noise(self, update):
        step = tiny("drmf").schedule()[2]
        x, a, b = torch.randn(3, 1, 3, 4, 5, dtype=torch.float64)
        w = torch.rand(1, 1, 4, 5, dtype=torch.float64)
        noise = tiny("drmf", update=update).compose(
            x, predict_noise(x, a, step), predict_noise(x, b, step), w, step
        )
        clean = tiny("drmf-s", update=update).compose(x, a, b, w, step)
        torch.testing.assert_close(clean, noise)
        x0 = w * a + (1 - w) * b
        direction = predict_noise(x, x0, step) * step.sqrt_one_minus_abar_prev
        expected = x0 * step.sqrt_abar_prev + (direction if update == "paper" else 0.0)
        torch.testing.assert_close(clean, expected)

    def test_clean_predictions_correct_the_degraded_picture(self):
        """A network that says nothing gives its picture back, so the pair's mean is fused."""
        model = tiny("drmf-s", weight_width=8, steps=1)
        for network in (model.infrared.unet, model.visible.unet):
            torch.nn.init.zeros_(network.head.weight)
            torch.nn.init.zeros_(network.head.bias)
        a, b = colour_pair((32, 32))
        with torch.no_grad():
            torch.testing.assert_close(model(a, b), (a + b) / 2, rtol=0, atol=1e-5)
            torch.testing.assert_close(model.restore(a, steps=3), a, rtol=0, atol=1e-5)

    def test_restoring_with_either_network(self):
        model = tiny("drmf", weight_width=8)
        a, _ = colour_pair((16, 16))
        with torch.no_grad():
            one, two = model.restore(a, steps=2), model.restore(a, "visible", steps=2)
        assert one.shape == a.shape and not torch.equal(one, two)

    def test_seeds(self):
        a, b = colour_pair((32, 32))
        with torch.no_grad():
            model = tiny("drmf-s", weight_width=8, steps=2)
            one, again = model(a, b), model(a, b)
            model.seed = 1
            other = model(a, b)
        assert torch.equal(one, again) and not torch.equal(one, other)

    def test_scaling(self):
        model = tiny("drmf", weight_width=8, steps=2)
        a, b = colour_pair((32, 32))
        with torch.no_grad():
            stretched = model(a, b)
            model.scaling = "clamp"
            raw = model.sample(a, b)
            torch.testing.assert_close(model(a, b), (raw / 2 + 0.5).clamp(0, 1))
        torch.testing.assert_close(stretched, stretch(raw))
        assert (stretched.amin((2, 3)) == 0).all() and (stretched.amax((2, 3)) == 1).all()

    def test_gradient_reaches_every_parameter_that_serves_the_result(self):
        model = tiny("drmf-s", weight_width=8, steps=3).train()
        model(*colour_pair((32, 32))).square().mean().backward()
        untouched = {n for n, p in model.named_parameters() if p.grad is None}
        assert untouched == {"weight.unet.edge.weight", "weight.unet.edge.bias"}


@pytest.fixture(scope="class")
def source(request):
    """A model with weights that a freshly built one does not have."""
    request.cls.source = tiny("drmf", weight_width=8, seed=3)


@pytest.mark.usefixtures("source")
class TestCheckpoints:
    def official(self, part):
        """One file of the official code for the source's weights: q, k, v apart."""
        own, state = self.source.state_dict(), OrderedDict()
        for mine, entry in self.source.official_parts()[part].items():
            pieces = own[mine].chunk(len(entry.names))
            for name, piece in zip(entry.names, pieces, strict=True):
                if entry.inputs is None:
                    state[name] = piece.clone()
                else:
                    whole = state.setdefault(
                        name, piece.new_zeros(entry.shape(tuple(own[mine].shape)))
                    )
                    whole[:, entry.inputs[0] : entry.inputs[1]] = piece
        return state

    def container(self, part):
        """The whole file: training state, settings, plain and averaged weights."""
        state = self.official(part)
        return {
            "epoch": 3,
            "step": 100,
            "state_dict": {f"module.{n}": v for n, v in state.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 2e-5}]},
            "ema_helper": {n: v + 1 for n, v in state.items()},
            "params": Namespace(seed=61),
            "config": Namespace(model=Namespace(ch=8)),
        }

    def loaded(self, **parts):
        return fe.load_checkpoint(tiny("drmf", weight_width=8, seed=4), **parts)

    def same(self, model, shift=0.0):
        own, theirs = model.state_dict(), self.source.state_dict()
        return all(torch.equal(own[n], theirs[n] + shift) for n in theirs)

    @pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
    def test_files(self, tmp_path, suffix):
        from safetensors.torch import save_file

        paths = {}
        for part in PARTS.values():
            paths[part] = tmp_path / f"{part}{suffix}"
            (save_file if suffix == ".safetensors" else torch.save)(
                self.official(part), paths[part]
            )
        assert self.same(self.loaded(**paths))

    def test_averaged_weights_by_default(self, tmp_path):
        paths = {}
        for part in PARTS.values():
            paths[part] = str(tmp_path / f"{part}.pth")
            torch.save(self.container(part), paths[part])
        assert self.same(self.loaded(**paths), shift=1.0)
        assert self.same(self.loaded(ema=False, **paths))

    def test_networks_one_by_one(self):
        model = self.loaded(infrared=self.official("infrared"))
        before = tiny("drmf", weight_width=8, seed=4).state_dict()
        theirs = self.source.state_dict()
        for name, value in model.state_dict().items():
            expected = theirs if name.startswith("infrared.") else before
            assert torch.equal(value, expected[name])

    def test_own_names(self):
        assert self.same(fe.load_checkpoint(tiny("drmf", weight_width=8), self.source.state_dict()))

    def test_misfits_say_where(self):
        state = self.official("visible")
        state["mid.attn_1.kk.weight"] = state.pop("mid.attn_1.k.weight")
        state["conv_in.weight"] = torch.zeros(8, 3, 3, 3)
        with pytest.raises(CheckpointError) as caught:
            self.loaded(visible=state)
        message = str(caught.value)
        assert "visible: missing: mid.attn_1.k.weight (closest: mid.attn_1.kk.weight)" in message
        assert "visible: unknown: mid.attn_1.kk.weight" in message
        assert message.count("conv_in.weight has shape (8, 3, 3, 3), expected (8, 6, 3, 3)") == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (lambda s: {}, "neither a source nor files.*infrared=..., visible=..., weight=..."),
            (lambda s: {"source": {}, "weight": {}}, "both a source and files"),
            (lambda s: {"infra": s}, "infra=: unknown for drmf; expected.*infrared=..."),
            (lambda s: {"weight": 3}, "weight: got a int; expected a path, or a mapping"),
            (lambda s: {"source": s}, "names of an official file.*infrared=..., visible=..."),
        ],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(CheckpointError, match=message):
            self.loaded(**arguments(self.official("infrared")))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"task": "fusion"}, "task='fusion'; expected one of"),
            ({"update": "papers"}, "update='papers'; expected one of"),
            ({"predict": "x0"}, "predict='x0'; expected one of"),
            ({"scaling": "none"}, "scaling='none'; expected one of"),
            ({"steps": 0}, "steps=0; expected 1 to 1000"),
            ({"steps": 1001}, "steps=1001; expected 1 to 1000"),
            ({"groups": 3}, "groups to divide every width"),
            ({"multipliers": (1, 2)}, "at least three levels"),
            ({"colour": True}, "unexpected keyword argument 'colour'"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(SettingError, match=message):
            tiny("drmf", **settings)

    @pytest.mark.parametrize(
        ("pair", "error", "message"),
        [
            (((1, 3, 8, 8), (1, 3, 8, 9)), SizeMismatchError, r"equal batch, height and width"),
            (((1, 2, 8, 8), (1, 2, 8, 8)), FrameError, r"\(1, 2, 8, 8\); expected \(N, 1, H, W\)"),
            (((3, 8, 8), (3, 8, 8)), FrameError, r"x\[None\]"),
            (((1, 3, 0, 8), (1, 3, 0, 8)), FrameError, "nothing empty"),
        ],
    )
    def test_pictures_refused(self, pair, error, message):
        with pytest.raises(error, match=message):
            tiny("drmf-s")(*(torch.zeros(shape) for shape in pair))

    def test_other_misuse(self):
        model = tiny("drmf-s", task="restore")
        a, _ = colour_pair((32, 32))
        with pytest.raises(SettingError, match="no such restoration network"):
            model.restore(a, "visible")
        with pytest.raises(SettingError, match="give b"):
            tiny("drmf-s")(a)
        with pytest.raises(SettingError, match=r"\['x_t'\]; expected names out of \['x_T'\]"):
            model(a, noise={"x_t": a})
        with pytest.raises(SettingError, match=r"noise\['x_T'\]: got \(1, 3, 8, 8\); expected"):
            model(a, noise={"x_T": a[:, :, :8, :8]})
        with pytest.raises(FrameError, match="uint8; expected floats"):
            model((a * 255).byte())

    def test_settings_build_the_same_model_again(self):
        model = fe.build("drmf-s", width=8, groups=4, task="medical")
        again = fe.build(model.name, **json.loads(json.dumps(model.settings)))
        assert again.stages == model.stages and again.task == "medical"
        assert {n: p.shape for n, p in again.state_dict().items()} == {
            n: p.shape for n, p in model.state_dict().items()
        }
        assert not again.training


def test_steps_are_numbers_that_fold():
    for step in tiny("drmf").schedule():
        assert isinstance(step, Step) and all(type(s) is float for s in step.scales())
        assert step.sqrt_abar**2 + step.sqrt_one_minus_abar**2 == pytest.approx(1, abs=1e-12)


def test_the_sampling_loop_can_be_traced():
    """What depends on the pictures alone is called once; all else is ops of a program."""
    model = tiny("drmf-s", weight_width=8, steps=5)
    graph, names, calls = outer_graph(model)
    assert calls == {
        "infrared.condition": 1,
        "visible.condition": 1,
        **{
            f"{source}.{part}": 5 for source in ("infrared", "visible") for part in ("time", "unet")
        },
        "weight.time": 4,
        "weight.unet": 4,
    }
    arithmetic = {"add", "sub", "mul", "cat", "clamp", "getitem", "full_like"}
    assert names == {*arithmetic, "compose_priors", "standard_normal"}
    pair = colour_pair((32, 64))
    with torch.no_grad():
        assert torch.equal(graph(*pair), model(*pair))
