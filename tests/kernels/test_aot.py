"""Compiling ahead of time with no GPU: the code, complete sets, tuning, and running from a set."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import types

import pytest
import torch

from fuseengine.errors import BackendUnavailableError, SettingError, UnknownNameError
from fuseengine.kernels import _cubins, _resources, _triton, _tuning, aot
from fuseengine.kernels.ddim_step import plan as plan_ddim
from fuseengine.runtime import cubins
from tests.helpers import ROOT
from tests.kernels.test_cubins import Recorder

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
DTYPES = _triton.DTYPES
CAPABILITIES = (87, 90)
WIDE = aot.Shape(channels=512, queries=64)


def module(name):
    return importlib.import_module(f"fuseengine.kernels.{name}")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Triton's own cache stays out of the home folder, and old results out of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def examples(cache):
    """Every op's launches: all dtypes, both GPUs, both variants."""
    groups = {}
    for op, capability, dtype in itertools.product(aot.OPS, CAPABILITIES, DTYPES):
        if op.startswith("frame") and (dtype == torch.float16) == (capability == 87):
            continue  # many forms that differ in a conversion: each dtype for one of the GPUs
        compile_ = functools.partial(aot.compile_example, op, dtype, capability)
        groups.setdefault((op not in aot.BY_LENGTH, op, capability), []).append(compile_)
        if op == "criss_cross_attention":
            groups[True, op, capability].append(functools.partial(compile_, WIDE))
    # What dtypes share is compiled once if one process comes upon it; the longest task first.
    tasks = [functools.partial(aot.in_processes, groups[key], 1) for key in sorted(groups)]
    return aot.in_processes(tasks)


def chosen(examples, ops, labels="", *, aligned=True, capabilities=(87,)):
    """(kernel, resources) of those of some ops, and of labels that begin so."""
    found = [
        kernel
        for kernel in examples
        if kernel.op in ops
        and kernel.aligned == aligned
        and kernel.label.startswith(labels)
        and kernel.capability in capabilities
    ]
    assert {(k.dtype, k.capability) for k in found} == {
        (str(dtype).removeprefix("torch."), capability)
        for dtype, capability in itertools.product(DTYPES, capabilities)
    }
    different = {kernel.sha256: kernel for kernel in found}.values()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(zip(different, pool.map(resources, different), strict=True))


_resources_of = {}


def resources(kernel):
    """Disassembling takes longer than compiling: once for each kernel."""
    if kernel.sha256 not in _resources_of:
        _resources_of[kernel.sha256] = kernel.resources()
    return _resources_of[kernel.sha256]


ATTENTION = ("criss_cross_attention",)
ELEMENTWISE = ("compose_priors", "ddim_step", "joint_ddim_step", "rgb_to_ycbcr", "ycbcr_to_rgb")


@needs_triton
@pytest.mark.slow
class TestCode:
    """What the compiler made, for Orin and for Hopper."""

    def test_nothing_spills(self, examples):
        assert {(k.op, k.capability) for k in examples} == set(
            itertools.product(aot.OPS, CAPABILITIES)
        )
        spilled = {k.file: _resources.usage(k.code, k.entry)[1] for k in examples}
        assert {file: size for file, size in spilled.items() if size} == {}

    @pytest.mark.parametrize("aligned", [True, False])
    @pytest.mark.parametrize("label", ["columns", "rows"])
    def test_attention_runs_on_the_tensor_cores(self, examples, label, aligned):
        given = {"aligned": aligned, "capabilities": CAPABILITIES}
        for kernel, found in chosen(examples, ATTENTION, label, **given):
            assert found.tensor_core > 0, kernel.file

    def test_attention_loads_128_bits(self, examples):
        for kernel, found in chosen(examples, ATTENTION, "turn"):
            assert found.tensor_core == 0
            assert found.loads_128 == found.loads > 0, kernel.file
            assert found.stores_128 == found.stores > 0, kernel.file
        for label in ("columns", "rows"):
            for kernel, found in chosen(examples, ATTENTION, label):
                assert found.loads_128 >= found.loads / 2, kernel.file
                assert found.stores_128 > 0, kernel.file

    def test_elementwise_kernels_move_128_bits(self, examples):
        for kernel, found in chosen(examples, ELEMENTWISE):
            assert found.loads_128 == found.loads > 0, kernel.file
            assert found.stores_128 == found.stores > 0, kernel.file

    def test_norm_moves_128_bits(self, examples):
        norm = ("group_norm_silu",)
        for kernel, found in chosen(examples, norm, "moments"):
            assert found.loads_128 == found.loads > 0, kernel.file
        for kernel, found in chosen(examples, norm, "apply"):
            assert found.stores_128 == found.stores > 0, kernel.file

    def test_nothing_is_assumed_of_any_size(self, examples):
        for kernel, found in chosen(examples, ("compose_priors",), aligned=False):
            assert kernel.assumes == {}
            assert found.loads_128 == found.stores_128 == 0 < found.loads, kernel.file
            assert 0 < found.occupancy <= 1

    def test_nothing_tells_where_it_was_compiled(self, examples):
        for kernel in examples:
            assert b".py" not in kernel.code and str(ROOT).encode() not in kernel.code


