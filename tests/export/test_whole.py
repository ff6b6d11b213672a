"""A program as one ONNX model against the model itself, and files of both kinds."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fuseengine as fe
from fuseengine.errors import CompileError, SettingError, UnknownNameError
from fuseengine.export.files import CONSTANTS, PROGRAM, export_onnx
from fuseengine.export.graph import fixed, infer, split_attention
from fuseengine.export.typed import count_types, emulated, typed
from fuseengine.export.whole import INPUTS, noise_for, whole_to_onnx
from fuseengine.models.observation import Blur, Downsample, Identity
from fuseengine.program import Program
from fuseengine.runtime import tensors
from fuseengine.runtime.frames import FrameAdapter
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture
from tests.helpers import TINY, pictures_for, psnr, randomise, system, tiny

EDGE = [name for name in TINY if name.endswith("-s")]


def small(name):
    """A system with two steps at most: a whole model has its networks once per step."""
    return system(name, **({"steps": 2} if name.startswith(("drmf", "mask")) else {}))


def run(model, feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def write(model, size=None, **options):
    program = capture(model)
    return whole_to_onnx(program, ModelStages(model, program), size, **options)


def eager(model, a, b):
    with torch.no_grad():
        return model(a, b).numpy()


def planes(model, blocks, seed=0):
    """A pair of so many multiples, the model's fused picture, and the feeds."""
    size = tuple(n * model.multiple for n in blocks)
    pair = pictures_for(model, size, seed=seed)
    feeds = {name: x.numpy() for name, x in zip(INPUTS, pair, strict=True)}
    return size, eager(model, *pair), feeds


def is_checked(made, opset=18):
    onnx.checker.check_model(made, full_check=True)
    assert made.opset_import[0].version == opset
    names = [i.name for i in made.graph.initializer]
    assert len(names) == len(set(names))
    return True


