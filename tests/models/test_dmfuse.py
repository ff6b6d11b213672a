"""DMFuse against the cases computed with the official code, and what its settings promise."""

from __future__ import annotations

import functools
import json
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch

import fuseengine as fe
from fuseengine.errors import CheckpointError, SettingError
from fuseengine.models.dmfuse import Correction
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

SMALL = {"head_width": 8}


@functools.cache
def golden():
    arrays, config = load_golden("dmfuse", "golden_small.npz")
    unet = config["unet"]
    torch.set_num_threads(1)
    model = fe.build(
        "dmfuse",
        width=unet["inner_channel"],
        multipliers=unet["channel_multiplier"],
        blocks=unet["res_blocks"],
        groups=unet["norm_groups"],
        times=config["timesteps"],
    )
    shapes = {part: official_shapes(model, part) for part in ("diffusion", "head")}
    # As users have them: with the parts of the head that never run.
    return arrays, config, fe.load_checkpoint(model, **golden_weights(arrays, config, shapes))


def given(arrays, case):
    """The pair in [0, 1] as (N, 1, H, W), and the random numbers."""
    found = {
        n.rpartition("/")[2]: torch.from_numpy(a)
        for n, a in arrays.items()
        if n.startswith(f"in:{case}/")
    }
    pair = [found.pop(f"{source}_u8") for source in ("ir", "vi")]
    return [p.reshape(-1, 1, *p.shape[-2:]) / 255.0 for p in pair], found


def run_case(case):
    """Results by golden name: everything the file may hold of a case."""
    arrays, _, model = golden()
    pair, noise = given(arrays, case)
    seen, calls, encoded, joined = {}, [], [], []
    blocks = [
        level.attention[j] if level.attention else block
        for level in reversed(model.diffusion.unet.up)
        for j, block in enumerate(level.blocks)
    ]
    hooks = [
        (block, lambda i, o, at=14 - n: seen.setdefault(f"mid:{case}/fd{at}_ir_t5", o))
        for n, block in enumerate(blocks)
    ]
    hooks.append((model.diffusion.unet, lambda i, o: calls.append((i[0], o[0]))))
    hooks += [(encoder, lambda i, o: encoded.append(o)) for encoder in model.encoders]
    hooks.append((model.join, lambda i, o: joined.append(o)))
    hooks.append((model.output, lambda i, o: seen.update({f"out:{case}/tanh": o})))
    with recorded(hooks), torch.no_grad():
        seen[f"out:{case}/image_255"] = model(*pair, noise) * 255
    assert len(calls) == 6 and len(encoded) == 10 and len(joined) == 5
    seen[f"mid:{case}/x_noisy_ir_t50"], seen[f"mid:{case}/eps_ir_t50"] = calls[1]
    for k in range(5):
        seen[f"mid:{case}/enc_ir{k + 1}"] = encoded[k]
        seen[f"mid:{case}/enc_vi{k + 1}"] = encoded[5 + k]
        seen[f"mid:{case}/cross{k + 1}"] = joined[k]
    return seen


class TestGolden:
    @pytest.mark.parametrize("case", ["a", "b"])
    def test_every_result(self, case):
        arrays, config, _ = golden()
        expected = {n: a for n, a in arrays.items() if n[:2] != "in" and n[4:6] == f"{case}/"}
        assert len(expected) == {"a": 32, "b": 6}[case]
        gaps = dict(config["f32_vs_f64_max_abs"])
        gaps[f"out:{case}/image_255"] = 255 * gaps[f"out:{case}/tanh"]
        seen = run_case(case)
        assert set(expected) <= set(seen)
        assert_close({name: seen[name] for name in expected}, expected, gaps)

    def test_parity_notices_a_changed_weight(self):
        arrays, config, model = golden()
        pair, noise = given(arrays, "a")
        weight = model.diffusion.unet.stem.conv.weight.data
        try:
            weight[0, 0, 1, 1] += 0.003
            with torch.no_grad():
                image = model(*pair, noise)
        finally:
            weight[0, 0, 1, 1] -= 0.003
        difference = np.abs(image.numpy() * 255 - arrays["out:a/image_255"]).max() / 255
        assert difference > GAPS * config["f32_vs_f64_max_abs"]["out:a/tanh"]

    def test_the_padding_is_white(self):
        """Case b is 20x28, padded to 32x32; in the code's way or not at all."""
        arrays, _, model = golden()
        pair, noise = given(arrays, "b")
        white = [torch.nn.functional.pad(p, (0, 4, 0, 12), value=1.0) for p in pair]
        with torch.no_grad():
            assert torch.equal(model(*pair, noise), model(*white, noise)[:, :, :20, :28])


