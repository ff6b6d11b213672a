"""What holds for every op, whatever the shape, dtype, layout and numbers.

PyTorch's op, the native kernel and the interpreted Triton kernel against the float64 reference.
Memory that nobody has written is NaN, beside inputs and in outputs, so that an element which is
not written, or read from elsewhere, shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseengine import _native, kernels
from fuseengine.kernels.compose_priors import coefficients as composition
from fuseengine.kernels.ddim_step import _coefficients as ddim_coefficients
from fuseengine.kernels.ddim_step import _direction, ddim_sigma
from fuseengine.kernels.wiener import wiener_filter_reference
from tests.kernels import test_group_norm
from tests.kernels.tolerance import within

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "turned", "cropped", "strided", "channels_last"]
SIDE = st.integers(1, 9)
BATCH = st.integers(1, 2)
NAN = float("nan")

Shapes = list[tuple[int, ...]]
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One op in all its forms.

    Attributes:
        name: for the test's name.
        examples: strategy of the inputs' shapes and the op's settings.
        reference: (*tensors, **settings) -> result, in the tensors' dtype.
        op: the same by ``torch.ops.fuse``.
        native: (*arrays, out, **settings).
        triton: "module:function" that launches the kernel.
        launched: (tensors, settings) -> arguments and options of that function.
        plain: what PyTorch would be asked for instead of the reference.
        floor: see :func:`tests.kernels.tolerance.within`.
        cancels: whether a kernel leaves out terms that cancel, and their NaN with them.
        finite: inputs, by index, that have to be finite.
    """

    name: str
    examples: st.SearchStrategy[tuple[Shapes, Settings]]
    reference: Callable[..., torch.Tensor]
    op: Callable[..., torch.Tensor]
    native: Callable[..., None]
    triton: str
    launched: Callable[[list[torch.Tensor], Settings], tuple[list[Any], dict[str, Any]]]
    plain: Callable[..., torch.Tensor] | None = None
    floor: float = 8.0
    cancels: bool = False
    finite: tuple[int, ...] = ()

    def check(self, found, tensors, options, *, slack=1.0):
        """Within the tolerance of ``found``'s dtype, its floor ``slack`` times as high."""
        assert found.dtype == tensors[0].dtype
        exact = self.reference(*(t.double() for t in tensors), **options)
        plain = (self.plain or self.reference)(*tensors, **options)
        # In float64 the reference is its own judge: all that is left is the order of the sums.
        floor = 32.0 if found.dtype == torch.float64 else slack * self.floor
        within(found, exact, plain, floor=floor)

    def check_nan(self, found, tensors, options):
        """NaN where the equation has it."""
        bad = found.isnan()
        expected = self.reference(*(t.double() for t in tensors), **options).isnan()
        if self.cancels:
            assert bad.any() == expected.any() and not (bad & ~expected).any()
        else:
            assert torch.equal(bad, expected)


# --- the subjects ---------------------------------------------------------------------------------


@st.composite
def attention_examples(draw):
    n, queries, channels, h, w = draw(st.tuples(BATCH, SIDE, SIDE, SIDE, SIDE))
    return [(n, c, h, w) for c in (queries, queries, channels)], {}


@st.composite
def norm_examples(draw):
    n, groups, each, h, w = draw(st.tuples(BATCH, st.integers(1, 4), st.integers(1, 4), SIDE, SIDE))
    channels = groups * each
    options = {"groups": groups, "eps": 1e-2, "silu": draw(st.booleans())}
    shift = draw(st.sampled_from([[], [(n, channels)], [(1, channels)]]))
    return [(n, channels, h, w), (channels,), (channels,), *shift], options


@st.composite
def step_examples(draw, planes, *, wide=False, **choices):
    """x, eps (and more of x's shape), planes; the numbers of a step."""
    n, h, w = draw(st.tuples(BATCH, SIDE, SIDE))
    channels = draw(st.integers(1, 4)) if wide else 3
    shapes = [(n, channels, h, w)] * planes[0] + [(n, 1, h, w)] * planes[1]
    signal, signal_prev = (draw(st.floats(0.1, 0.99)) for _ in range(2))
    numbers = [x for s in (signal, signal_prev) for x in (s, (1 - s * s) ** 0.5)]
    options = {name: draw(strategy) for name, strategy in choices.items()}
    return shapes, {"numbers": tuple(numbers), **options}


def named(numbers):
    a, b, c, _ = numbers
    return {"sqrt_abar": a, "sqrt_one_minus_abar": b, "sqrt_abar_prev": c}