def test_the_tuned_settings_do_the_same_work_in_no_two_warps():
    """A warp has 16 rows of the products; with fewer, Triton gives several the same ones."""
    plan, empty = module("criss_cross_attention").plan, torch.empty
    for dtype, channels, queries in itertools.product(DTYPES, (16, 32, 64), (4, 32, 64)):
        q, v = (empty(1, c, 480, 640, dtype=dtype, device="meta") for c in (queries, channels))
        lse = empty(1, 480, 640, device="meta")
        for launch in plan(q, q, v, torch.empty_like(v), lse, capability=87):
            if "BLOCK_M" in launch.constants:
                assert launch.constants["BLOCK_M"] >= 16 * launch.num_warps


# --- complete sets --------------------------------------------------------------------------------

SIZES = [
    (480, 640), (479, 641), (1080, 1920), (360, 640), (288, 384), (512, 641), (33, 48), (16, 15),
    (1, 1), (1, 7), (9, 1), (2, 1030),
]  # fmt: skip


def more_sizes(count=12):
    draw = random.Random(0)
    return [(draw.randint(1, 900), draw.randint(1, 900)) for _ in range(count)]


def views(x):
    """A tensor as it is, elsewhere in memory, with other strides, in another order."""
    yield x
    yield meta(x.dtype, x.numel() + 1)[1:].view(x.shape)
    yield meta(x.dtype, *x.shape[:-1], 2 * x.shape[-1])[..., : x.shape[-1]]
    if x.ndim == 4:
        batch, channels, height, width = x.shape
        yield meta(x.dtype, batch, height, width, channels).permute(0, 3, 1, 2)
        yield meta(x.dtype, batch, 2 * channels, height, width)[:, :channels]
        yield meta(x.dtype, batch, channels, width, height).transpose(2, 3)