class TestPictures:
    @pytest.mark.parametrize("name", TINY)
    def test_known_size(self, name):
        model = small(name)
        size, wanted, feeds = planes(model, (2, 3))
        made = write(model, size)
        assert is_checked(made)
        assert not {"Shape", "Range", "Equal"} & {n.op_type for n in made.graph.node}
        assert all(isinstance(n, int) for info in infer(made).values() for n in info.shape)
        assert psnr(run(made, feeds), wanted) >= 80

    @pytest.mark.parametrize("name", EDGE)
    def test_open_size(self, name):
        """One model, two sizes; what networks start from is an input."""
        model = small(name)
        made = write(model)
        assert is_checked(made)
        for blocks in ((2, 3), (3, 2)):
            size, wanted, feeds = planes(model, blocks)
            noise = noise_for(made, size)
            assert set(noise) == {v.name for v in made.graph.input} - set(INPUTS)
            assert psnr(run(made, {**feeds, **noise}), wanted) >= 80

    @pytest.mark.parametrize(
        ("name", "size"),
        [
            ("drfusion-s", (37, 45)),
            ("drfusion-s", None),
            ("dmfuse-s", (37, 45)),  # padded with white
            ("drmf-s", (37, 45)),  # in colour
            ("mask-difuser", None),  # stretched to what the frame holds
        ],
    )
    def test_frames(self, name, size):
        """Colour, padding, cropping and rounding as an engine does them."""
        model = small(name)
        made = write(model, size, frames=True)
        assert is_checked(made)
        height, width = size or (37, 45)
        rng = np.random.default_rng(0)
        infrared = rng.integers(0, 256, (height, width), np.uint8)
        visible = rng.integers(0, 256, (height, width, 3), np.uint8)
        adapter = FrameAdapter((height, width), model.channels, model.multiple, model.padding)
        pair = np.zeros((2, 1, adapter.planes, *adapter.padded), np.float32)
        adapter.load(infrared, visible, *pair)
        # Not padded by the model: its stretching must see what an executor's does.
        wanted = adapter.store(executed(model, pair, (height, width)), visible)
        feeds = {"infrared": infrared[None], "visible": visible[None]}
        found = run(made, {**feeds, **noise_for(made, adapter.padded)})
        assert found.dtype == np.uint8
        assert found.shape == (1, height, width, 3)
        difference = np.abs(found[0].astype(int) - wanted)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3  # ties

    @pytest.mark.parametrize(
        "operators",
        [(Blur.gaussian(1.2), Identity()), (Downsample(2), Blur.gaussian(0.8))],
        ids=["blur", "downsample"],
    )
    def test_degradation_operators(self, operators):
        model = tiny(operators=operators)
        size, wanted, feeds = planes(model, (4, 5))
        made = write(model, size)
        assert is_checked(made)
        assert psnr(run(made, feeds), wanted) >= 80

    def test_a_filter_needs_a_size(self):
        with pytest.raises(SettingError, match="written for one size only"):
            write(tiny(operators=(Blur.gaussian(1.2), Identity())))

    def test_a_model_without_stages(self):
        class Mean(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = torch.nn.Conv2d(2, 1, 3, padding=1)

            def forward(self, a, b):
                return torch.sigmoid(self.conv(torch.cat([a, b], dim=1)))

        model = randomise(Mean())
        pair = torch.rand(2, 1, 1, 9, 14)
        made = write(model, (9, 14))
        feeds = {name: x.numpy() for name, x in zip(INPUTS, pair, strict=True)}
        assert psnr(run(made, feeds), eager(model, *pair)) > 100

    def test_trained_at_vga(self):
        """drfusion-s on the demo pair, in float32 and both half types, as the guard asks."""
        model = fe.load_model("drfusion-s")
        infrared, visible = fe.demo_pair()
        adapter = FrameAdapter((480, 640), "luma", model.multiple)
        pair = np.zeros((2, 1, 1, 480, 640), np.float32)
        adapter.load(infrared, visible, *pair)
        wanted = eager(model, *(torch.from_numpy(x) for x in pair))
        made = write(model, (480, 640))
        feeds = dict(zip(INPUTS, pair, strict=True))
        assert psnr(run(made, feeds), wanted) >= 100
        for precision, least in (("fp16", 70), ("bf16", 55)):
            half = typed(made, precision)
            assert psnr(run(emulated(half), feeds), wanted) >= least
        assert psnr(run(typed(made, "fp16"), feeds), wanted) >= 70  # its own kernels


def executed(model, pair, frame):
    """The program's executor on padded pictures of which a frame covers a part."""
    from fuseengine.engine import build_executor

    program = capture(model)
    stages = ModelStages(model, program)
    choice = dict.fromkeys(program.variants(), ("onnxruntime", "fp32"))
    executor = build_executor(program, stages, choice, pair.shape[3:], "cpu", 1).of_frame(frame)
    for target, given in zip(executor.inputs, pair, strict=True):
        target[...] = given
    executor.run()
    return executor.output


class TestStructure:
    def test_weights_are_stored_once(self):
        """Three calls of the U-Net, two variants of it: one set of weights."""
        model = tiny()
        made = write(model, (16, 24))
        weights = sum(p.numel() for p in model.unet.parameters())
        stored = sum(int(np.prod(i.dims)) for i in made.graph.initializer)
        assert stored < 1.2 * weights
        arrays = [numpy_helper.to_array(i) for i in made.graph.initializer]
        content = [(a.dtype, a.shape, a.tobytes()) for a in arrays if a.size > 64]
        assert len(content) == len(set(content))
        assert any(i.name == "unet.stem.weight" for i in made.graph.initializer)

    def test_nodes_are_named_after_the_program(self):
        made = write(tiny(), (16, 24))
        scopes = {node.name.partition("/")[0] for node in made.graph.node}
        assert {"unet_4", "joint_ddim_step_5", "unet_6"} <= scopes

    def test_the_sampler_stays_float32(self):
        made = write(tiny(), (16, 24), precision="fp16")
        assert is_checked(made)
        known = infer(made)
        steps = [n for n in made.graph.node if n.name.startswith("joint_ddim_step")]
        found = {known[n.output[0]].type for n in steps if n.op_type != "Cast"}
        assert found == {TensorProto.FLOAT}
        assert count_types(made).half > 100

    def test_bf16_raises_the_opset(self):
        assert is_checked(write(tiny(), (16, 24), precision="bf16"), opset=22)

    def test_keep_a_call_in_float32(self):
        half, kept = (
            write(tiny(), (16, 24), precision="fp16", keep=k) for k in ((), ("unet_4/*",))
        )
        assert 0 < count_types(kept).half < count_types(half).half

    def test_noise_as_an_input(self):
        model = small("drmf-s")
        size, wanted, feeds = planes(model, (2, 2))
        made = write(model, size, noise="input")
        noise = noise_for(made, size)
        assert noise
        assert psnr(run(made, {**feeds, **noise}), wanted) >= 80
        other = {name: array[..., ::-1].copy() for name, array in noise.items()}
        assert psnr(run(made, {**feeds, **other}), wanted) < 60

    @pytest.mark.parametrize(
        ("size", "options", "message"),
        [
            ((17, 24), {}, "takes multiples of 4; pad pictures to 20x24, or let the model do it"),
            ((0, 8), {}, "at least 2x2"),
            (None, {"noise": "none"}, "noise='none'; expected one of constant, input"),
            (None, {"attention_limit": 1}, "only a known size tells"),
        ],
    )
    def test_settings_that_do_not_fit(self, size, options, message):
        with pytest.raises(SettingError, match=message):
            write(tiny(), size, **options)

    def test_constant_noise_needs_a_size(self):
        with pytest.raises(SettingError, match="needs a known size"):
            write(small("drmf-s"), noise="constant")

    def test_control_flow_cannot_be_inlined(self):
        class Source:
            def onnx(self, variant, precision="fp32"):
                given = [
                    helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, None)
                    for i in range(2)
                ]
                made = helper.make_tensor_value_info("out0", TensorProto.FLOAT, None)
                inner = helper.make_graph(
                    [helper.make_node("Identity", ["in0"], ["out0"])], "inner", [], [made]
                )
                node = helper.make_node(
                    "If", ["in1"], ["out0"], then_branch=inner, else_branch=inner
                )
                graph = helper.make_graph([node], "net", given, [made])
                opset = [helper.make_opsetid("", 18)]
                return helper.make_model(graph, opset_imports=opset).SerializeToString()

        class Mean(torch.nn.Module):
            def forward(self, a, b):
                return (a + b) / 2

        program = capture(Mean())
        with pytest.raises(CompileError, match="control flow, which cannot be inlined"):
            whole_to_onnx(program, Source())