def sigma_of(numbers, eta, noise):
    return ddim_sigma(*numbers, eta) if noise else 0.0


def ddim_native(x, eps, *rest, numbers, eta):
    *noise, out = rest
    sigma = sigma_of(numbers, eta, noise)
    direction = _direction(numbers[3], sigma)
    noise = noise[0] if noise else None
    _native.ddim_step(x, eps, noise, out, **named(numbers), direction=direction, sigma=sigma)


def ddim_launched(tensors, options):
    numbers = options["numbers"]
    sigma = sigma_of(numbers, options["eta"], tensors[2:])
    coefficients = (*ddim_coefficients(*numbers, sigma), sigma)
    return [*tensors, *[None] * (3 - len(tensors)), coefficients], {}


def ddim_reference(x, eps, *noise, numbers, eta):
    return kernels.ddim_step_reference(x, eps, *numbers, *noise, eta=eta)


def ddim_op(x, eps, *noise, numbers, eta):
    return torch.ops.fuse.ddim_step(x, eps, *numbers, *noise, sigma=sigma_of(numbers, eta, noise))


def norm_native(x, weight, bias, *rest, **options):
    *shift, out = rest
    _native.group_norm_silu(x, weight, bias, shift[0] if shift else None, out, **options)


def norm_op(x, weight, bias, shift=None, *, groups, eps, silu):
    return torch.ops.fuse.group_norm_silu(x, weight, bias, shift, groups, eps, silu)


def norm_plain(x, weight, bias, shift=None, **options):
    return test_group_norm.plain(x, weight, bias, shift, **options)


def joint_reference(*tensors, numbers, lam, form):
    return kernels.joint_ddim_step_reference(*tensors, *numbers, lam, form=form)


def joint_op(*tensors, numbers, lam, form):
    return torch.ops.fuse.joint_ddim_step(*tensors, *numbers, lam, form)


def joint_native(*arrays, numbers, lam, form):
    rest = {"sqrt_one_minus_abar_prev": numbers[3], "lam": lam, "form": int(form == "paper")}
    _native.joint_ddim_step(*arrays, **named(numbers), **rest)


def joint_launched(tensors, options):
    return [*tensors, (*options["numbers"], options["lam"]), options["form"]], {}


def compose_reference(*tensors, numbers, form):
    return kernels.compose_priors_reference(*tensors, *numbers, form=form)


def compose_op(*tensors, numbers, form):
    return torch.ops.fuse.compose_priors(*tensors, *numbers, form)


def compose_native(*arrays, numbers, form):
    direction = numbers[3] if form == "paper" else 0.0
    _native.compose_priors(*arrays, **named(numbers), direction=direction)


def compose_launched(tensors, options):
    return [*tensors, composition(*options["numbers"], options["form"])], {}


