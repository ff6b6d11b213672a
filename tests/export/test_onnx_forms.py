"""The ops' ONNX forms in ONNX Runtime against the references in float64."""

from __future__ import annotations

import inspect

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from fuseengine import _native, kernels
from fuseengine.errors import SettingError
from fuseengine.export.onnx import OnnxWriter
from fuseengine.kernels import onnx_forms
from tests.kernels import test_criss_cross, test_group_norm, test_triton_steps
from tests.kernels.tolerance import within

# The operators that forms may use, with what TensorRT's parser restricts. Source: the repository
# github.com/onnx/onnx-tensorrt, docs/operators.md (all of them are in its table since release 8.5,
# GridSample and uint8 as the last) and docs/Changelog.md up to 10.6 (none was taken away; Pad's
# axes came with 10.4). There is no DFT; CastLike is not in the table.
TENSORRT_10_3 = {
    "Add": "",
    "AveragePool": "2D or 3D only",
    "Cast": "uint8 only at the inputs and outputs of a network, from and to float",
    "Concat": "",
    "Conv": "",
    "Div": "",
    "Equal": "",
    "Expand": "",
    "Floor": "",
    "Gather": "",
    "Greater": "",
    "GridSample": "linear, nearest, cubic",
    "Identity": "",
    "MatMul": "",
    "Min": "",
    "Mul": "",
    "Pad": "no axes, no uint8",
    "Range": "",
    "Reshape": "",
    "Reciprocal": "",
    "ReduceMean": "",
    "Relu": "",
    "Resize": "nearest with floor and asymmetric is one of its modes",
    "Shape": "",
    "Sigmoid": "",
    "Slice": "",
    "Softmax": "",
    "Sqrt": "",
    "Squeeze": "",
    "Sub": "",
    "Transpose": "",
    "Unsqueeze": "",
    "Where": "",
}
SCALES = test_triton_steps.SCALES
ELEMENTS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.uint16): TensorProto.UINT16,
}


def build(function, arrays, *arguments, result="float32", rank=None, fixed=(), **options):
    """A checked model of one form: ``function(writer, *names of the arrays, *arguments)``.

    Every size is open, but for the dimensions of the arrays in ``fixed``. ``result`` is the dtype,
    ``rank`` the rank of the result, that of the first array by default.
    """
    writer = OnnxWriter()
    out = function(writer, *arrays, *arguments, **options)
    if writer.nodes and writer.nodes[-1].output[0] == out:
        writer.nodes[-1].output[0] = "out"  # TensorRT takes nothing after a cast to uint8
    else:
        writer.add("Identity", out, name="out")
    inputs = [
        helper.make_tensor_value_info(
            name,
            ELEMENTS[array.dtype],
            [n if axis in fixed else f"{name}{axis}" for axis, n in enumerate(array.shape)],
        )
        for name, array in arrays.items()
    ]
    rank = next(iter(arrays.values())).ndim if rank is None else rank
    sizes = [f"out{axis}" for axis in range(rank)]
    value = helper.make_tensor_value_info("out", ELEMENTS[np.dtype(result)], sizes)
    model = writer.model(inputs, [value], "form")
    onnx.checker.check_model(model, full_check=True)
    used = {node.op_type for node in model.graph.node}
    assert used <= set(TENSORRT_10_3), f"not imported by TensorRT 10.3: {used - {*TENSORRT_10_3}}"
    return model