class TestAttention:
    def network(self, size):
        """Self-attention over a picture of known size."""
        from fuseengine.export.onnx import stage_to_onnx
        from fuseengine.models.layers import SelfAttention

        module = torch.nn.Sequential(randomise(SelfAttention(8, groups=2)))
        shape = (1, 8, "H", "W")
        with torch.no_grad():
            model = stage_to_onnx(module, [("in0", shape)], [("out0", shape)], fallback=False)
        return fixed(model, {"in0": (1, 8, *size)})

    @pytest.mark.parametrize(("at_once", "parts"), [(35, 1), (34, 2), (10, 4), (4, 9), (1, 35)])
    def test_parts_are_the_whole(self, at_once, parts):
        """Numbers of queries that do not divide."""
        model = self.network((5, 7))
        limit = at_once * 4 * 35 if at_once > 1 else 1
        split = split_attention(model, limit)
        onnx.checker.check_model(split, full_check=True)
        maps = [n for n in split.graph.node if n.op_type == "Softmax"]
        assert len(maps) == parts
        largest = max(np.prod(infer(split)[n.output[0]].shape) for n in maps)
        assert largest == at_once * 35
        x = np.random.default_rng(0).normal(size=(1, 8, 5, 7)).astype(np.float32)
        np.testing.assert_allclose(run(split, {"in0": x}), run(model, {"in0": x}), atol=1e-6)

    def test_open_sizes_stay_as_they_are(self):
        model = system("drmf")
        stages = ModelStages(model, capture(model))
        for variant in stages.program.variants():
            network = onnx.load_from_string(stages.onnx(variant))
            assert split_attention(network, 1) == network

    def test_whole(self):
        model = small("mask-difuser")
        size, wanted, feeds = planes(model, (2, 2))
        made = write(model, size, attention_limit=500, precision="fp32")
        assert is_checked(made)
        plain = write(model, size)
        count = {
            m: sum(n.op_type == "Softmax" for n in g.graph.node)
            for m, g in (("split", made), ("plain", plain))
        }
        assert count["split"] > 1.5 * count["plain"]
        assert psnr(run(made, feeds), wanted) >= 80

    def test_limit(self):
        with pytest.raises(SettingError, match="expected 1 or more"):
            split_attention(self.network((2, 2)), 0)