@st.composite
def filter_examples(draw):
    n, c, h, w = draw(st.tuples(BATCH, st.integers(1, 2), st.integers(1, 20), st.integers(1, 20)))
    kind = draw(st.sampled_from(["real", "complex"]))
    return [(n, c, h, w), (2, h, w // 2 + 1)], {"kind": kind}


def spectrum_of(parts, kind):
    """Real and imaginary part, in float32 or float64."""
    parts = parts.to(torch.promote_types(parts.dtype, torch.float32))
    return torch.complex(*parts) if kind == "complex" else parts[0].contiguous()


def filter_reference(x, parts, *, kind):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # torch.fft has no half precision
    return wiener_filter_reference(wide, spectrum_of(parts, kind)).to(x.dtype)


def filter_native(x, parts, out, *, kind):
    spectrum = spectrum_of(torch.from_numpy(parts), kind).numpy()
    planes = (-1, *x.shape[2:])
    _native.wiener_filter(x.reshape(planes), spectrum, out.reshape(planes))


@st.composite
def colour_examples(draw):
    n, h, w = draw(st.tuples(BATCH, SIDE, SIDE))
    return [(n, 3, h, w)], {}


@st.composite
def pad_examples(draw):
    n, c, h, w = draw(st.tuples(BATCH, SIDE, SIDE, SIDE))
    more = st.integers(0, 20)
    return [(n, c, h, w)], {"height": h + draw(more), "width": w + draw(more)}


@st.composite
def warp_examples(draw, kind):
    n, c, h, w = draw(st.tuples(BATCH, SIDE, SIDE, SIDE))
    height, width = draw(st.tuples(SIDE, SIDE))
    border = draw(st.sampled_from(["zero", "clamp"]))
    sets = draw(st.sampled_from([1, n]))
    coordinates = (sets, height, width, 2) if kind == "map" else (sets, 3, 3)
    return [(n, c, h, w), coordinates], {"height": height, "width": width, "border": border}


def on_grid(coordinates):
    """Places that every dtype holds exactly; a homography that moves by them."""
    places = (32 * coordinates.abs()).round() / 8 - 2  # most of them inside
    if coordinates.ndim == 4:
        return places
    shift = torch.zeros_like(places)
    shift[:, :2, 2] = places[:, :2, 2]
    return shift + torch.eye(3, dtype=shift.dtype, device=shift.device)


def warp_native(x, coordinates, out, *, height, width, border):
    coordinates = on_grid(torch.from_numpy(coordinates)).numpy()
    _native.warp(x, coordinates, out, clamp=border == "clamp")


SUBJECTS = [
    Subject(
        name="criss_cross_attention",
        examples=attention_examples(),
        reference=kernels.criss_cross_attention_reference,
        op=torch.ops.fuse.criss_cross_attention,
        native=_native.criss_cross_attention,
        triton="fuseengine.kernels.criss_cross_attention:launch",
        launched=lambda tensors, options: (tensors, {}),
    ),
    Subject(
        name="group_norm_silu",
        examples=norm_examples(),
        reference=kernels.group_norm_silu_reference,
        op=norm_op,
        native=norm_native,
        triton="fuseengine.kernels.group_norm_silu:launch",
        launched=lambda tensors, options: ([*tensors, *[None] * (4 - len(tensors))], options),
        plain=norm_plain,
        floor=16.0,  # groups of one element: 1 / sqrt(eps) enlarges
    ),
    *(
        Subject(
            name=name,
            examples=step_examples((given_, 0), wide=True, eta=st.floats(0.0, 1.0)),
            reference=ddim_reference,
            op=ddim_op,
            native=ddim_native,
            triton="fuseengine.kernels.ddim_step:launch",
            launched=ddim_launched,
        )
        for name, given_ in (("ddim_step", 2), ("ddim_step with noise", 3))
    ),
    *(
        Subject(
            name=f"joint_ddim_step {form}",
            examples=step_examples((2, 3), lam=st.floats(0.0, 1.0), form=st.just(form)),
            reference=joint_reference,
            op=joint_op,
            native=joint_native,
            triton="fuseengine.kernels.joint_ddim_step:launch",
            launched=joint_launched,
            cancels=form == "paper",
        )
        for form in ("code", "paper")
    ),
    Subject(
        name="compose_priors",
        examples=step_examples((3, 1), wide=True, form=st.sampled_from(["code", "paper"])),
        reference=compose_reference,
        op=compose_op,
        native=compose_native,
        triton="fuseengine.kernels.compose_priors:launch",
        launched=compose_launched,
    ),
    Subject(
        name="wiener_filter",
        examples=filter_examples(),
        reference=filter_reference,
        op=lambda x, parts, kind: torch.ops.fuse.wiener_filter(x, spectrum_of(parts, kind)),
        native=filter_native,
        triton="fuseengine.kernels.wiener:launch",
        launched=lambda tensors, o: ([tensors[0], spectrum_of(tensors[1], o["kind"])], {}),
        floor=16.0,
    ),
    *(
        Subject(
            name=name,
            examples=colour_examples(),
            reference=getattr(kernels, f"{name}_reference"),
            op=getattr(torch.ops.fuse, name),
            native=getattr(_native, name),
            triton="fuseengine.kernels.ycbcr:launch",
            launched=lambda tensors, _, name=name: (tensors, {"inverse": name == "ycbcr_to_rgb"}),
        )
        for name in ("rgb_to_ycbcr", "ycbcr_to_rgb")
    ),
    Subject(
        name="pad_reflect",
        examples=pad_examples(),
        reference=kernels.pad_reflect_reference,
        op=torch.ops.fuse.pad_reflect,
        native=lambda x, out, height, width: _native.pad_reflect(x, out),
        triton="fuseengine.kernels.pad_reflect:launch",
        launched=lambda tensors, o: ([*tensors, o["height"], o["width"]], {}),
    ),
    *(
        Subject(
            name=f"warp by {kind}",
            examples=warp_examples(kind),
            reference=lambda x, c, **o: kernels.warp_reference(x, on_grid(c), **o),
            op=lambda x, c, **o: torch.ops.fuse.warp(x, on_grid(c).float(), *o.values()),
            native=warp_native,
            triton="fuseengine.kernels.warp:launch",
            launched=lambda tensors, o: (
                [tensors[0], on_grid(tensors[1]).float(), *o.values()], {},
            ),
            finite=(0,),
        )
        for kind in ("map", "homography")
    ),
]  # fmt: skip
every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


# --- inputs ---------------------------------------------------------------------------------------


def laid_out(x, layout):
    """The same values with other strides, NaN between and beside them."""
    if x.ndim < 4 or layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "turned":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    n, c, h, w = x.shape
    if layout == "cropped":
        view = torch.full((n, c + 1, h + 3, w + 3), NAN, dtype=x.dtype)[:, 1:, 1:-2, 2:-1]
    else:
        view = torch.full((n, c, 2 * h, 3 * w), NAN, dtype=x.dtype)[:, :, ::2, ::3]
    view.copy_(x)
    return view


def drawn(data, subject, *, dtype=torch.float32, layouts=("contiguous",)):
    shapes, options = data.draw(subject.examples)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tensors = [torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in shapes]
    return [laid_out(t, data.draw(st.sampled_from(layouts))) for t in tensors], options


def with_nan(data, subject, tensors):
    """One NaN in one of them."""
    tensors = [t.clone() for t in tensors]
    chosen = data.draw(
        st.sampled_from([t for k, t in enumerate(tensors) if k not in subject.finite])
    )
    chosen.view(-1)[data.draw(st.integers(0, chosen.numel() - 1))] = NAN
    return tensors


def run_native(subject, tensors, options):
    """The native kernel, which must write every element and the same bits on 1, 2 and 3 threads."""
    arrays, before, results = [t.numpy() for t in tensors], _native.num_threads(), []
    try:
        for threads in (1, 2, 3):
            _native.set_num_threads(threads)
            out = np.full(subject.reference(*tensors, **options).shape, np.nan, np.float32)
            subject.native(*arrays, out, **options)
            results.append(out)
    finally:
        _native.set_num_threads(before)
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()
    return torch.from_numpy(results[0])


def run_interpreted(interpreted, subject, tensors, options):
    arguments, keywords = subject.launched(tensors, options)
    return interpreted(subject.triton, *arguments, **keywords, capability=87)


@pytest.fixture
def _poisoned():
    """Fresh tensors are NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


# --- properties -----------------------------------------------------------------------------------


@every_subject
@pytest.mark.usefixtures("_poisoned")
class TestOp:
    @given(st.data())
    @settings(max_examples=40)
    def test_values(self, subject, data):
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors, options = drawn(data, subject, dtype=dtype, layouts=LAYOUTS)
        kept = [t.clone() for t in tensors]
        subject.check(subject.op(*tensors, **options), tensors, options)
        assert all(torch.equal(t, k) for t, k in zip(tensors, kept, strict=True))

    @given(st.data())
    @settings(max_examples=25)
    def test_nan_propagates(self, subject, data):
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors, options = drawn(data, subject, dtype=dtype)
        tensors = with_nan(data, subject, tensors)
        subject.check_nan(subject.op(*tensors, **options), tensors, options)


@every_subject
class TestNative:
    @given(st.data())
    @settings(max_examples=40)
    def test_values(self, subject, data):
        tensors, options = drawn(data, subject)
        subject.check(run_native(subject, tensors, options), tensors, options)

    @given(st.data())
    @settings(max_examples=25)
    def test_nan_propagates(self, subject, data):
        tensors, options = drawn(data, subject)
        tensors = with_nan(data, subject, tensors)
        subject.check_nan(run_native(subject, tensors, options), tensors, options)


@every_subject
class TestInterpreted:
    """Kernels as they are launched, one thread of NumPy at a time: few examples."""

    @given(st.data())
    @settings(max_examples=6)
    def test_values(self, interpreted, subject, data):
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        tensors, options = drawn(data, subject, dtype=dtype, layouts=LAYOUTS)
        found = run_interpreted(interpreted, subject, tensors, options)
        subject.check(found, tensors, options)

    @given(st.data())
    @settings(max_examples=5)
    def test_nan_propagates(self, interpreted, subject, data):
        tensors, options = drawn(data, subject)
        tensors = with_nan(data, subject, tensors)
        found = run_interpreted(interpreted, subject, tensors, options)
        subject.check_nan(found, tensors, options)


# --- frames: other dtypes in than out, and NaN has an answer --------------------------------------

FULL_SCALE = {torch.uint8: 255, torch.uint16: 65535}
FRAME_DTYPES = [torch.uint8, torch.uint16, torch.float32, torch.float64, torch.float16]


def a_frame(data, shape, dtype):
    """Values over the whole range and a little beyond, where the dtype has that."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    if dtype in FULL_SCALE:
        whole = torch.from_numpy(rng.integers(0, FULL_SCALE[dtype], shape, endpoint=True)).to(dtype)
    else:
        whole = torch.from_numpy(rng.uniform(-0.1, 1.1, shape)).to(dtype)
        if data.draw(st.booleans()):
            whole.view(-1)[data.draw(st.integers(0, whole.numel() - 1))] = NAN
    if not data.draw(st.booleans()):
        return whole
    larger = whole.new_zeros((shape[0], shape[1] + 1, shape[2] + 2, *shape[3:]))
    larger[:, 1:, 1:-1] = whole
    return larger[:, 1:, 1:-1]


@st.composite
def frame_shapes(draw):
    return (*draw(st.tuples(BATCH, SIDE, SIDE)), *draw(st.sampled_from([(), (1,), (3,)])))


def in_arguments(data):
    frame = a_frame(data, data.draw(frame_shapes()), data.draw(st.sampled_from(FRAME_DTYPES)))
    channels = data.draw(st.sampled_from(["luma", "rgb", "ycbcr"]))
    size = [n + data.draw(st.integers(0, 12)) for n in frame.shape[1:3]]
    top = FULL_SCALE.get(frame.dtype, 1)
    low = top * data.draw(st.sampled_from([0.0, 0.25]))
    return frame, channels, *size, low, data.draw(st.sampled_from([1.0, 1.5])) / top


def check_in(found, arguments, dtype):
    exact = kernels.frame_in_reference(*arguments, torch.float64)
    assert found.dtype == dtype and found.shape == exact.shape
    # Six float32 operations on numbers up to 1.5 times full scale, then one rounding.
    tolerance = 1e-6 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert (found.double() - exact).abs().max() <= tolerance


def out_arguments(data):
    n, h, w, *three = data.draw(frame_shapes())
    planes, dtype = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from(FRAME_DTYPES))
    kind = data.draw(st.sampled_from([torch.float32, torch.float16]))
    extra = [data.draw(st.integers(0, 3)) for _ in range(2)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    size = (n, planes, h + extra[0], w + extra[1])
    fused = torch.from_numpy(rng.uniform(-0.2, 1.2, size)).to(kind)
    if data.draw(st.booleans()):
        fused.view(-1)[data.draw(st.integers(0, fused.numel() - 1))] = NAN
    visible = a_frame(data, (n, h, w, *three), dtype) if data.draw(st.booleans()) else None
    return fused, visible, h, w, dtype


def check_out(found, arguments):
    """The nearest number of the dtype, except where float32 cannot tell which one is nearer."""
    fused, visible, h, w, dtype = arguments
    wide = None if visible is None else visible.double() / FULL_SCALE.get(dtype, 1)
    exact = kernels.frame_out_reference(fused.double(), wide, h, w, torch.float64)
    assert found.dtype == dtype and found.shape == exact.shape
    top = FULL_SCALE.get(dtype)
    if top is None:
        slack = 1e-6 + (torch.finfo(dtype).eps if dtype == torch.float16 else 0)
        assert (found.double() - exact).abs().max() <= slack
    else:
        assert (found.double() - top * exact).abs().max() <= 0.5 + 4e-7 * top


@pytest.mark.usefixtures("_poisoned")
class TestFrames:
    @given(st.data())
    @settings(max_examples=80)
    def test_in(self, data):
        arguments = in_arguments(data)
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        check_in(torch.ops.fuse.frame_in(*arguments, dtype), arguments, dtype)

    @given(st.data())
    @settings(max_examples=80)
    def test_out(self, data):
        arguments = out_arguments(data)
        check_out(torch.ops.fuse.frame_out(*arguments), arguments)

    @given(st.data())
    @settings(max_examples=12)
    def test_in_interpreted(self, interpreted, data):
        arguments = in_arguments(data)
        if arguments[0].dtype == torch.float64:
            return  # runs through PyTorch
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
        launch = "fuseengine.kernels.frames:launch_in"
        check_in(interpreted(launch, *arguments, dtype, capability=87), arguments, dtype)

    @given(st.data())
    @settings(max_examples=12)
    def test_out_interpreted(self, interpreted, data):
        arguments = out_arguments(data)
        if arguments[-1] == torch.float64:
            return  # runs through PyTorch
        launch = "fuseengine.kernels.frames:launch_out"
        check_out(interpreted(launch, *arguments, capability=87), arguments)