def meta(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


def run_all_launches(dtype, size, batch, capability, channels, queries, ops):
    """The ops' launch functions, on tensors without memory."""
    given = {"capability": capability}

    def planes(count, kind=dtype):
        return views(meta(kind, batch, count, *size))

    if "ddim_step" in ops:
        for x, kind in itertools.product(planes(3), (dtype, torch.float32)):
            noise = meta(kind, *x.shape)
            module("ddim_step").launch(x, x, None, (0.5, 0.5, 0.0), **given)
            module("ddim_step").launch(x, noise, noise, (0.5, 0.5, 0.5), **given)
    if "joint_ddim_step" in ops:
        for x, form in itertools.product(planes(3), ("code", "paper")):
            numbers = (0.6, 0.8, 0.8, 0.6, 0.3)
            single = (x[:, 0:1], x[:, 1:2], x[:, 2:].float())
            module("joint_ddim_step").launch(x, x, *single, numbers, form, **given)
    if "compose_priors" in ops:
        for x in planes(3):
            module("compose_priors").launch(x, x, x, x[:, 1:2], (0.5, 0.5), **given)
    if "criss_cross_attention" in ops:
        for q, v in zip(planes(queries), planes(channels), strict=True):
            module("criss_cross_attention").launch(q, q, v, **given)
    if "group_norm_silu" in ops:
        for x, kind, silu in itertools.product(planes(channels), (dtype, torch.float32), (0, 1)):
            weight = meta(kind, channels)
            for shift in (None, meta(kind, 1, channels), meta(kind, batch, channels)):
                module("group_norm_silu").launch(
                    x, weight, weight, shift, groups=1, eps=1e-5, silu=bool(silu), **given
                )
    if "frame_in" in ops:
        launch, kinds = module("frames").launch_in, ("luma", "rgb", "ycbcr")
        for frame, kind in itertools.product(frames(size, batch), kinds):
            for padded in (size, (size[0] + 7, size[1] + 5)):
                launch(frame, kind, *padded, 0.0, 0.5, dtype, **given)
    if "frame_out" in ops:
        for frame, count in itertools.product(frames(size, batch), (1, 3)):
            for fused in planes(count):
                module("frames").launch_out(fused, frame, *size, frame.dtype, **given)
    if "pad_reflect" in ops:
        for x in planes(1):
            module("pad_reflect").launch(x, size[0] + 3, size[1] + 8, **given)
    for name, inverse in (("rgb_to_ycbcr", False), ("ycbcr_to_rgb", True)):
        for x in planes(3) if name in ops else ():
            module("ycbcr").launch(x, inverse=inverse, **given)
    if "warp" in ops:
        sources = (meta(torch.float32, 1, 3, 3), meta(torch.float32, batch, *size, 2))
        for x, at, border in itertools.product(planes(1), sources, ("zero", "clamp")):
            module("warp").launch(x, at, *size, border, **given)
    if "wiener_filter" in ops:
        for kind in (torch.complex64, torch.float32):
            for x in planes(1):
                module("wiener").launch(x, meta(kind, size[0], size[1] // 2 + 1), **given)


def frames(size, batch):
    for kind in (torch.uint8, torch.float32):
        yield from views(meta(kind, batch, *size, 3))
    for kind in (torch.uint8, torch.uint16, torch.float32):
        yield from views(meta(kind, batch, *size))


@pytest.fixture
def launched(monkeypatch):
    """The launches that ops run, instead of running them."""
    found = []
    for name, module_ in list(sys.modules.items()):
        if name.startswith("fuseengine.kernels.") and module_ is not _triton:
            monkeypatch.setattr(
                module_, "run", lambda launches, device: found.extend(launches), raising=False
            )
    return found


class TestComplete:
    """What aot would compile covers whatever the ops launch; nothing is compiled here."""

    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_size_and_layout(self, launched, dtype, capability):
        ops = set(aot.OPS) - set(aot.BY_LENGTH)
        covered = {op: aot.variants(op, dtype, capability) for op in ops}
        everything = set().union(*covered.values())
        ways = [(1, 32, 4), (2, 3, 1), (1, 512, 64), (1, 40, 33)]
        for k, size in enumerate(SIZES + more_sizes()):
            batch, channels, queries = ways[k % len(ways)]
            run_all_launches(dtype, size, batch, capability, channels, queries, ops)
        used = {launch.variant(): launch for launch in launched}
        assert [cubins.describe(v) for v in used if v not in everything] == []
        # The other way round: what no launch needs would be compiled for nothing.
        assert {v.kernel for v in everything} == {v.kernel for v in used}
        assert {bool(v.assumes) for v in used} == {True, False}

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_lengths_that_were_named(self, launched, dtype):
        sizes = ((480, 640), (479, 641), (60, 1081))
        extent = aot.Extent(sizes=sizes)
        for op in aot.BY_LENGTH:
            covered = aot.variants(op, dtype, 87, extent)
            for size, batch in itertools.product(sizes, (1, 2)):
                run_all_launches(dtype, size, batch, 87, 32, 4, {op})
            used = {launch.variant() for launch in launched}
            assert used and not used - set(covered)

    def test_a_gap_would_show(self, launched, monkeypatch):
        """The test above fails if a constant follows the size."""
        plan = aot.OPS["ddim_step"]
        few = [launch for launch in plan(torch.float16, 87, aot.Shape()) if launch.label == "plain"]
        monkeypatch.setitem(aot.OPS, "ddim_step", lambda *_: few)
        run_all_launches(torch.float16, (480, 640), 1, 87, 32, 4, {"ddim_step"})
        covered = aot.variants("ddim_step", torch.float16, 87)
        missing = {launch.label for launch in launched if launch.variant() not in covered}
        assert missing == {"noise"}

    def test_tuned_settings_are_all_found(self, monkeypatch):
        """An entry of the tuning table makes a kernel of its own, however small its niche."""
        data = json.loads(_tuning.PATH.read_text())
        for power in (13, 14, 20):
            settings = {"block": 1 << (power - 5)}
            data = _tuning.with_entry(data, "ddim_step", 87, "float16", 1 << power, settings)
        monkeypatch.setattr(_tuning, "table", lambda: data["ops"])
        _tuning.choose.cache_clear()
        found = aot.variants("ddim_step", torch.float16, 87)
        _tuning.choose.cache_clear()
        assert {dict(v.constants)["BLOCK"] for v in found} == {256, 512, 32768, 2048}

    def test_integers_of_64_bits_are_left_out(self):
        big = aot.Shape(size=(1 << 14, 1 << 14), channels=64)
        launches = aot.OPS["criss_cross_attention"](torch.float16, 87, big)
        assert any(launch.variant().wide for launch in launches)
        found = aot.variants("criss_cross_attention", torch.float16, 87)
        assert found and not any(variant.wide for variant in found)

    def test_kernels_have_names_of_their_own(self):
        """A store knows a kernel by its name."""
        named = {}
        for op in aot.OPS:
            for launch in aot.OPS[op](torch.float32, 87, aot.Shape()):
                named.setdefault(launch.kernel.name, set()).add(launch.kernel)
        assert [name for name, kernels in named.items() if len(kernels) > 1] == []


@pytest.fixture(scope="module")
def written(cache, tmp_path_factory):
    """A store for Orin: all ops in one dtype, for some channels; PTX of one op."""
    extent = aot.Extent(channels=(32,), queries=(4,))
    tasks = [
        functools.partial(aot.compile_all, op, torch.float16, 87, extent=extent) for op in aot.OPS
    ]
    ptx = functools.partial(aot.compile_all, "ddim_step", torch.float16, 80, form="ptx")
    folder = tmp_path_factory.mktemp("store")
    aot.write(aot.in_processes([*tasks, ptx]), folder)
    return folder


@pytest.fixture
def store(written):
    return cubins.Store.load(written)


@pytest.fixture
def gpu(monkeypatch):
    """As on an Orin, as far as finding code goes: launches arrive at a recorder."""
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "cupy", recorder.module)
    monkeypatch.setattr(_triton, "_capability", lambda device: 87)
    monkeypatch.setattr(torch.cuda, "device", lambda device: recorder.within("guard"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = types.SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(_cubins, "_active", None)
    monkeypatch.setattr(_triton, "_built", {})
    cubins._stream.cache_clear()
    yield recorder
    cubins._stream.cache_clear()


CUDA = torch.device("cuda")


def launches(*, count=640, block=None):
    x = torch.empty(count, dtype=torch.float16, device="meta")
    settings = block and {"block": block, "num_warps": 4}
    out = torch.empty_like(x)
    return plan_ddim(x, x, None, out, (1.0, 0.0, 0.0), capability=87, settings=settings)


@needs_triton
@pytest.mark.slow
class TestStore:
    @pytest.mark.parametrize("size", [*SIZES, *more_sizes(4)])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_every_launch_finds_its_code(self, store, launched, size, batch):
        ops = set(aot.OPS) - (set() if size == (480, 640) else set(aot.BY_LENGTH))
        run_all_launches(torch.float16, size, batch, 87, 32, 4, ops)
        for launch in launched:
            variant = launch.variant()
            entry = store.get(variant, 87)
            assert entry, store.missing(variant, launch.label, 87)
            assert entry.kernel == launch.kernel.name
            assert entry.threads == 32 * launch.num_warps
            assert [kind for _, kind in entry.parameters] == [
                cubins.type_of(value) for value in launch.values().values()
            ]

    def test_runs_without_triton(self, store, gpu, launched, monkeypatch):
        run_all_launches(torch.float16, (480, 640), 1, 87, 32, 4, set(aot.OPS))
        monkeypatch.setenv(_triton.NO_JIT, "1")
        monkeypatch.setitem(sys.modules, "triton", None)
        _cubins.use(store)
        _triton.run(launched, CUDA)
        calls = gpu.named("launch")
        assert len(calls) == len(launched) > 0
        assert [call[1] for call in calls] == [(*launch.grid, 1, 1)[:3] for launch in launched]
        assert len(gpu.named("load")) == len({launch.variant() for launch in launched})

    def test_the_environment_names_it(self, store, gpu, monkeypatch):
        monkeypatch.setenv("FUSEENGINE_CUBINS", str(store.folder))
        monkeypatch.setattr(_cubins, "_active", _cubins._unknown)
        _triton.run(launches(), CUDA)
        assert len(gpu.named("launch")) == 1

    def test_no_launch_that_is_not_covered(self, store, gpu, monkeypatch):
        monkeypatch.setenv(_triton.NO_JIT, "1")
        _cubins.use(store)
        with pytest.raises(BackendUnavailableError) as caught:
            _triton.run(launches(block=64), CUDA)
        text = str(caught.value)
        assert "ddim_step_kernel (plain) is not among the kernels in" in text
        assert "nearest: ddim_step (plain, float16): BLOCK 2048, wanted 64\n" in text
        assert "python -m fuseengine.kernels.aot --capability 87 --out" in text
        assert not gpu.named("launch")

    def test_where_allowed_triton_compiles_the_rest(self, store, gpu, monkeypatch, caplog):
        monkeypatch.delenv(_triton.NO_JIT, raising=False)
        calls = compiled_by_recorder(monkeypatch)
        _cubins.use(store)
        _triton.run([*launches(block=64), *launches()], CUDA)
        assert calls[:2] == [("ddim_step_kernel", 87), ("grid", (10, 1, 1))] and len(calls) == 3
        assert len(gpu.named("launch")) == 1
        assert "compiling: ddim_step_kernel (plain) is not among" in caplog.text

    def test_plans_follow_the_code_there_is(self, store, gpu, monkeypatch):
        monkeypatch.setattr(_triton, "_capability", lambda device: 89)
        assert _triton.device_capability(CUDA) == 89
        _cubins.use(store)
        assert _triton.device_capability(CUDA) == 80
        monkeypatch.setattr(_triton, "_capability", lambda device: 87)
        assert _triton.device_capability(CUDA) == 87

    def test_ptx_on_another_gpu(self, store, gpu, monkeypatch):
        monkeypatch.setenv(_triton.NO_JIT, "1")
        monkeypatch.setattr(_triton, "_capability", lambda device: 89)
        _cubins.use(store)
        _triton.run(launches(), CUDA)
        ((_, path),) = gpu.named("load")
        assert path.endswith(".ptx") and ".compute_80." in path


def compiled_by_recorder(monkeypatch):
    """Triton's compiler answers with a kernel that records its launches."""
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            calls.append(("grid", grid))
            return lambda *values: calls.append(("values", *values))

    def build(kernel, variant, capability, **options):
        calls.append((kernel.name, capability))
        return Kernel()

    monkeypatch.setattr(_triton, "build", build)
    return calls


# --- compiling at run time ------------------------------------------------------------------------


class TestNoJit:
    @needs_triton
    def test_a_launch_that_would_compile_raises(self, monkeypatch):
        monkeypatch.setenv("FUSEENGINE_NO_JIT", "1")
        monkeypatch.setattr(_triton, "_built", {})
        expected = (
            "ddim_step_kernel .plain. would be compiled now, and FUSEENGINE_NO_JIT=1 forbids.*"
            "aot --out FOLDER, then FUSEENGINE_CUBINS=FOLDER"
        )
        with pytest.raises(BackendUnavailableError, match=expected):
            _triton.run(launches(), torch.device("cpu"))

    def test_without_triton_the_error_says_so(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        launch = launches()[0]
        monkeypatch.delitem(launch.kernel.__dict__, "jit", raising=False)
        with pytest.raises(BackendUnavailableError, match="needs Triton.*pip install"):
            _ = launch.kernel.jit


@needs_triton
class TestTritonsLauncher:
    def test_compiles_once_and_passes_everything_in_order(self, gpu, monkeypatch):
        calls = compiled_by_recorder(monkeypatch)
        for _ in range(2):
            _triton.run(launches(), CUDA)
        _triton.run(launches(count=639), CUDA)
        assert [call[0] for call in calls] == [
            "ddim_step_kernel", "grid", "values", "grid", "values",
            "ddim_step_kernel", "grid", "values",
        ]  # fmt: skip
        (launch,) = launches()
        values = next(call for call in calls if call[0] == "values")[1:]
        names = launch.kernel.jit.arg_names
        assert len(values) == len(names)
        given = dict(zip(names, values, strict=True))
        assert given["noise"] is None and given["BLOCK"] == launch.constants["BLOCK"]
        assert given["count"] == 640 and given["scale_x"] == 1.0

    def test_its_compiled_kernel_takes_them(self, monkeypatch):
        """Triton's own object, with only its last step, the driver's, taken away."""
        import triton

        (launch,) = launches()
        built = _triton.build(launch.kernel, launch.variant(), 87)
        sent = []
        built.module, built._run = object(), lambda *words: sent.append(words)
        built.__class__ = type("Silent", (type(built),), {"__del__": lambda self: None})
        active = types.SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 77
        )
        monkeypatch.setattr(_triton, "_built", {(launch.kernel, launch.variant(), 0): built})
        monkeypatch.setattr(triton.runtime.driver, "_active", active)
        _triton.run([launch], torch.device("cpu"))
        ((x, y, z, stream, *_, first, second, _, out, count, a, b, c, block),) = sent
        assert (x, y, z, stream) == (*launch.grid, 1, 1, 77)
        assert first is second is launch.arguments["x"] and out is launch.arguments["out"]
        assert (count, a, b, c, block) == (640, 1.0, 0.0, 0.0, launch.constants["BLOCK"])
        # One word for each name of its signature, constants included.
        assert len(sent[0]) - 9 == len(built.src.signature)

    @pytest.mark.parametrize("op", list(aot.OPS))
    def test_specialisation_is_what_triton_would_choose(self, op):
        """For sizes that are multiples of 16; for others Triton's launcher assumes less."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", 87, 32))
        for launch in aot.OPS[op](torch.float16, 87, aot.Shape(batch=2)):
            jit = launch.kernel.jit
            binder = create_function_from_signature(jit.signature, jit.params, backend)
            given = {
                name: Address(value) if isinstance(value, torch.Tensor) else value
                for name, value in {**launch.arguments, **launch.constants}.items()
            }
            _, theirs, _ = binder(**given)
            theirs = dict(zip(jit.arg_names, theirs, strict=True))
            variant = launch.variant()
            types_, assumes = dict(variant.parameters), dict(variant.assumes)
            for name in jit.arg_names:
                kind, attributes = theirs[name][:2]
                if given[name] == 1 and name in types_:
                    # It would compile 1 in; here that is a constant only where it is always 1.
                    assert (kind, types_[name]) == ("constexpr", "i32")
                    continue
                assert types_.get(name, "constexpr") == kind, name
                if name in assumes:
                    assert "D" in (attributes or ""), name


class Address:
    """A tensor of Triton's protocol: dtype and address."""

    def __init__(self, tensor):
        self.dtype, self.tensor = tensor.dtype, tensor

    def data_ptr(self):
        return self.tensor.data_ptr()

    def __eq__(self, other):
        return False

    __hash__ = None


# --- descriptions and the command -----------------------------------------------------------------


@pytest.fixture(scope="module")
def ddim(cache):
    return {k.label: k for k in aot.compile("ddim_step", torch.float32, 87)}


@needs_triton
class TestDescription:
    def test_parameters(self, ddim):
        kernel = ddim["plain"]
        pointers = [("x", "*fp32"), ("eps", "*fp32"), ("out", "*fp32")]
        numbers = [("count", "i32"), *((n, "fp32") for n in ("scale_x", "scale_eps", "sigma"))]
        assert list(kernel.parameters) == pointers + numbers
        assert kernel.hidden == 2
        assert kernel.constants["noise"] is None
        assert kernel.assumes == {"x": 16, "eps": 16, "out": 16, "count": 8}
        assert kernel.options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
        assert (kernel.threads, kernel.shared_bytes) == (128, 0)

    def test_code_agrees_with_it(self, ddim):
        """PTX names its target and as many parameters as the description."""
        for kernel in (*aot.compile_all("ddim_step", torch.float32, 80, form="ptx"), ddim["noise"]):
            assert kernel.sha256 == hashlib.sha256(kernel.code).hexdigest()
            if kernel.form == "cubin":
                assert kernel.code[:4] == b"\x7fELF" and kernel.file.endswith(".cubin")
                continue
            text = kernel.code.decode()
            assert ".target sm_80" in text and ".version 8.4" in text
            head = text.split(f".entry {kernel.entry}(", 1)[1].split("{", 1)[0]
            assert head.count(".param") == len(kernel.parameters) + kernel.hidden
            assert f".reqntid {kernel.threads}" in text

    def test_ptx_has_no_resources(self):
        kernel = aot.compile_all("compose_priors", torch.float32, 80, form="ptx")[0]
        with pytest.raises(SettingError, match="ptx is ptx; expected machine code"):
            kernel.resources()

    def test_just_what_launches_need(self):
        kernels = aot.compile_launches("ddim_step", torch.float16, 87, [*launches(), *launches()])
        (launch,) = launches()
        assert [k.variant for k in kernels] == [launch.variant()]

    def test_command(self, tmp_path):
        words = ["--capability", "87", "90", "--op", "compose_priors", "--dtype", "float16"]
        paths = ["--out", tmp_path / "store", "--report", tmp_path / "table.md"]
        done = subprocess.run(
            [sys.executable, "-m", "fuseengine.kernels.aot", *words, *paths, "--jobs", "1"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ},
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].startswith("6 kernels, described in ")
        assert "registers" in lines[1] and len(lines) == 2 + 2 * 2
        assert lines[2].split()[:5] == ["compose_priors", "(plain)", "float16", "87", "aligned"]
        store = cubins.Store.load(tmp_path / "store")
        assert [(e.form, e.capability) for e in store.entries] == [
            ("cubin", 87), ("cubin", 87), ("cubin", 90), ("cubin", 90), ("ptx", 80), ("ptx", 80),
        ]  # fmt: skip
        assert str(ROOT) not in (tmp_path / "store" / cubins.MANIFEST).read_text()
        page = (tmp_path / "table.md").read_text().splitlines()
        assert page[0] == "# GPU kernels as compiled for sm_87, sm_90" and "Triton 3." in page[2]
        assert len([line for line in page if line.startswith("| compose_priors")]) == 4

    def test_several_processes(self):
        tasks = [
            functools.partial(aot.compile_all, "compose_priors", dtype, 87)
            for dtype in (torch.float16, torch.bfloat16)
        ]
        found = aot.in_processes(tasks, 2)
        assert found == aot.in_processes(tasks, 1)
        assert [k.dtype for k in found] == ["float16", "float16", "bfloat16", "bfloat16"]

    def test_scratch_memory_is_refused(self, monkeypatch):
        plain = aot.build

        def with_scratch(*arguments, **options):
            built = plain(*arguments, **options)
            built.metadata = built.metadata._replace(global_scratch_size=64)
            return built

        monkeypatch.setattr(aot, "build", with_scratch)
        with pytest.raises(BackendUnavailableError, match="64 bytes of global_scratch; expected 0"):
            aot.compile("compose_priors", torch.float32, 87)

    def test_a_triton_with_other_hidden_parameters_is_refused(self, monkeypatch):
        plain = aot.build

        def with_more(*arguments, **options):
            built = plain(*arguments, **options)
            built.asm["ptx"] = built.asm["ptx"].replace(".entry compose_priors_kernel(",
                ".entry compose_priors_kernel(.param .u64 more, ")  # fmt: skip
            return built

        monkeypatch.setattr(aot, "build", with_more)
        with pytest.raises(BackendUnavailableError, match="3 parameters beside its own"):
            aot.compile("compose_priors", torch.float32, 87)

    @pytest.mark.parametrize(
        ("op", "dtype", "capability", "kind", "message"),
        [
            ("ddim", torch.float32, 87, UnknownNameError, "Did you mean 'ddim_step'"),
            (
                "ddim_step",
                torch.float64,
                87,
                SettingError,
                "float64; expected one of torch.float32",
            ),
            ("ddim_step", torch.float32, 75, SettingError, "capability 75; expected two digits"),
        ],
    )
    def test_bad_input(self, op, dtype, capability, kind, message):
        for function in (aot.compile, aot.compile_all, aot.variants):
            with pytest.raises(kind, match=message):
                function(op, dtype, capability)


@needs_triton
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "wiener"], "unknown op 'wiener'"),
        (["--capability", "75"], "capability 75; expected two digits from 80"),
    ],
)
def test_command_says_what_is_wrong(capsys, words, message):
    assert aot.main(words) == 2
    assert message in capsys.readouterr().err