def run(function, arrays, *arguments, **options):
    """The form's result in ONNX Runtime, as a tensor."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    model = build(function, arrays, *arguments, **options).SerializeToString()
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, arrays)[0])


def named(names, tensors):
    return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def test_every_op_has_a_form():
    ops = {name for name in kernels.__all__ if not name.endswith(("_reference", "_spectrum"))}
    forms = {name for name, _ in inspect.getmembers(onnx_forms, inspect.isfunction)}
    assert ops <= forms, f"without an ONNX form: {ops - forms}"


class TestNetworks:
    @pytest.mark.parametrize("shape", [*test_criss_cross.SHAPES, (1, 4, 3, 37, 19)])
    @pytest.mark.parametrize("known", [False, True])
    def test_criss_cross_attention(self, shape, known):
        tensors = test_criss_cross.drawn(shape, torch.float32)
        size, fixed = (shape[3:], (2, 3)) if known else (None, ())
        found = run(onnx_forms.criss_cross_attention, named("qkv", tensors), size, fixed=fixed)
        exact = kernels.criss_cross_attention_reference(*(t.double() for t in tensors))
        within(found, exact, kernels.criss_cross_attention_reference(*tensors))

    def test_a_known_size_leaves_no_shape_arithmetic(self):
        arrays = named("qkv", test_criss_cross.drawn((1, 4, 3, 6, 5), torch.float32))
        model = build(onnx_forms.criss_cross_attention, arrays, (6, 5), fixed=(2, 3))
        assert not {"Shape", "Range", "Equal", "Gather"} & {n.op_type for n in model.graph.node}

    def test_large_scores(self):
        q, k, v = test_criss_cross.drawn((1, 4, 3, 6, 5), torch.float32)
        q, k = 200 * q, 200 * k
        found = run(onnx_forms.criss_cross_attention, named("qkv", (q, k, v)))
        exact = kernels.criss_cross_attention_reference(q.double(), k.double(), v.double())
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-2)

    @pytest.mark.parametrize(("shape", "groups"), test_group_norm.SHAPES)
    @pytest.mark.parametrize("silu", [False, True])
    @pytest.mark.parametrize("shifted", [False, True])
    def test_group_norm_silu(self, shape, groups, silu, shifted):
        x, weight, bias, shift = test_group_norm.drawn(shape, torch.float32)
        options = {"groups": groups, "eps": 1e-5, "silu": silu}
        arrays = named(["x", "shift"] if shifted else ["x"], [x, shift][: 1 + shifted])

        def form(w, x, shift=""):
            given = weight.numpy(), bias.numpy(), shift
            return onnx_forms.group_norm_silu(w, x, *given, **options)

        found = run(form, arrays, fixed=(1,))
        tensors = x, weight, bias, shift if shifted else None
        exact = test_group_norm.exactly(tensors, **options)
        within(found, exact, test_group_norm.plain(*tensors, **options), floor=8)

    @pytest.mark.parametrize("size", [(33, 47), (240, 320)])
    def test_raw_thermal_counts(self, size):
        x, *rest = test_group_norm.drawn((1, 8, *size), torch.float32, mean=30000, deviation=20)

        def form(w, x):
            given = (t.numpy() for t in rest[:2])
            return onnx_forms.group_norm_silu(w, x, *given, groups=2)

        found = run(form, named("x", [x]), fixed=(1,))
        exact = test_group_norm.exactly((x, *rest[:2]), groups=2)
        # The mean in two numbers: no worse than for a mean of 0.
        assert (found - exact).abs().max() < 1e-5

    @pytest.mark.parametrize("value", [0.0, 0.3, 30000.3, 1e6 / 3])
    def test_a_constant_picture(self, value):
        """What rounding leaves of the variance may not be negative; the result is the bias."""
        x, weight, bias = test_group_norm.drawn((1, 8, 40, 50), torch.float32)[:3]
        given = weight.numpy(), bias.numpy()

        def form(w, x):
            return onnx_forms.group_norm_silu(w, x, *given, groups=2, silu=False)

        found = run(form, named("x", [torch.full_like(x, value)]), fixed=(1,))
        wanted = bias.reshape(1, -1, 1, 1).expand_as(found)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


class TestSteps:
    @pytest.mark.parametrize("shape", [*test_triton_steps.SHAPES, (5,)])
    @pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
    def test_ddim_step(self, shape, eta):
        x, eps, noise = test_triton_steps.drawn(shape, torch.float32)[:3]
        tensors = (x, eps) if eta is None else (x, eps, noise)

        def form(w, x, eps, noise=""):
            given = (noise, 0.0 if eta is None else eta)
            return onnx_forms.ddim_step(w, x, eps, *SCALES, *given)

        def reference(x, eps, noise=None):
            return kernels.ddim_step_reference(x, eps, *SCALES, noise, eta or 0.0)

        found = run(form, named(["x", "eps", "noise"][: len(tensors)], tensors))
        within(found, reference(*(t.double() for t in tensors)), reference(*tensors))

    @pytest.mark.parametrize("form", ["code", "paper"])
    @pytest.mark.parametrize("shape", test_triton_steps.SHAPES)
    def test_joint_ddim_step(self, shape, form):
        x, eps, _, *planes = test_triton_steps.drawn(shape, torch.float32)
        tensors, numbers = (x, eps, *planes), (*SCALES, 0.3)
        arrays = named(["x", "eps", "mask", "y1", "y2"], tensors)
        found = run(onnx_forms.joint_ddim_step, arrays, *numbers, form=form, fixed=(1,))
        exact, plain = (
            kernels.joint_ddim_step_reference(*given, *numbers, form=form)
            for given in ([t.double() for t in tensors], tensors)
        )
        within(found, exact, plain)

    @pytest.mark.parametrize("form", ["code", "paper"])
    @pytest.mark.parametrize("shape", [*test_triton_steps.SHAPES, (2, 1, 5, 3)])
    def test_compose_priors(self, shape, form):
        tensors = test_triton_steps.drawn(shape, torch.float32, planes=1)
        arrays = named(["x", "eps_a", "eps_b", "weight"], tensors)
        found = run(onnx_forms.compose_priors, arrays, *SCALES, form=form)
        exact, plain = (
            kernels.compose_priors_reference(*given, *SCALES, form=form)
            for given in ([t.double() for t in tensors], tensors)
        )
        within(found, exact, plain)

    def test_predicted_x0(self):
        x, eps = test_triton_steps.drawn((2, 3, 5, 7), torch.float32)[:2]
        found = run(onnx_forms.predicted_x0, named(["x", "eps"], (x, eps)), *SCALES[:2])
        exact, plain = ((a - 0.8 * b) / 0.6 for a, b in ((x.double(), eps.double()), (x, eps)))
        within(found, exact, plain)


SIZES = [(1, 1), (1, 8), (7, 1), (2, 2), (5, 6), (6, 5), (16, 9), (33, 40)]


def pictures(size, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((2, 3, *size)).astype(np.float32))


class TestFilters:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("kind", ["complex", "real"])
    def test_wiener_filter(self, size, kind):
        """Random half spectra: not the transform of any kernel in the first and last column."""
        rng = np.random.default_rng(1)
        spectrum = rng.standard_normal((2, size[0], size[1] // 2 + 1))
        spectrum = spectrum[0] + 1j * spectrum[1] if kind == "complex" else spectrum[0]
        x = pictures(size)
        found = run(onnx_forms.wiener_filter, named("x", [x]), spectrum, size, fixed=(2, 3))
        exact = kernels.wiener_filter(x.double(), torch.from_numpy(spectrum))
        gain = float(np.abs(spectrum).max()) * float(x.abs().max())
        assert (found - exact).abs().max() <= 1e-6 * gain

    @pytest.mark.parametrize("size", SIZES)
    def test_kernels(self, size):
        kernel, x = np.random.default_rng(2).standard_normal((3, 5)), pictures(size)
        given, options = named("x", [x]), {"fixed": (2, 3)}
        wide, k = x.double(), torch.from_numpy(kernel)
        found = run(onnx_forms.circular_convolution, given, kernel, size, **options)
        exact = kernels.circular_convolution(wide, k)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=3e-5)
        found = run(onnx_forms.wiener_deconvolution, given, kernel, 0.1, size, **options)
        exact = kernels.wiener_deconvolution(wide, k, 0.1)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("rank", [2, 3])
    def test_any_rank(self, rank):
        x = pictures((6, 9))[(0,) * (4 - rank)]
        flat = np.ones((6, 5))
        found = run(onnx_forms.wiener_filter, named("x", [x]), flat, (6, 9), fixed=range(rank))
        torch.testing.assert_close(found, x, rtol=0, atol=2e-6)

    def test_white_16_bit_frame(self):
        """The sum of all pixels, 1e9, is in the spectrum; half precision ends at 65,504."""
        x = torch.full((1, 1, 120, 160), 65535.0)
        x[0, 0, 10, 20] = 0
        flat = np.ones((120, 81))
        found = run(onnx_forms.wiener_filter, named("x", [x]), flat, (120, 160), fixed=(2, 3))
        torch.testing.assert_close(found, x, rtol=0, atol=65535 * 2e-6)

    @pytest.mark.parametrize("shape", [(6, 6), (5, 5), (1, 6, 5)])
    def test_a_spectrum_of_another_size(self, shape):
        with pytest.raises(SettingError, match=r"expected \(6, 5\) for pictures of 6x9"):
            onnx_forms.wiener_filter(OnnxWriter(), "x", np.ones(shape), (6, 9))

    @pytest.mark.parametrize("scale", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2)])
    def test_blocks(self, size, scale):
        x = pictures((size[0] * scale, size[1] * scale))
        found = run(onnx_forms.block_mean, named("x", [x]), scale)
        within(found, kernels.block_mean(x.double(), scale), kernels.block_mean(x, scale))
        y = pictures(size)
        found = run(onnx_forms.block_repeat, named("y", [y]), scale)
        assert torch.equal(found, kernels.block_repeat(y, scale))


FRAME_SIZES = [(1, 1), (1, 7), (5, 1), (3, 4), (17, 33)]


def frame(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.random(shape, np.float32)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


class TestFrames:
    @pytest.mark.parametrize("size", FRAME_SIZES)
    def test_colours(self, size):
        rgb = torch.from_numpy(frame((2, 3, *size), "float32"))
        found = run(onnx_forms.rgb_to_ycbcr, named("x", [rgb]), fixed=(1,))
        exact = kernels.rgb_to_ycbcr_reference(rgb.double())
        within(found, exact, kernels.rgb_to_ycbcr_reference(rgb))
        back = run(onnx_forms.ycbcr_to_rgb, named("x", [found]), fixed=(1,))
        torch.testing.assert_close(back, rgb, rtol=0, atol=2e-6)
        exact = kernels.ycbcr_to_rgb_reference(found.double())
        within(back, exact, kernels.ycbcr_to_rgb_reference(found))

    @pytest.mark.parametrize("size", FRAME_SIZES)
    @pytest.mark.parametrize("more", [(0, 0), (1, 0), (0, 2), (13, 40)])
    def test_padding(self, size, more):
        x = pictures(size)
        padded = (size[0] + more[0], size[1] + more[1])
        found = run(onnx_forms.pad_reflect, named("x", [x]), size, padded, fixed=(2, 3))
        assert torch.equal(found, kernels.pad_reflect_reference(x, *padded))
        back = run(onnx_forms.crop, named("x", [found]), *size)
        assert torch.equal(back, x)

    def test_padding_cannot_crop(self):
        with pytest.raises(SettingError, match="padded 4x5 for 5x5; expected no less"):
            onnx_forms.pad_reflect(OnnxWriter(), "x", (5, 5), (4, 5))

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    @pytest.mark.parametrize("channels", ["luma", "rgb", "ycbcr"])
    @pytest.mark.parametrize("colour", [False, True])
    @pytest.mark.parametrize("size", FRAME_SIZES[-3:])
    def test_in(self, size, colour, channels, dtype):
        array = frame((2, *size, 3) if colour else (2, *size), dtype)
        top = 1.0 if dtype == "float32" else float(np.iinfo(dtype).max)
        for low, scale in ((0.0, 1.0 / top), (0.3 * top, 1.7 / top)):
            options = {"colour": colour, "low": low, "scale": scale, "rank": 4}
            found = run(onnx_forms.frame_in, {"frame": array}, channels, fixed=(3,), **options)
            given = torch.from_numpy(array), channels, *size, low, scale
            exact = kernels.frame_in_reference(*given, torch.float64)
            assert found.shape == exact.shape
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    @pytest.mark.parametrize("planes", [1, 3])
    @pytest.mark.parametrize("colour", [False, True])
    @pytest.mark.parametrize("size", FRAME_SIZES[-3:])
    def test_out(self, size, colour, planes, dtype):
        fused = 1.4 * frame((2, planes, *size), "float32") - 0.2
        visible = frame((2, *size, 3) if colour else (2, *size), dtype, seed=1)
        arrays = {"fused": fused, **({"visible": visible} if colour and planes == 1 else {})}
        options = {"planes": planes, "colour": colour, "dtype": dtype, "fixed": (1, 3)}
        found = run(onnx_forms.frame_out, arrays, result=dtype, rank=4 if colour else 3, **options)
        tensors = torch.from_numpy(fused).double(), torch.from_numpy(visible)
        kind = getattr(torch, dtype)
        exact = kernels.frame_out_reference(*tensors, *size, kind)
        assert found.dtype == kind and found.shape == exact.shape
        if dtype == "float32":
            torch.testing.assert_close(found, exact, rtol=0, atol=3e-7)
        else:
            assert (found.int() - exact.int()).abs().max() <= 1
            assert (found == exact).float().mean() > 0.95  # ties of float32, not of the form

    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_every_value_survives(self, dtype):
        values = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(1, 16, -1)
        scale = 1.0 / np.iinfo(dtype).max
        planes = run(onnx_forms.frame_in, {"x": values}, colour=False, scale=scale, rank=4)
        options = {"planes": 1, "colour": False, "dtype": dtype, "result": dtype, "rank": 3}
        back = run(onnx_forms.frame_out, {"x": planes.numpy()}, fixed=(1,), **options)
        np.testing.assert_array_equal(back.numpy(), values)

    def test_rounding_and_what_is_no_number(self):
        """As the native kernel: ties up, NaN is 0, infinities are clipped."""
        fused = np.array([0.5, 1.5, 2.5, 254.5, -0.5, np.nan, np.inf, -np.inf], np.float32) / 255
        fused = np.stack([fused, np.nextafter(fused, np.float32(0))])[:, None, None]
        options = {"planes": 1, "colour": False, "result": "uint8", "rank": 3, "fixed": (1,)}
        found = run(onnx_forms.frame_out, {"x": fused}, **options).numpy()
        expected = np.empty(found.shape, np.uint8)
        for picture, out in zip(fused, expected, strict=True):
            _native.frame_out(picture, None, out)
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("last", ["frame_in", "frame_out"])
    def test_uint8_is_at_the_border_of_the_network(self, last):
        """TensorRT casts uint8 only there: the first node reads it, the last one makes it."""
        if last == "frame_in":
            array = frame((1, 4, 5, 3), "uint8")
            model = build(onnx_forms.frame_in, {"x": array}, colour=True, fixed=(3,))
            readers = [node for node in model.graph.node if "x" in node.input]
            assert [node.op_type for node in readers] == ["Cast"]
        else:
            arrays = {"x": frame((1, 1, 4, 5), "float32"), "visible": frame((1, 4, 5, 3), "uint8")}
            options = {"planes": 1, "colour": True, "result": "uint8", "fixed": (1, 3)}
            model = build(onnx_forms.frame_out, arrays, **options)
            assert model.graph.node[-1].op_type == "Cast"


MATRIX = np.array([[1.1, 0.1, -2.3], [-0.05, 0.9, 1.2], [1e-3, -2e-3, 1.0]])


class TestWarp:
    @pytest.mark.parametrize("source", [(1, 1), (1, 6), (5, 1), (9, 7)])
    @pytest.mark.parametrize("size", [(1, 1), (6, 11)])
    @pytest.mark.parametrize("border", ["zero", "clamp"])
    @pytest.mark.parametrize("known", [False, True])
    @pytest.mark.parametrize("kind", ["homography", "map"])
    def test_values(self, source, size, border, known, kind):
        x = pictures(source)[:, :2]
        if kind == "homography":
            coordinates = np.stack([MATRIX, np.linalg.inv(MATRIX)])
        else:
            rng = np.random.default_rng(3)
            coordinates = rng.uniform(-2, 1.5 * max(source) + 2, (2, *size, 2))
        coordinates = coordinates.astype(np.float32)
        options = {"homography": kind == "homography", "border": border}
        if known:
            found = run(onnx_forms.warp, named("x", [x]), coordinates, source, size, **options)
        else:
            arrays = {**named("x", [x]), "c": coordinates}
            found = run(onnx_forms.warp, arrays, source, size, **options)
        given = torch.from_numpy(coordinates).double()
        exact = kernels.warp_reference(x.double(), given, *size, border)
        assert found.shape == exact.shape
        # Places are float32, and GridSample's are fractions of the picture.
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("known", [False, True])
    def test_one_homography_for_all_pictures(self, known):
        x = pictures((6, 9))
        one = MATRIX[None].astype(np.float32)
        options = {"homography": True, "batch": 2}
        arrays = named("x", [x]) if known else {**named("x", [x]), "c": one}
        given = ([one] if known else []) + [(6, 9), (4, 5)]
        found = run(onnx_forms.warp, arrays, *given, **options)
        exact = kernels.warp_reference(x.double(), torch.from_numpy(one).double(), 4, 5, "zero")
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("border", ["zero", "clamp"])
    @pytest.mark.parametrize("known", [False, True])
    def test_no_number_and_infinity(self, border, known):
        x = pictures((4, 5))[:1]
        places = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 1.5], np.float32)
        place = np.stack(np.meshgrid(places, places), -1)[None]
        options = {"homography": False, "border": border}
        arrays = named("x", [x]) if known else {**named("x", [x]), "c": place}
        given = ([place] if known else []) + [(4, 5), (6, 6)]
        found = run(onnx_forms.warp, arrays, *given, **options)
        exact = kernels.warp_reference(x.double(), torch.from_numpy(place).double(), 6, 6, border)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


def every_form():
    """One model of each form, by name."""
    f32 = frame((1, 3, 6, 10), "float32")
    one, places = f32[:, :1], frame((1, 4, 5, 2), "float32")
    u8, colour = frame((1, 6, 10), "uint8"), frame((1, 6, 10, 3), "uint8")
    qkv = dict.fromkeys("qkv", f32)
    steps = {"x": f32, "eps": f32}
    planes = dict.fromkeys(("mask", "y1", "y2"), one)
    numbers = (*SCALES, 0.3)
    priors = {"x": f32, "eps_a": f32, "eps_b": f32, "weight": one}
    ones = np.ones(3, np.float32)
    kernel = np.ones((3, 3)) / 9
    norm = (ones, ones)
    known = {"fixed": (1, 2, 3)}
    return {
        "attention": (onnx_forms.criss_cross_attention, qkv, (), {}),
        "attention, known size": (onnx_forms.criss_cross_attention, qkv, ((6, 10),), known),
        "norm": (onnx_forms.group_norm_silu, {"x": f32}, norm, {"groups": 3, "fixed": (1,)}),
        "ddim": (onnx_forms.ddim_step, steps, SCALES, {}),
        "joint": (onnx_forms.joint_ddim_step, {**steps, **planes}, numbers, {"fixed": (1,)}),
        "priors": (onnx_forms.compose_priors, priors, SCALES, {"form": "paper"}),
        "filter": (onnx_forms.circular_convolution, {"x": f32}, (kernel, (6, 10)), known),
        "inverse": (onnx_forms.wiener_deconvolution, {"x": f32}, (kernel, 0.1, (6, 10)), known),
        "mean": (onnx_forms.block_mean, {"x": f32}, (2,), known),
        "repeat": (onnx_forms.block_repeat, {"x": f32}, (2,), {}),
        "to ycbcr": (onnx_forms.rgb_to_ycbcr, {"x": f32}, (), {"fixed": (1,)}),
        "to rgb": (onnx_forms.ycbcr_to_rgb, {"x": f32}, (), {"fixed": (1,)}),
        "pad": (onnx_forms.pad_reflect, {"x": f32}, ((6, 10), (16, 32)), known),
        "crop": (onnx_forms.crop, {"x": f32}, (4, 5), {}),
        "in, gray": (onnx_forms.frame_in, {"x": u8}, ("ycbcr",), {"colour": False, "rank": 4}),
        "in": (onnx_forms.frame_in, {"x": colour}, (), {"colour": True, "fixed": (3,)}),
        "out, gray": (
            onnx_forms.frame_out, {"x": one}, (),
            {"planes": 1, "colour": False, "result": "uint8", "rank": 3, "fixed": (1,)},
        ),
        "out": (
            onnx_forms.frame_out, {"x": one, "v": colour}, (),
            {"planes": 1, "colour": True, "result": "uint8", "fixed": (1, 3)},
        ),
        "warp, known": (
            onnx_forms.warp, {"x": f32}, (MATRIX, (6, 10), (4, 5)), {"homography": True},
        ),
        "warp": (
            onnx_forms.warp, {"x": f32, "c": MATRIX[None].astype(np.float32)},
            ((6, 10), (4, 5)), {"homography": True, **known},
        ),
        "warp by map": (
            onnx_forms.warp, {"x": f32, "c": places}, ((6, 10), (4, 5)),
            {"homography": False, **known},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", every_form())
def test_tensorrt_builds_it(name):
    """TensorRT-RTX does so without a GPU, under strong typing as every release from 11 on."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx, on x86-64")
    function, arrays, arguments, options = every_form()[name]
    model = build(function, arrays, *arguments, **options)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    read = parser.parse(model.SerializeToString())
    assert read, "; ".join(str(parser.get_error(k)) for k in range(parser.num_errors))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    for array_name, array in arrays.items():
        profile.set_shape(array_name, array.shape, array.shape, array.shape)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