class TestSizes:
    def test_parameters_and_names_of_the_official_network(self):
        with torch.device("meta"):
            model = fe.build("dmfuse")
        unet = sum(p.numel() for p in model.diffusion.parameters())
        total = sum(p.numel() for p in model.parameters())
        assert (unet, total) == (24_473_315, 25_004_689)
        assert total == pytest.approx(24.967e6, rel=0.03)  # the paper's count
        files = json.loads(shared_path("reference", "dmfuse", "state_dict.json").read_text())
        for part, file in (("head", files["files"][0]), ("diffusion", files["files"][1])):
            official = {e["name"]: torch.empty(e["shape"], device="meta") for e in file["entries"]}
            fe.load_checkpoint(model, **{part: official})

    def test_operations_of_the_official_network(self):
        """Multiply-adds of the convolutions at 256x256, as counted in the official code."""
        with torch.device("meta"):
            model = fe.build("dmfuse")
            x = torch.empty(1, 1, 256, 256)
            _, unet = operations(model.diffusion, torch.empty(1, 3, 256, 256), 0.99)
            _, total = operations(model, x, x)
        assert unet / 2e9 == pytest.approx(44.86, abs=0.1)
        assert (total - 6 * unet) / 2e9 == pytest.approx(16.77, abs=0.1)

    def test_the_small_one_fits_an_edge_device(self):
        with torch.device("meta"):
            model = fe.build("dmfuse-s")
            x = torch.empty(1, 1, 480, 640)
            total, _ = operations(model, x, x)
        assert sum(p.numel() for p in model.parameters()) == 775_917  # in the docstring
        assert total / 1e9 == pytest.approx(70, abs=0.5)  # likewise; 120 is the limit

    @pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 48)])
    @pytest.mark.parametrize("name", ["dmfuse", "dmfuse-s"])
    def test_any_size_works(self, name, size):
        model = tiny(name, **SMALL)
        with torch.no_grad():
            fused = model(*picture_pair(size))
        assert fused.shape == (1, 1, *size)
        assert torch.isfinite(fused).all() and fused.min() >= 0 and fused.max() <= 1

    def test_pictures_of_a_batch_do_not_meet(self):
        model = tiny("dmfuse-s", **SMALL)
        a, b = picture_pair((32, 64), batch=2)
        with torch.no_grad():
            together = model(a, b)
            apart = torch.cat([model(a[i : i + 1], b[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)

    def test_levels_of_equal_width_share_an_encoder(self):
        model = tiny("dmfuse", **SMALL)
        assert model.encoder_of == [0, 1, 2, 3, 3] and len(model.encoders) == 4
        assert tiny("dmfuse-s", **SMALL).encoder_of == [0, 1, 2, 3]


def attention_by_hand(centre, path, value):
    """Criss-cross attention in loops: every pixel to its row and column, itself once."""
    _, _, height, width = value.shape
    out = torch.zeros_like(value)
    for i in range(height):
        for j in range(width):
            cross = [(i, w) for w in range(width)] + [(h, j) for h in range(height) if h != i]
            scores = torch.stack([(centre[0, :, i, j] * path[0, :, h, w]).sum() for h, w in cross])
            weights = scores.softmax(0)
            seen = torch.stack([value[0, :, h, w] for h, w in cross])
            out[0, :, i, j] = (weights[:, None] * seen).sum(0)
    return out


class TestCorrection:
    def made(self, added, side, *, patch=2):
        """A head that says the same everywhere, on two pictures."""
        layer = Correction(3, patch)
        with torch.no_grad():
            layer.conv.weight.zero_()
            added, side = (torch.full((patch**2,), math.atanh(x)) for x in (added, side))
            layer.conv.bias.copy_(torch.cat([added, side]))
            a, b = picture_pair((8, 12), batch=2)
            return layer(torch.randn(2, 6, 8 // patch, 12 // patch), a, b), a, b

    @pytest.mark.parametrize("patch", [1, 2])
    def test_side_and_sum(self, patch):
        near = 1 - 1e-7  # what atanh takes
        for added, side, wanted in (
            (0.0, 0.0, lambda a, b: (a + b) / 2),
            (0.0, near, lambda a, b: a),
            (0.0, -near, lambda a, b: b),
            (0.25, 0.5, lambda a, b: 0.75 * a + 0.25 * b + 0.25),
        ):
            got, a, b = self.made(added, side, patch=patch)
            torch.testing.assert_close(got, wanted(a, b), rtol=0, atol=1e-5)

    def test_it_can_tell_which_is_brighter(self):
        """A sign of a - b in the sources' features alone makes the maximum of both."""
        layer = Correction(2, 1)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
            layer.look.conv.weight[0, :, 1, 1] = torch.tensor([1.0, -1.0])  # a - b, leaky
            layer.look.conv.weight[1, :, 1, 1] = torch.tensor([-1.0, 1.0])  # b - a
            layer.join.weight[0, 4, 1, 1] = layer.join.weight[1, 5, 1, 1] = 1.0
            layer.conv.weight[1, :2, 0, 0] = torch.tensor([1e6, -1e6])  # the side
            a, b = picture_pair((8, 12), batch=2)
            got = layer(torch.zeros(2, 4, 8, 12), a, b)
        torch.testing.assert_close(got, torch.maximum(a, b), rtol=0, atol=1e-5)

    def test_blocks_of_pixels(self):
        """Channels are the sum's 2x2 pixels, then the side's."""
        layer = Correction(1, 2)
        with torch.no_grad():
            layer.conv.weight.zero_()
            layer.conv.bias.copy_(torch.atanh(torch.arange(8) / 10))
            a, b = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
            got = layer(torch.zeros(1, 2, 1, 1), a, b)
        added = torch.tensor([[0.0, 0.1], [0.2, 0.3]])
        torch.testing.assert_close(got[0, 0], 0.5 + (added + 0.4) / 2 + added)


class TestExchange:
    @pytest.mark.parametrize("update", ["code", "paper"])
    def test_who_asks_whom(self, update):
        model = tiny("dmfuse-s", update=update, head_width=8)
        x, y = torch.randn(2, 1, 8, 3, 4)
        with torch.no_grad():
            got = model.exchange(x, y)
            (qx, kx, vx), (qy, ky, vy) = model.project(x), model.project(y)
            if update == "code":
                gamma = model.join.gamma
                expected = [
                    x + gamma * attention_by_hand(qy, kx, vx),
                    y + gamma * attention_by_hand(qx, ky, vy),
                ]
            else:
                expected = [
                    x + attention_by_hand(kx, qy, vx),
                    y + attention_by_hand(ky, qx, vy),
                ]
        torch.testing.assert_close(got, torch.cat(expected, dim=1), rtol=0, atol=2e-5)


class TestNoise:
    def test_seeds_and_levels(self):
        model = tiny("dmfuse-s", **SMALL)
        levels = []
        model.diffusion.register_forward_hook(lambda m, i, o: levels.append(i[1]))
        a, b = picture_pair((32, 32))
        with torch.no_grad():
            one, again = model(a, b), model(a, b)
            model.seed = 1
            other = model(a, b)
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert all(isinstance(level, float) for level in levels)
        assert levels[:6] == levels[6:12] != levels[12:]
        # The ranges of the official draws.
        for first in (0, 3):
            t5, t50, t100 = levels[first : first + 3]
            assert 0.99994 < t5 < 0.99996 and 0.99875 < t50 < 0.99881 and 0.9959 < t100 < 0.9961

    def test_some_of_them_can_be_handed_in(self):
        model = tiny("dmfuse-s", **SMALL)
        a, b = picture_pair((32, 32))
        with torch.no_grad():
            level = model(a, b, noise={"level_ir_t100": torch.tensor([0.5])})
            assert not torch.equal(level, model(a, b))

    @pytest.mark.parametrize(
        ("noise", "message"),
        [
            ({"level_ir_t6": torch.ones(1)}, r"\['level_ir_t6'\]; expected names out of"),
            ({"level_ir_t5": torch.ones(2)}, r"got \(2,\); expected \(1,\)"),
            ({"noise_vi_t5": torch.ones(1, 1, 32, 32)}, r"expected \(1, 3, 32, 32\)"),
        ],
    )
    def test_refused(self, noise, message):
        with pytest.raises(SettingError, match=message):
            tiny("dmfuse-s", **SMALL)(*picture_pair((30, 32)), noise)


def test_gradient_reaches_every_parameter_that_serves_the_result():
    model = tiny("dmfuse-s", **SMALL).train()
    a, b = picture_pair((32, 32))
    model.fuse(a, b).square().mean().backward()
    untouched = {n for n, p in model.named_parameters() if p.grad is None}
    # What comes behind the last feature of the U-Net serves its own training.
    assert {n.removeprefix("diffusion.").split(".blocks")[0] for n in untouched} == {
        "unet.up.0",
        "unet.norm.weight",
        "unet.norm.bias",
        "unet.head.weight",
        "unet.head.bias",
    }


def test_the_forward_can_be_traced():
    model = tiny("dmfuse-s", **SMALL)
    graph, names, calls = outer_graph(model)
    assert calls == {
        "diffusion.time": 6,
        "diffusion.unet": 6,
        **{f"encoders.{i}": 2 for i in range(4)},
        "project": 8,
        "join": 4,
        "decoder": 3,
        "output": 1,
    }
    ops = {"criss_cross_attention", "ddim_step", "standard_normal"}
    assert names == {"sub", "mul", "cat", "clamp", "getitem", *ops}
    pair = picture_pair((32, 64))
    with torch.no_grad():
        assert torch.equal(graph(*pair), model(*pair))


class TestCheckpoints:
    def official(self, model, part):
        own = model.state_dict()
        return OrderedDict(
            (entry.names[0], own[mine].clone())
            for mine, entry in model.official_parts()[part].items()
        )

    def test_two_files(self, tmp_path):
        source = tiny("dmfuse", seed=3, **SMALL)
        diffusion = self.official(source, "diffusion")
        diffusion["betas"] = torch.zeros(2000)
        diffusion["posterior_log_variance_clipped"] = torch.zeros(2000)
        head = self.official(source, "head")
        head["conv_in3.conv2d.weight"] = torch.zeros(32, 64, 1, 1)
        for name in list(head):
            if ".fc" in name and name.endswith("weight"):
                head[name] = head[name].flatten(1)  # fully connected layers there
        torch.save(diffusion, tmp_path / "I1_E1_gen.pth")
        torch.save(head, tmp_path / "model.model")
        model = fe.load_checkpoint(
            tiny("dmfuse", seed=4, **SMALL),
            diffusion=tmp_path / "I1_E1_gen.pth",
            head=tmp_path / "model.model",
        )
        theirs = source.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())

    def test_the_paper_form_has_no_gamma(self):
        head = self.official(tiny("dmfuse", **SMALL), "head")
        fe.load_checkpoint(tiny("dmfuse", update="paper", **SMALL), head=head)

    def test_files_in_each_others_place(self):
        model = tiny("dmfuse", **SMALL)
        with pytest.raises(
            CheckpointError, match="diffusion: missing.*diffusion: unknown: conv_in1"
        ):
            fe.load_checkpoint(model, diffusion=self.official(model, "head"))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"times": ()}, r"times=\(\); expected numbers from 1 to 2000"),
            ({"times": (0,)}, r"times=\(0,\)"),
            ({"times": (2001,)}, r"times=\(2001,\)"),
            ({"update": "x"}, "update='x'; expected one of"),
            ({"head_width": 1}, "head_width=1; expected a number >= 2"),
            ({"groups": 3}, "groups to divide every width"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(SettingError, match=message):
            tiny("dmfuse", **settings)

    def test_one_time_is_enough(self):
        model = tiny("dmfuse-s", times=(100,), **SMALL)
        assert model.noise_names() == [
            f"{kind}_{source}_t100" for source in ("ir", "vi") for kind in ("level", "noise")
        ]
        with torch.no_grad():
            assert model(*picture_pair((32, 32))).shape == (1, 1, 32, 32)

    def test_settings_build_the_same_model_again(self):
        model = fe.build("dmfuse-s", width=8, groups=4)
        again = fe.build(model.name, **json.loads(json.dumps(model.settings)))
        assert again.stages == model.stages
        assert {n: p.shape for n, p in again.state_dict().items()} == {
            n: p.shape for n, p in model.state_dict().items()
        }