def test_command_wants_sizes_with_an_x(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--size", "480"])
    assert "'480'; expected HEIGHTxWIDTH, for example 480x640" in capsys.readouterr().err


def test_occupancy_by_hand():
    # 128 threads at 40 registers: 65536 / (40 * 128) = 12.8 blocks of 4 warps of 48.
    assert _resources.occupancy(87, 128, 40, 0) == pytest.approx(12 * 128 / 1536)
    # 164 KB over 14 + 1 KB: 10 blocks.
    assert _resources.occupancy(87, 128, 32, 14 << 10) == pytest.approx(10 * 128 / 1536)
    # 2048 threads are 16 blocks of 128.
    assert _resources.occupancy(90, 128, 16, 0) == 1.0
    # 168 registers: 65536 / 5376 = 12.2 warps, 12 by fours.
    assert _resources.occupancy(87, 128, 168, 0) == pytest.approx(3 * 128 / 1536)
    # 255 registers are given out as 256: 8 warps, one block of 8.
    assert _resources.occupancy(87, 256, 255, 0) == pytest.approx(256 / 1536)


class TestTuning:
    def test_every_op_has_defaults_for_every_dtype(self):
        names = {str(t).removeprefix("torch.") for t in _triton.DTYPES}
        assert set(_tuning.table()) == set(aot.OPS)
        assert all(set(rows["defaults"]) == names for rows in _tuning.table().values())

    def test_nearest_entry(self, monkeypatch):
        data = json.loads(_tuning.PATH.read_text())
        for capability, work, block in ((87, 1 << 16, 111), (87, 1 << 20, 222), (90, 1 << 20, 333)):
            given = ("ddim_step", capability, "float16", work, {"block": block})
            data = _tuning.with_entry(data, *given)
        monkeypatch.setattr(_tuning, "table", lambda: data["ops"])
        choose = _tuning.choose.__wrapped__
        default = data["ops"]["ddim_step"]["defaults"]["float16"]
        assert choose("ddim_step", torch.float16, 87, 1 << 17) == {**default, "block": 111}
        assert choose("ddim_step", torch.float16, 87, 1 << 19) == {**default, "block": 222}
        assert choose("ddim_step", torch.float16, 90, 1 << 19) == {**default, "block": 333}
        # Another dtype, another chip, a size far away: the default.
        assert choose("ddim_step", torch.float32, 87, 1 << 20)["block"] not in (111, 222, 333)
        assert choose("ddim_step", torch.float16, 89, 1 << 20) == default
        assert choose("ddim_step", torch.float16, 87, 1 << 26) == default

    def test_sizes_of_one_octave_are_alike(self, monkeypatch):
        data = json.loads(_tuning.PATH.read_text())
        for work, block in ((300_000, 111), (700_000, 222)):
            given = ("ddim_step", 87, "float16", work, {"block": block})
            data = _tuning.with_entry(data, *given)
        monkeypatch.setattr(_tuning, "table", lambda: data["ops"])
        for power in range(10, 25):
            low, high = int(2 ** (power - 0.49)), int(2 ** (power + 0.49))
            found = [
                _tuning.choose.__wrapped__("ddim_step", torch.float16, 87, work)
                for work in (low, 1 << power, high)
            ]
            assert found[0] == found[1] == found[2]

    def test_an_entry_replaces_its_like(self):
        data = json.loads(_tuning.PATH.read_text())
        for block in (1, 2):
            data = _tuning.with_entry(data, "ddim_step", 87, "float16", 64, {"block": block})
        assert [e["settings"] for e in data["ops"]["ddim_step"]["measured"]] == [{"block": 2}]

    def test_bad_entries(self):
        data = json.loads(_tuning.PATH.read_text())
        with pytest.raises(SettingError, match="expected one of the table's ops"):
            _tuning.with_entry(data, "ddim", 87, "float16", 64, {})
        with pytest.raises(SettingError, match="blok.*expected"):
            _tuning.with_entry(data, "ddim_step", 87, "float16", 64, {"blok": 2})
