"""ONNX forms of layers and of whole networks against PyTorch, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuseengine.backends import openvino
from fuseengine.errors import CompileError
from fuseengine.export.onnx import OPSET, UnsupportedLayerError, stage_to_onnx
from fuseengine.models.dmfuse import FeatureEncoder, Join, Projections
from fuseengine.models.dmnet import ChannelSpatialAttention, InvertibleLayer
from fuseengine.models.layers import (
    ChannelSpatialGate,
    CrossAttention,
    ResidualBlock,
    SelfAttention,
    attend,
)
from fuseengine.models.mask_difuser import FeatureMixer
from fuseengine.models.transformer import ChannelNorm, TransformerLayer
from fuseengine.program import resolve
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture
from tests.helpers import TINY, randomise, system, tiny


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Inside(nn.Module):
    """A module as part of a network: alone it would be entered."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner(*inputs)


class Crop(nn.Module):
    """Cut to another picture's size, as the U-Net does after an up-step."""

    def forward(self, x, y):
        return x[:, :, : y.shape[2], : y.shape[3]] + y


def session(model):
    return ort_session(model.SerializeToString())


def ort_session(content):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def write(module, inputs, **options):
    """The module as ONNX with open height and width, refusing what the table does not know."""
    results = module(*inputs)
    results = results if isinstance(results, (tuple, list)) else (results,)
    use = options.get("use") or range(len(results))
    named = [
        (f"in{i}", (*x.shape[:2], *(f"{'HW'[j]}{i}" for j in range(x.ndim - 2))))
        for i, x in enumerate(inputs)
    ]
    made = [
        (f"out{i}", (*results[i].shape[:2], *(f"h{j}" for j in range(results[i].ndim - 2))))
        for i in use
    ]
    return stage_to_onnx(module.eval(), named, made, fallback=False, **options)


def compare(module, sizes, planes=(4,), *, atol=2e-6, batch=1, **options):
    """One dynamic model at several sizes."""
    module = randomise(Inside(module))
    shapes = [[(batch, c, *size) for c in planes] for size in sizes]
    with torch.no_grad():
        model = write(module, [noise(*shape) for shape in shapes[0]], **options)
        runner = session(model)
        for index, shape in enumerate(shapes):
            inputs = [noise(*s, seed=index + 7 * i) for i, s in enumerate(shape)]
            feeds = {f"in{i}": x.numpy() for i, x in enumerate(inputs)}
            expected = module(*inputs)
            expected = expected if isinstance(expected, (tuple, list)) else (expected,)
            if options.get("use"):
                expected = [expected[i] for i in options["use"]]
            for made, wanted in zip(runner.run(None, feeds), expected, strict=True):
                assert made.shape == tuple(wanted.shape)
                scale = max(1.0, float(wanted.abs().max()))
                np.testing.assert_allclose(made, wanted.numpy(), rtol=0, atol=atol * scale)
    return model


SIZES = [(6, 10), (7, 5)]

LAYERS = {
    "conv": nn.Conv2d(4, 6, 3, padding=1),
    "conv no bias": nn.Conv2d(4, 6, 1, bias=False),
    "conv stride": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv uneven": nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 1)),
    "conv dilation": nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "conv groups": nn.Conv2d(4, 8, 3, padding=1, groups=2),
    "conv depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "conv reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "conv reflect uneven": nn.Conv2d(4, 6, (1, 5), padding=(0, 2), padding_mode="reflect"),
    "conv up": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "conv up no bias": nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False),
    "conv up groups": nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2),
    "group norm": nn.GroupNorm(2, 4),
    "group norm of one": nn.GroupNorm(4, 4),
    "group norm of all": nn.GroupNorm(1, 4),
    "group norm plain": nn.GroupNorm(2, 4, affine=False),
    "group norm eps": nn.GroupNorm(2, 4, eps=0.3),
    "identity": nn.Identity(),
    "dropout": nn.Dropout(0.5),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "leaky relu": nn.LeakyReLU(0.3),
    "relu6": nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6()),
    "gelu": nn.GELU(),
    "upsample": nn.Upsample(scale_factor=2.0, mode="nearest"),
    "upsample uneven": nn.Upsample(scale_factor=(1.0, 3.0), mode="nearest"),
    "upsample bilinear": nn.Upsample(scale_factor=4, mode="bilinear"),
    "sequence": nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)),
}

FUNCTIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "sigmoid method": lambda x: x.sigmoid(),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky relu default": F.leaky_relu,
    "relu6": lambda x: F.relu6(x * 8.0),
    "gelu": lambda x: F.gelu(x * 3.0),
    "tanh": torch.tanh,
    "exp": lambda x: torch.exp(x) + (-1.0 * x).exp(),
    "rsqrt": lambda x: torch.rsqrt(x * x + 0.1),
    "softmax": lambda x: torch.softmax(x, dim=-1) + x.softmax(1),
    "normalize": lambda x: F.normalize(x, dim=-1) + F.normalize(x),
    "normalize of zeros": lambda x: F.normalize(x * 0.0, dim=1),
    "pad": lambda x: F.pad(x, (0, 1, 0, 1)),
    "pad with a number": lambda x: F.pad(x, (2, 0, 0, 3), value=0.7),
    "pad one side": lambda x: F.pad(x, (1, 2)),
    "pad reflect": lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "enlarge": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "enlarge bilinear": lambda x: F.interpolate(
        x, scale_factor=4.0, mode="bilinear", align_corners=False
    ),
    "enlarge corners": lambda x: F.interpolate(
        x, scale_factor=8.0, mode="bilinear", align_corners=True
    ),
    "chunk": lambda x: x.chunk(2, dim=1)[1] * torch.chunk(x, 4, 1)[0],
    "chunk of the last": lambda x: torch.cat(x.exp().chunk(2, dim=-1)[::-1], dim=-1),
    "unbind": lambda x: x.unbind(1)[2] - x.unbind(1)[0],
    "place": lambda x: x[:, 2],
    "place from the end": lambda x: x[:, -1, :, -2],
    "place and new axis": lambda x: x[:, 1, None, :, None] + x[:, :, None, :2][:, 3, :, :1],
    "matmul": lambda x: x @ x.transpose(-2, -1) + torch.matmul(x, x.transpose(2, 3)),
    "flatten": lambda x: x.flatten(2),
    "flatten between": lambda x: x.flatten(1, 2),
    "flatten all": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "unflatten between": lambda x: x.unflatten(1, (2, 2)).flatten(0, 1),
    "flat and back": lambda x: x.flatten(2).unflatten(2, (x.shape[2], x.shape[3])),
    "flat and back in front": lambda x: x.flatten(1, 2).unflatten(1, (4, -1)),
    "reshape": lambda x: x.reshape(x.shape[0], 2, x.shape[1] // 2, x.shape[2] * x.shape[-1]),
    "view": lambda x: x.view(x.shape[0], -1) * 2.0,
    "transposes": lambda x: x.flatten(2).transpose(1, 2)[:, None].transpose(0, -1),
    "rank after reductions": lambda x: x.mean((2, 3)).unflatten(1, (2, 2)).transpose(1, 2),
    "mean": lambda x: x.mean(dim=(2, 3), keepdim=True),
    "mean of one": lambda x: x.mean(1, True),
    "amax": lambda x: x.amax(dim=(2, 3), keepdim=True),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp low": lambda x: x.clamp(min=0.25),
    "clamp high": lambda x: x.clamp(max=0.25),
    "arithmetic": lambda x: (1 - x * 2.0) / (x * x + 3) + x / 4,
    "slice": lambda x: x[:, 1:3],
    "slice from the end": lambda x: x[:, :-1, 1:, -3:],
    "new axes": lambda x: x[:, :, 0:1, 0:1][:, :, None].mean(2),
    "concat": lambda x: torch.cat([x, x * 2.0], dim=1),
    "concat from the end": lambda x: torch.cat([x, x], -1),
}