class TestFixed:
    def test_shapes_that_do_not_fit(self):
        network = TestAttention().network((4, 4))
        with pytest.raises(SettingError, match=r"shape of in0: got \(1, 8, 5, 4\); expected"):
            fixed(network, {"in0": (1, 8, 5, 4)})
        with pytest.raises(SettingError, match="expected 4 numbers"):
            fixed(network, {"in0": (1, 8)})
        with pytest.raises(SettingError, match="got None"):
            fixed(network, {})


class TestFiles:
    @pytest.mark.parametrize("size", [(30, 41), None])
    def test_a_folder_of_networks(self, tmp_path, size):
        model = tiny()
        written = export_onnx(model, tmp_path / "out", size)
        program = capture(model)
        labels = {f"{variant.label}.onnx" for variant in program.variants()}
        assert {p.name for p in (tmp_path / "out").iterdir()} == {*labels, PROGRAM, CONSTANTS}
        constants = tensors.unpack((tmp_path / "out" / CONSTANTS).read_bytes())
        read = Program.from_json((tmp_path / "out" / PROGRAM).read_text(), constants)
        assert read.to_dict() == program.to_dict()
        assert written.psnr_db >= 80
        for file in written.files:
            onnx.checker.check_model(str(file.path), full_check=True)
        picture = "float32[1, 3, 32, 44]" if size else "float32[1, 3, H, W]"
        assert ("in0", picture) in written.files[0].inputs
        assert f"in   in0: {picture}" in str(written)

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_one_file(self, tmp_path, precision):
        written = export_onnx(
            tiny(), tmp_path / "m.onnx", (30, 41), whole=True, precision=precision
        )
        (file,) = written.files
        assert file.path.stat().st_size / 1e6 == pytest.approx(file.megabytes)
        assert file.opset == (22 if precision == "bf16" else 18)
        assert (file.types.half > 0) == (precision != "fp32")
        assert written.psnr_db >= {"fp32": 80, "fp16": 45, "bf16": 25}[precision]
        assert f"{written.psnr_db:.1f} dB" in str(written)

    def test_frames(self, tmp_path):
        written = export_onnx(tiny(), tmp_path / "m.onnx", (30, 41), whole=True, frames=True)
        (file,) = written.files
        assert file.inputs[1] == ("visible", "uint8[1, 30, 41, 3]")
        assert written.psnr_db >= 60

    def test_unchecked(self, tmp_path):
        written = export_onnx(tiny(), tmp_path / "m.onnx", (30, 41), whole=True, check=False)
        assert written.psnr_db is None
        assert str(written).endswith("not compared with the model")

    def test_a_name_kept_in_one_of_the_networks(self, tmp_path):
        model = tiny()
        both = export_onnx(model, tmp_path, (16, 24), precision="fp16", check=False)
        first, second = (
            {n.name for n in onnx.load(file.path).graph.node if n.op_type == "Conv"}
            for file in both.files
        )
        (name, *_) = sorted(first - second)
        kept = export_onnx(model, tmp_path, (16, 24), precision="fp16", keep=[name], check=False)
        assert [f.types.half for f in kept.files] <= [f.types.half for f in both.files]
        with pytest.raises(UnknownNameError, match="'nothing'"):
            export_onnx(model, tmp_path, precision="fp16", keep=["nothing", name], check=False)

    def test_places_that_cannot_be_written(self, tmp_path):
        with pytest.raises(SettingError, match="make its folder first"):
            export_onnx(tiny(), tmp_path / "no" / "m.onnx", (16, 24), whole=True, check=False)
        with pytest.raises(SettingError, match="give a file's name"):
            export_onnx(tiny(), tmp_path, (16, 24), whole=True, check=False)
        file = tmp_path / "file"
        file.write_text("")
        with pytest.raises(SettingError, match="expected a folder to write into"):
            export_onnx(tiny(), file, (16, 24), check=False)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_settings_of_whole_models_only(self, tmp_path):
        with pytest.raises(SettingError, match="expected whole=True"):
            export_onnx(tiny(), tmp_path, frames=True)

    def test_metadata_names_the_sampler(self):
        made = write(tiny(), (16, 24))
        (entry,) = made.metadata_props
        assert "joint_ddim_step_5/*" in json.loads(entry.value)
