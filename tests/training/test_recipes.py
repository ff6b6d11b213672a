"""Every recipe and stage: it learns, trains its own part alone, resumes; and its terms by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fuseengine as fe
from fuseengine.errors import TrainingError, UnknownNameError
from fuseengine.training import losses
from fuseengine.training.masking import dual_mask
from fuseengine.training.perceptual import perceptual_loss
from fuseengine.training.recipes import recipe_for, stages_of
from fuseengine.training.recipes.base import sometimes_grey
from fuseengine.training.recipes.dmfuse import DMFuseFusion
from fuseengine.training.recipes.drmf import DRMFFusion, DRMFRestoration, target_mask
from fuseengine.training.recipes.mask_difuser import MaskDiFuserRecipe
from fuseengine.training.trainer import TrainSettings, train
from tests.helpers import picture_pair, tiny
from tests.training.test_data import write_pairs

# What makes the -s configurations a few thousand weights.
SMALL = {
    "drfusion-s": {"steps": 2},
    "mask-difuser-s": {
        "content_width": 8,
        "content_blocks": 1,
        "semantic_widths": (8, 8, 8, 8),
        "semantic_layers": 1,
        "multipliers": (1, 1, 1, 1),
        "steps": 2,
    },
    "dmfuse-s": {"head_width": 8, "multipliers": (1, 1, 1, 1)},
    "dmnet-s": {"layers": (1, 1, 1), "unet_width": 8, "multipliers": (1, 1)},
    "drmf-s": {"weight_width": 8, "multipliers": (1, 1, 1), "steps": 3},
}
NOISE = {"predict": "noise"}
CASES = [
    ("drfusion-s", "fusion", {}),
    ("mask-difuser-s", "masking", {}),
    ("mask-difuser-s", "masking", NOISE),
    ("mask-difuser-s", "masking", {"predict": "clean"}),
    ("mask-difuser-s", "pairs", {}),
    ("dmfuse-s", "diffusion", {}),
    ("dmfuse-s", "fusion", {}),
    ("dmnet-s", "reconstruction", {}),
    ("dmnet-s", "fusion", {}),
    ("drmf-s", "restoration", {}),
    ("drmf-s", "restoration", {**NOISE, "update": "code"}),
    ("drmf-s", "restoration", {"task": "restore"}),
    ("drmf-s", "fusion", {}),
    ("drmf-s", "fusion", {"task": "medical"}),
    ("drmf-s", "refinement", {}),
]
STAGES = [(name, stage) for name, stage, settings in CASES if not settings]

pytestmark = pytest.mark.filterwarnings("ignore:training without the perceptual term")


def small(name, **settings):
    return tiny(name, **{**SMALL[name], **settings})


def patches(model, recipe, *, batch=2, size=32):
    """Clean pictures as the recipe gets them, coloured where the model is."""
    planes = [picture_pair((size, size), batch=batch, seed=i) for i in range(3)]
    count = 2 if recipe.layout == "pairs" else 1
    planes = planes[: 3 if model.channels == "rgb" else 1]
    return [torch.cat([pair[i] for pair in planes], dim=1) for i in range(count)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def total(parts):
    return torch.stack(list(parts.values())).sum()


@pytest.mark.parametrize(("name", "stage", "settings"), CASES)
def test_a_step_lowers_the_loss(name, stage, settings):
    model = small(name, **settings)
    recipe = recipe_for(model, stage)
    trained = recipe.trained(model)
    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True).train()
    parameters = [p for part in trained for p in part.parameters()]
    pictures = patches(model, recipe)
    seen = []
    for _ in range(2):
        parts = recipe(model, pictures, generator(1))
        assert all(v.ndim == 0 and torch.isfinite(v) for v in parts.values())
        loss = total(parts)
        seen.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        # Downhill by a hundredth of what a straight line would make of the way to 0.
        steep = sum(float((g**2).sum()) for g in gradients if g is not None)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    p -= 0.01 * seen[0] / steep * g
    assert seen[1] < seen[0]
    unused = [g is None for g in gradients]
    assert sum(unused) <= 0.2 * len(unused)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_training_stops_resumes_and_keeps_what_is_frozen(name, stage, tmp_path):
    data = write_pairs(tmp_path / "data", ((40, 52), (36, 44)))
    settings = TrainSettings(steps=2, rate=1e-3, warmup=1, patch=32, batch=1, ema=0.5)

    def run(out, model, **options):
        summary = train(
            model,
            data,
            tmp_path / out,
            settings,
            stage=stage,
            fresh=False,
            progress=False,
            **options,
        )
        return model, summary

    before = small(name)
    whole, summary = run("whole", small(name))
    _, first = run("parts", small(name), stop_after=0.0)
    resumed, second = run("parts", small(name, seed=9))
    assert (first["steps"], second["steps"]) == (1, 2)
    assert second["losses"] == pytest.approx(summary["losses"], rel=1e-5)
    trained = {id(p) for part in recipe_for(whole, stage).trained(whole) for p in part.parameters()}
    moved = 0
    for old, (key, new), again in zip(
        before.parameters(), whole.named_parameters(), resumed.parameters(), strict=True
    ):
        torch.testing.assert_close(again, new, rtol=0, atol=1e-6)
        assert id(new) in trained or torch.equal(old, new), key
        assert new.requires_grad and new.grad is None
        moved += not torch.equal(old, new)
    assert moved > 0.5 * len(trained) and not whole.training
    folder = summary["weights"].parent
    assert folder.name == (stage if len(stages_of(whole)) > 1 else "whole")
    assert (folder / "grid_000002.png").stat().st_size > 500


class TestStages:
    def test_names(self):
        expected = {
            "drfusion-s": ["fusion"],
            "mask-difuser-s": ["masking", "pairs"],
            "dmfuse-s": ["diffusion", "fusion"],
            "dmnet-s": ["reconstruction", "fusion"],
            "drmf-s": ["restoration", "fusion", "refinement"],
        }
        assert {name: stages_of(small(name)) for name in SMALL} == expected
        assert stages_of(small("drmf-s", task="restore")) == ["restoration"]
        assert stages_of(small("drmf-s", steps=1)) == ["restoration", "refinement"]
        assert len(stages_of(small("drmf-s", steps=1, task="medical"))) == 3

    def test_which(self):
        model = small("drmf-s")
        with pytest.raises(
            TrainingError, match="got none, expected one of restoration, fusion, refinement"
        ):
            recipe_for(model)
        with pytest.raises(UnknownNameError, match="'fusio'; .* Did you mean 'fusion'"):
            recipe_for(model, "fusio")
        assert isinstance(recipe_for(small("drmf-s", task="restore")), DRMFRestoration)

    def test_weights_of_terms(self):
        model = small("dmfuse-s")
        recipe = recipe_for(model, "fusion", {"correlation": 2.0, "ssim": 0.0})
        assert recipe.weights.correlation == 2 and recipe.weights.gradient == 16
        a, b = patches(model, recipe)
        parts = recipe(model, (a, b), generator())
        assert parts["ssim"] == 0 and parts["correlation"] > 0 and "selection" not in parts
        with pytest.raises(UnknownNameError, match="loss term 'gradien'.*Did you mean 'gradient'"):
            recipe_for(model, "fusion", {"gradien": 1.0})

    def test_the_second_takes_the_first_ones_weights(self, tmp_path):
        data = write_pairs(tmp_path / "data", ((40, 52),))
        settings = TrainSettings(steps=1, patch=32, batch=1)

        def run(stage, out, **options):
            model = small("drmf-s", seed=7)
            train(model, data, out, settings, stage=stage, progress=False, **options)
            return model

        with pytest.raises(TrainingError, match="expected the weights of stage 'restoration'"):
            run("fusion", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        first = run("restoration", tmp_path / "out")
        assert (first.weight.unet.head.weight == 0).all()  # the first stage prepares all of it
        found = [
            run("fusion", tmp_path / "out"),
            run(
                "fusion",
                tmp_path / "other",
                init=tmp_path / "out" / "restoration" / "weights.safetensors",
            ),
        ]
        for model in found:
            for name, value in first.infrared.state_dict().items():
                assert torch.equal(model.infrared.state_dict()[name], value), name
            assert not torch.equal(model.weight.unet.head.weight, first.weight.unet.head.weight)
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"restoration", "fusion"}

    def test_a_folder_of_another_stage(self, tmp_path):
        data = write_pairs(tmp_path / "data", ((40, 52),))
        settings = TrainSettings(steps=1, patch=32, batch=1)
        train(small("dmfuse-s"), data, tmp_path, settings, stage="diffusion", progress=False)
        (tmp_path / "diffusion").rename(tmp_path / "fusion")
        with pytest.raises(TrainingError, match="belongs to stage 'diffusion'; expected 'fusion'"):
            train(
                small("dmfuse-s"),
                data,
                tmp_path,
                settings,
                stage="fusion",
                fresh=False,
                progress=False,
            )


class TestMaskDiFuser:
    def test_terms(self, monkeypatch):
        """A network that answers 0 (mid grey) has losses that can be computed by hand."""
        model = small("mask-difuser-s", predict="clean")
        for p in model.unet.head.parameters():
            torch.nn.init.zeros_(p)
        recipe = MaskDiFuserRecipe()
        (x,) = patches(model, recipe)
        with torch.no_grad():
            parts = recipe(model, (x,), generator())
        grey = torch.full_like(x, 0.5)
        assert parts["diffusion"] == pytest.approx(float(((2 * x - 1) ** 2).mean()), rel=1e-5)
        rms = ((x - 0.5) ** 2).mean((1, 2, 3)).sqrt().mean()
        assert parts["pixel"] == pytest.approx(0.05 * float(rms), rel=1e-4)
        assert parts["ssim"] == pytest.approx(
            0.05 * float((1 - losses.ssim(grey, x)).mean()), rel=1e-5
        )
        assert parts["colour"] == pytest.approx(float(losses.colour_angle(grey, x)), rel=1e-5)
        assert ("perceptual" in parts) == (perceptual_loss() is not None)
        # The same of a network of noise: it says there is none, so x_t / sqrt(abar) is the picture.
        model.predict = "noise"
        with torch.no_grad():
            parts = recipe(model, (x,), generator())
        assert parts["diffusion"] == pytest.approx(1, abs=0.1)  # the noise's power

    def test_a_correction_starts_at_the_mean(self):
        """Two equal views are then their own answer."""
        model = small("mask-difuser-s")
        recipe = MaskDiFuserRecipe({"perceptual": 0.0})
        recipe.initialise(model)
        recipe.views = lambda x, generator: (x, x)
        with torch.no_grad():
            parts = recipe(model, patches(model, recipe), generator())
        assert float(total(parts)) < 1e-5

    def test_pairs(self):
        """By hand for a model that gives the mean: grey with a coloured visible picture."""
        model = small("mask-difuser-s")
        recipe = recipe_for(model, "pairs")
        recipe_for(model, "masking").initialise(model)
        a, b = patches(model, recipe)
        a = a[:, :1].expand_as(a)
        with torch.no_grad():
            parts = recipe(model, (a, b), generator())
            draws = generator()
            a, b = sometimes_grey(a, b, draws)
            made_a, made_b = recipe.known_pair(b, draws)
        mean = losses.to_ycbcr((a + b) / 2)
        y_a, y_b = losses.to_ycbcr(a)[0], losses.to_ycbcr(b)[0]
        expected = 0.3 * losses.brightest(mean[0], y_a, y_b)
        assert parts["brightest"] == pytest.approx(float(expected), rel=1e-4)
        lost = (mean[1] - losses.to_ycbcr(b)[1]).abs().sum(1).mean()
        assert parts["chroma"] == pytest.approx(2 * float(lost), rel=1e-3)
        known = ((made_a + made_b) / 2 - b).abs().mean()
        assert parts["known"] == pytest.approx(2 * float(known), rel=1e-4)
        assert float(parts["range"]) < 1e-6

    def test_terms_of_both_halves(self):
        """A model that gives the mean: less contrast than the exposures that it is made of."""
        model = small("mask-difuser-s")
        recipe = recipe_for(model, "pairs")
        recipe_for(model, "masking").initialise(model)
        _, b = patches(model, recipe)
        with torch.no_grad():
            parts = recipe(model, (b, b), generator())
            alone = recipe.weights.terms(b, b, b)
        assert float(alone["contrast"]) == pytest.approx(0, abs=1e-5)
        assert float(parts["contrast"]) > 0.02

    def test_perceptual_term(self, monkeypatch):
        import fuseengine.training.recipes.mask_difuser as module

        class Distance(torch.nn.Module):
            def forward(self, x, y):
                return (x - y).abs().mean() + 7.0

        monkeypatch.setattr(module, "perceptual_loss", Distance)
        recipe = MaskDiFuserRecipe({"perceptual": 0.5})
        model = small("mask-difuser-s")
        assert recipe(model, patches(model, recipe), generator())["perceptual"] > 3.5
        recipe = MaskDiFuserRecipe({"perceptual": 0.0})
        assert "perceptual" not in recipe(model, patches(model, recipe), generator())

    def test_views(self):
        recipe = MaskDiFuserRecipe(form="code")
        x = torch.rand((2, 3, 32, 32), generator=generator())
        a, b = recipe.views(x, generator())
        clean = [((v == x).all(1).float().mean((1, 2)) * 64).round() for v in (a, b)]
        assert (torch.stack(clean) >= 30).all()  # cells; what snow left clean comes on top
        one, _ = dual_mask(x, x, generator(), form="code")
        assert int((one[0] == x[0]).all(0).float().mean() * 64) == 36


def test_a_quarter_without_colour():
    a, b = torch.rand((2, 400, 3, 4, 4), generator=generator())
    grey_a, grey_b = sometimes_grey(a, b, generator())
    spread = [x.amax(1).sub(x.amin(1)).flatten(1).amax(1) for x in (grey_a, grey_b)]
    without = [s == 0 for s in spread]
    assert torch.equal(*without) and 60 <= int(without[0].sum()) <= 140
    kept = ~without[0]
    assert torch.equal(grey_a[kept], a[kept]) and torch.equal(grey_b[kept], b[kept])
    torch.testing.assert_close(losses.to_ycbcr(grey_b)[0], losses.to_ycbcr(b)[0], rtol=0, atol=1e-6)


class TestDMFuse:
    def test_orthogonal_start(self):
        model = small("dmfuse-s")
        recipe_for(model, "diffusion").initialise(model)
        matrix = model.diffusion.unet.down[0].blocks[0].conv1.weight.flatten(1)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)

    def test_terms(self, monkeypatch):
        model, (a, b) = small("dmfuse-s"), picture_pair((32, 32))
        fused = 0.7 * a + 0.1 * b
        monkeypatch.setattr(type(model), "fuse", lambda self, a, b, noise: fused)
        code, paper = (
            DMFuseFusion(form=form)(model, (a, b), generator()) for form in ("code", "paper")
        )
        edges = [float(losses.edge_strength(x).mean()) for x in (a, b)]
        likeness = [float(losses.ssim(fused, x)) for x in (a, b)]
        weighted = (edges[0] * likeness[0] + edges[1] * likeness[1]) / sum(edges)
        strongest = float(losses.strongest_edges(fused, a, b))
        assert code["ssim"] == pytest.approx(10 * (1 - weighted), rel=1e-4)
        assert code["gradient"] == pytest.approx(16 * strongest, rel=1e-5)
        assert code["intensity"] == pytest.approx(14 * float(losses.brightest(fused, a, b)))
        assert paper["ssim"] == pytest.approx(1 - sum(likeness) / 2, rel=1e-4)
        assert paper["gradient"] == pytest.approx(20 * strongest, rel=1e-5)
        assert paper["intensity"] == pytest.approx(4 * float((fused - (a + b) / 2).abs().mean()))

    def test_noise_is_drawn_anew(self):
        model, (a, _) = small("dmfuse-s"), picture_pair((32, 32), batch=2)
        recipe = DMFuseFusion()
        noise = recipe.noise(model, a, generator())
        assert set(noise) == set(model.noise_names())
        assert noise["noise_ir_t5"].shape == (2, 3, 32, 32)
        assert not torch.equal(noise["noise_ir_t5"], noise["noise_vi_t5"])
        assert noise["level_vi_t100"].shape == (2,)
        table = model.table**0.5
        assert (noise["level_vi_t100"] > table[100]).all()
        assert (noise["level_vi_t100"] < table[99]).all()
        again = recipe.noise(model, a, generator(1))
        assert not torch.equal(noise["noise_ir_t5"], again["noise_ir_t5"])


class TestDMNet:
    def test_reconstruction(self, monkeypatch):
        model, (a, b) = small("dmnet-s"), picture_pair((32, 32))
        monkeypatch.setattr(type(model), "reconstruct", lambda self, x: 0.9 * x)
        parts = recipe_for(model, "reconstruction", {"infrared": 2.0})(model, (a, b), generator())
        for scale, name, x in ((2, "infrared", a), (1, "visible", b)):
            square = float((0.1 * x).square().mean())
            expected = scale * (square + 5 * float(1 - losses.ssim(0.9 * x, x)))
            assert parts[name] == pytest.approx(expected, rel=1e-4)

    def test_fusion(self, monkeypatch):
        model, (a, b) = small("dmnet-s"), picture_pair((32, 32))
        fused = 0.5 * a + 0.2 * b
        monkeypatch.setattr(type(model), "forward", lambda self, a, b, noise: fused)
        parts = recipe_for(model, "fusion")(model, (a, b), generator())
        assert parts["intensity"] == pytest.approx(float(losses.brightest(fused, a, b)))
        edges = float(losses.strongest_edges(fused, a, b))
        assert parts["gradient"] == pytest.approx(10 * edges, rel=1e-5)

    def test_the_noise_loss_does_not_reach_the_encoder(self):
        model, pair = small("dmnet-s"), picture_pair((32, 32))
        parts = recipe_for(model, "fusion")(model, pair, generator())
        parts["noise"].backward()
        assert model.compress.weight.grad is None
        assert all(p.grad is None for p in model.encoder.parameters())
        assert model.unet.head.weight.grad.abs().sum() > 0


class TestDRMF:
    @pytest.mark.parametrize("predict", ["noise", "clean"])
    def test_restoration(self, predict, monkeypatch):
        """With heads that answer 0 the error is the noise, or what the degradation did."""
        model = small("drmf-s", predict=predict)
        recipe = DRMFRestoration(chance=1.0)
        for network in (model.infrared, model.visible):
            for p in network.unet.head.parameters():
                torch.nn.init.zeros_(p)
        pictures = patches(model, recipe, batch=4)
        with torch.no_grad():
            parts = recipe(model, pictures, generator())
            same = DRMFRestoration(chance=0.0)(model, pictures, generator())
        if predict == "noise":
            assert parts["visible"] == pytest.approx(1, abs=0.05)
        else:
            assert parts["visible"] > 0.01 and same["visible"] == same["infrared"] == 0

    def test_the_start_is_the_average(self):
        """No correction and equal weights."""
        model = small("drmf-s")
        recipe = DRMFRestoration()
        recipe.initialise(model)
        a, b = patches(model, recipe)
        with torch.no_grad():
            torch.testing.assert_close(model(a, b), (a + b) / 2, rtol=0, atol=1e-5)

    def test_fusion_terms(self):
        a, b = patches(small("drmf-s"), DRMFFusion)
        fused, scale = 0.6 * a + 0.3 * b, 0.4
        mask = (torch.rand((2, 1, 32, 32), generator=generator()) < 0.3).float()
        parts = DRMFFusion.fusion(fused, (a, b), mask, scale)
        y, ya, yb = (losses.to_ycbcr(x)[0] for x in (fused, a, b))
        c, ca, cb = (losses.to_ycbcr(x)[1] for x in (fused, a, b))
        size = ca.abs().sum(1, keepdim=True) > cb.abs().sum(1, keepdim=True)
        edges, edges_a = losses.edge_strength(y), losses.edge_strength(ya)
        away = (1 - mask) * (c - torch.where(size, ca, cb)).abs()
        expected = {
            "brightest": scale * (y - torch.maximum(ya, yb)).abs().mean(),
            "inside": scale * (mask * (y - ya).abs()).mean(),
            "outside": scale * ((1 - mask) * (y - yb).abs()).mean(),
            "chroma": scale * (away[:, 0] + away[:, 1]).mean(),
            "gradient": scale * losses.strongest_edges(y, ya, yb),
            "inside_gradient": (mask * (edges - edges_a).abs()).mean(),
        }
        assert set(parts) == set(expected)
        for name, value in expected.items():
            assert parts[name] == pytest.approx(float(value), rel=1e-4), name

    def test_which_steps_count(self):
        model = small("drmf-s", steps=4)
        pictures = patches(model, DRMFFusion)
        seen = []
        original = DRMFFusion.fusion

        class Watched(DRMFFusion):
            @staticmethod
            def fusion(fused, pictures, mask, scale):
                seen.append(scale)
                return original(fused, pictures, mask, scale)

        scales = [float(step.sqrt_abar) for step in model.schedule()]
        Watched()(model, pictures, generator())
        assert seen == scales[1:]  # 1/2 is not learned
        seen.clear()
        Watched(steps="code")(model, pictures, generator())
        assert seen == scales[1:2]
        seen.clear()
        medical = small("drmf-s", steps=4, task="medical")
        parts = Watched()(medical, pictures, generator())
        assert seen == scales and not {"outside", "mask"} & set(parts)

    def test_smoothness_and_mask(self, monkeypatch):
        """A weight network of a constant answer: no edges, and an entropy known by hand."""
        model = small("drmf-s", steps=3)
        constant = 0.25
        logit = torch.full((1,), 2 * constant - 1).atanh()
        torch.nn.init.zeros_(model.weight.unet.head.weight)
        model.weight.unet.head.bias.data.fill_(float(logit))
        pictures = patches(model, DRMFFusion)
        with torch.no_grad():
            parts = DRMFFusion(chance=0.0)(model, pictures, generator())
        ya, yb = (losses.to_ycbcr(x)[0] for x in pictures)
        mask = target_mask(ya, yb)
        entropy = F.binary_cross_entropy(torch.full_like(mask, constant), mask)
        assert parts["smooth"] == pytest.approx(0, abs=1e-4)
        learned = len(model.schedule()) - 1
        assert parts["mask"] == pytest.approx(learned * 5 * float(entropy), rel=1e-4)

    def test_targets(self):
        a, b = torch.full((1, 1, 64, 64), 0.3), torch.full((1, 1, 64, 64), 0.4)
        a[..., 20:32, 20:28] = 0.9  # a person
        a[..., 50:60, 50:60] = b[..., 50:60, 50:60] = 1.0  # a lamp, bright in both
        mask = target_mask(a, b)
        assert mask[..., 22:30, 22:26].all()
        assert mask.sum() < 14 * 16  # the person with a margin, not the lamp, not the ground
        assert mask[..., 48:62, 48:62].sum() == 0
        grain = 0.5 + 0.02 * torch.randn((1, 1, 64, 64), generator=generator())
        assert target_mask(grain, torch.zeros_like(grain)).sum() == 0


@pytest.mark.parametrize("name", ["drmf", "dmfuse", "mask-difuser", "drfusion"])
def test_official_configurations_have_recipes(name):
    """Narrow, but otherwise as the plain names are."""
    model = fe.build(name, width=8, groups=4, **({"semantic": "lean"} if "mask" in name else {}))
    for stage in stages_of(model):
        assert recipe_for(model, stage).trained(model)


def test_recipes_draw_from_their_generator_alone():
    for name, stage in STAGES:
        model = small(name).eval()
        recipe = recipe_for(model, stage)
        pictures = patches(model, recipe)
        state = torch.get_rng_state()
        with torch.no_grad():
            one = total(recipe(model, pictures, generator(1)))
            two = total(recipe(model, pictures, generator(1)))
            other = total(recipe(model, pictures, generator(2)))
        assert one == two and torch.equal(torch.get_rng_state(), state)
        assert one != other or name == "drfusion-s", name