class TestLayers:
    @pytest.mark.parametrize("name", LAYERS)
    def test_layer(self, name):
        compare(LAYERS[name], SIZES, batch=2)

    def test_linear(self):
        for layer in (nn.Linear(4, 5), nn.Linear(4, 5, bias=False)):
            module = randomise(nn.Sequential(layer))
            x = noise(2, 4)
            (made,) = session(write(module, [x])).run(None, {"in0": x.numpy()})
            np.testing.assert_allclose(made, module(x).detach().numpy(), rtol=0, atol=2e-6)

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_function(self, name):
        compare(Fn(FUNCTIONS[name]), SIZES, batch=2)

    def test_pixel_shuffle(self):
        """Several channels: only then do the two orders of depth to space differ."""
        compare(Fn(lambda x: F.pixel_shuffle(x, 2)), SIZES, planes=(8,))

    def test_crop_to_another_picture(self):
        module, runner = Crop().eval(), None
        for size, smaller in (((6, 10), (5, 9)), ((8, 8), (7, 8))):
            x, y = noise(1, 4, *size), noise(1, 4, *smaller, seed=1)
            runner = runner or session(write(module, [x, y]))
            (made,) = runner.run(None, {"in0": x.numpy(), "in1": y.numpy()})
            np.testing.assert_array_equal(made, module(x, y).numpy())

    @pytest.mark.parametrize("factor", [2, 3])
    def test_space_to_depth_merges_into_the_convolution(self, factor):
        """A convolution over blocks of pixels is a larger one with a stride; borders too."""

        class Blocks(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2 * factor**2, 5, 3, padding=1)

            def forward(self, x):
                return self.conv(F.pixel_unshuffle(x, factor))

        model = compare(Blocks(), [(12, 18), (6, 30)], planes=(2,), atol=4e-6)
        assert [n.op_type for n in model.graph.node] == ["Conv", "Identity"]

    def test_group_norm_of_a_flat_picture(self):
        """Variance 0: eps decides, as in PyTorch; the one-pass form would give noise."""
        module = randomise(nn.Sequential(nn.GroupNorm(2, 4)))
        x = noise(1, 4, 6, 8)
        runner = session(write(module, [x]))
        for flat in (torch.zeros(1, 4, 6, 8), torch.full((1, 4, 6, 8), 1000.0)):
            (made,) = runner.run(None, {"in0": flat.numpy()})
            expected = module.double()(flat.double()).float()
            # A mean in float32 is off by up to 1000 eps, which 1 / sqrt(1e-5) blows up by 316.
            np.testing.assert_allclose(made, expected.detach().numpy(), rtol=0, atol=0.05)
            module.float()

    def test_group_norm_far_from_zero(self):
        """Raw thermal counts have a mean of 1500 sigmas: E[x^2] - E[x]^2 would lose everything."""
        module = randomise(nn.Sequential(nn.GroupNorm(2, 4)))
        x = 30_000 + 20 * noise(1, 4, 40, 60)
        (made,) = session(write(module, [x])).run(None, {"in0": x.numpy()})
        expected = module.double()(x.double()).detach().numpy()
        assert np.abs(made - expected).max() < 2e-3  # 30 000 eps / 20


class TestUnknown:
    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (nn.Softplus(), "no ONNX form for layer Softplus"),
            (Fn(torch.erf), "no ONNX form for .*erf"),
            (Fn(lambda x: x.cumsum(1)), "no ONNX form for cumsum"),
            (Fn(lambda x: x[:, ::2]), "no ONNX form for index"),
            (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding other than"),
            (nn.GELU(approximate="tanh"), "gelu with approximate='tanh'"),
            (nn.Upsample(size=(8, 8)), "interpolation with mode='nearest'"),
            (Fn(lambda x: F.interpolate(x, scale_factor=1.5)), "scale_factor=1.5"),
            (Fn(lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic")), "mode='bicubic'"),
            (Fn(lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")), "mode='circular'"),
            (Fn(lambda x: F.normalize(x, p=1.0)), "normalize with p=1.0"),
            (
                Fn(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
                "attention with is_causal",
            ),
            (Fn(lambda x: x // 2.0), "no ONNX form for //"),
            (nn.Conv2d(4, 4, 3, padding="same"), "padding other than"),
            (Fn(lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
        ],
    )
    def test_refused(self, module, message):
        with pytest.raises(UnsupportedLayerError, match=message):
            write(nn.Sequential(module), [noise(1, 4, 6, 8)])
        assert issubclass(UnsupportedLayerError, CompileError)


def in_openvino(model, x):
    pytest.importorskip("openvino")
    core = openvino.core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)([x])[0]


class TestGroupNorm:
    """Means far from zero, where the rounding of a sum over all pixels shows."""

    @pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
    @pytest.mark.parametrize("rows", ["alike", "every 16th differs"])
    def test_raw_thermal_counts(self, runtime, rows):
        """No worse than for a mean of 0, where a plain mean is off by 0.01 and more."""
        layer = randomise(Inside(nn.GroupNorm(2, 8)))
        counts = (20.0 * noise(1, 8, 240, 320)).round()
        if rows != "alike":
            counts[:, :, ::16] += 200.0
        with torch.no_grad():
            model = write(layer, [counts])
            exact = layer.double()(counts.double()).numpy()  # the same for every mean

        def error(x):
            if runtime == "openvino":
                found = in_openvino(model, x.numpy())
            else:
                (found,) = session(model).run(None, {"in0": x.numpy()})
            return np.abs(found - exact).max()

        assert error(counts + 30000.0) <= 2 * error(counts) + 1e-4

    def test_the_layout_is_kept(self):
        """No reshape or transposition, for which runtimes would leave their channels-last form."""
        model = write(Inside(nn.GroupNorm(2, 8)), [noise(1, 8, 6, 10)])
        used = {node.op_type for node in model.graph.node}
        assert not used & {"Reshape", "Transpose", "Flatten", "InstanceNormalization"}

    def test_equal_matrices_are_stored_once(self):
        norms = nn.Sequential(*(nn.GroupNorm(2, 8) for _ in range(3)))
        model = write(norms, [noise(1, 8, 6, 10)])
        assert sum(tuple(i.dims) == (8, 8, 1, 1) for i in model.graph.initializer) == 1


class TestNetworks:
    @pytest.mark.parametrize("width", [(8, 8), (8, 16)])
    def test_residual_block(self, width):
        block = ResidualBlock(*width, groups=4)
        with torch.no_grad():
            module = randomise(block)
            shift = noise(1, width[1])
            runner = None
            for size in SIZES:
                x = noise(1, width[0], *size)
                runner = runner or session(write(module, [x, shift]))
                (made,) = runner.run(None, {"in0": x.numpy(), "in1": shift.numpy()})
                np.testing.assert_allclose(made, module(x, shift).numpy(), rtol=0, atol=2e-5)

    def test_skip_gate(self):
        compare(ChannelSpatialGate(16), SIZES, planes=(16,))

    @pytest.mark.parametrize(
        ("network", "planes"),
        [
            (SelfAttention(8, groups=2), (8,)),
            (CrossAttention(8, sources=2, groups=4), (8, 16, 16)),
            (ChannelSpatialGate(16, combine="sum"), (16,)),
            (ChannelNorm(8), (8,)),
            (TransformerLayer(8, 2, 2.66), (8,)),
            (InvertibleLayer(8), (8,)),
            (ChannelSpatialAttention(16), (16,)),
            (FeatureEncoder(8, 8), (8,)),
            (Projections(16), (16,)),
            (Join(learned=True), (4, 4, 4, 4)),
            (FeatureMixer(8, 4), (8,)),
        ],
        ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
    )
    @pytest.mark.parametrize("batch", [1, 2])
    def test_block(self, network, planes, batch):
        compare(network, SIZES, planes=planes, batch=batch, atol=5e-6)

    def test_attention_far_from_zero(self):
        """Scores of some hundreds: the exponentials must be taken of differences."""
        attention = Fn(lambda x: attend(x * 30.0, x * 30.0, x))
        compare(attention, SIZES, planes=(8,), atol=5e-5)

    def test_sources_smaller_than_the_picture(self):
        """Keys and values of another size than the queries."""
        module = randomise(nn.ModuleList([CrossAttention(8, sources=1, groups=2)]))[0]
        with torch.no_grad():
            runner = None
            for size, smaller in (((6, 10), (3, 5)), ((4, 4), (5, 7))):
                x, source = noise(1, 8, *size), noise(1, 16, *smaller, seed=1)
                runner = runner or session(write(module, [x, source]))
                (made,) = runner.run(None, {"in0": x.numpy(), "in1": source.numpy()})
                wanted = module(x, source).numpy()
                np.testing.assert_allclose(made, wanted, rtol=0, atol=5e-6)

    def test_as_many_arguments_as_are_given(self):
        class Sum(nn.Module):
            def forward(self, first, *others):
                return sum(others, first * 2.0)

        inputs = [noise(1, 2, 4, 6, seed=i) for i in range(3)]
        feeds = {f"in{i}": x.numpy() for i, x in enumerate(inputs)}
        (made,) = session(write(Sum(), inputs)).run(None, feeds)
        np.testing.assert_allclose(made, Sum()(*inputs).numpy(), rtol=1e-6)

    @pytest.mark.parametrize("name", TINY)
    def test_system(self, name):
        """Every stage in every form it is called with, at two sizes, without PyTorch's exporter."""
        model = system(name)
        program = capture(model)
        stages = ModelStages(model, program)
        for variant, calls in program.variants().items():
            runner = ort_session(stages.onnx(variant, fallback=False))
            module = stages.module(variant)
            for blocks in ((2, 3), (3, 2)):
                size = tuple(model.multiple * n for n in blocks)
                shapes = [resolve(program.values[n].shape, size) for n in calls[0].inputs]
                inputs = [0.5 * noise(*shape, seed=i) for i, shape in enumerate(shapes)]
                feeds = {f"in{i}": x.numpy() for i, x in enumerate(inputs)}
                with torch.no_grad():
                    wanted = module(*inputs)
                wanted = wanted if isinstance(wanted, (tuple, list)) else (wanted,)
                made = runner.run(None, feeds)
                for index, array in zip(variant.use, made, strict=True):
                    scale = max(1.0, float(wanted[index].abs().max()))
                    np.testing.assert_allclose(
                        array, wanted[index].numpy(), rtol=0, atol=1e-5 * scale
                    )

    @pytest.mark.parametrize(
        ("use", "patch"), [(None, 1), (None, 2), ([0], 2), ([1], 1), ([1, 0], 2)]
    )
    def test_whole_network(self, use, patch):
        """Sizes with odd halves: the crops must follow the size at run time."""
        model = tiny(patch=patch)
        unet = model.unet
        shift = noise(1, sum(unet.widths))
        with torch.no_grad():
            runner = None
            for size in ((10, 14), (16, 24), (2, 18)):
                x = noise(1, 3, size[0] * patch, size[1] * patch)
                written = runner or write(unet, [x, shift], use=use)
                runner = written if runner else session(written)
                made = runner.run(None, {"in0": x.numpy(), "in1": shift.numpy()})
                expected = unet(x, shift)
                expected = [expected[i] for i in use or (0, 1)]
                for result, wanted in zip(made, expected, strict=True):
                    assert result.shape == tuple(wanted.shape)
                    np.testing.assert_allclose(result, wanted.numpy(), rtol=0, atol=5e-5)

    def test_unused_results_cost_nothing(self):
        unet = tiny().unet
        inputs = [noise(1, 3, 16, 16), noise(1, sum(unet.widths))]
        with torch.no_grad():
            both, noise_only = write(unet, inputs), write(unet, inputs, use=[0])
        onnx.checker.check_model(noise_only)
        weights = [i.name for i in noise_only.graph.initializer]
        assert any(n.startswith("noise.") for n in weights)
        assert not any(n.startswith("weight.") for n in weights)
        assert any(i.name.startswith("weight.") for i in both.graph.initializer)
        assert len(noise_only.graph.node) < 0.8 * len(both.graph.node)

    def test_every_node_is_needed_and_named(self):
        model = tiny()
        source = ModelStages(model, capture(model))
        for variant in source.program.variants():
            model = onnx.load_from_string(source.onnx(variant))
            onnx.checker.check_model(model, full_check=True)
            assert model.opset_import[0].version == OPSET == 18
            read = {n for node in model.graph.node for n in node.input}
            read |= {o.name for o in model.graph.output}
            assert all(set(node.output) <= read for node in model.graph.node)
            assert all(i.name in read for i in model.graph.initializer)
            dims = [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
            assert dims == ["", "", "H", "W"]
