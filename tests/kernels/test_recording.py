"""Launches written down for machines without PyTorch: what they say, and that they compute."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fuseengine.errors import BackendUnavailableError, KernelStoreError, SettingError
from fuseengine.program import Node, Program, Value
from fuseengine.runtime import launches, ops
from fuseengine.runtime.launches import Array, BoundLaunch, Launches, Number, key_of

torch = pytest.importorskip("torch")

from fuseengine.kernels import recording  # noqa: E402

SCALES = {
    "sqrt_abar": 0.6,
    "sqrt_one_minus_abar": 0.8,
    "sqrt_abar_prev": 0.8,
    "sqrt_one_minus_abar_prev": 0.6,
}
PICTURE, FEATURES = (1, 3, "H", "W"), (1, 4, "H", "W")
GRAY = (1, 1, "H", "W")
SIZE = (24, 32)

CASES = {
    "ddim": ("ddim_step", [PICTURE, PICTURE], PICTURE, SCALES),
    "ddim, noise": ("ddim_step", [PICTURE] * 3, PICTURE, {**SCALES, "eta": 1.0}),
    "joint": (
        "joint_ddim_step",
        [PICTURE, PICTURE, GRAY, GRAY, GRAY],
        PICTURE,
        {**SCALES, "lam": 0.3, "form": "code"},
    ),
    "compose": (
        "compose_priors",
        [PICTURE, PICTURE, PICTURE, GRAY],
        PICTURE,
        {**SCALES, "form": "paper"},
    ),
    "attention": ("criss_cross_attention", [FEATURES, FEATURES, PICTURE], PICTURE, {}),
    "blur": ("circular_convolution", [GRAY, (3, 5)], GRAY, {}),
    "deblur": ("wiener_deconvolution", [GRAY, (3, 5)], GRAY, {"regularisation": 0.01}),
}


def program(op, inputs, output, attrs, channels="luma"):
    values = {"a": GRAY, "b": GRAY, "y": output}
    names = [f"x{i}" for i in range(len(inputs))]
    values |= dict(zip(names, inputs, strict=True))
    constants = {
        n: np.zeros([d if isinstance(d, int) else 8 for d in s], np.float32)
        for n, s in zip(names, inputs, strict=True)
    }
    return Program(
        "test", channels, 8, ("a", "b"), "y",
        {n: Value(n, s) for n, s in values.items()}, constants,
        (Node("op", op, tuple(names), ("y",), attrs),),
    )  # fmt: skip


def recorded(name, size=SIZE):
    """The call of a case's op, the launches it was made of."""
    call, _, made = next(iter(recording.record(program(*CASES[name]), size, 87)))
    return call, made


def resolved(shape, size=SIZE):
    return [size["HW".index(d)] if isinstance(d, str) else d for d in shape]


def execute(module_and_kernel, grid, words, constants, sizes):
    """Run one recorded launch in Triton's interpreter; called in the interpreter's process.

    Arrays come as bytes and go back as bytes, so that nothing but the recorded launch says what
    they are.
    """
    import importlib

    import torch

    kinds = {"*fp32": torch.float32, "*u8": torch.uint8, "*u16": torch.uint16}
    module, name = module_and_kernel
    kernel = getattr(importlib.import_module(module), name)
    given = {}
    for parameter, (kind, value) in words.items():
        given[parameter] = sizes[value].view(kinds[kind]) if kind.startswith("*") else value
    kernel.jit[tuple(grid)](**given, **constants)
    return sizes


def run(interpreted, call, made, arrays, numbers=None):
    """What a call computes: bytes of arrays by name, scratch memory and tables added."""
    memory = {n: torch.from_numpy(a.reshape(-1).view(np.uint8).copy()) for n, a in arrays.items()}
    for i, count in enumerate(call.scratch):
        memory[f"scratch{i}"] = torch.full((count,), 0x7F, dtype=torch.uint8)
    for i, table in enumerate(call.tables):
        memory[f"table{i}"] = torch.from_numpy(table.copy().view(np.uint8))
    for launch, planned in zip(call.launches, made, strict=False):
        words = {}
        for name, argument in launch.arguments:
            if isinstance(argument, Array):
                words[name] = (argument.type, argument.name)
            elif isinstance(argument, Number):
                words[name] = ("fp32", numbers[argument.name])
            else:
                words[name] = ("number", argument)
        where = planned.kernel.function.__module__, launch.kernel
        memory = interpreted(
            "tests.kernels.test_recording:execute",
            where,
            launch.grid,
            words,
            dict(launch.constants),
            memory,
        )
    return memory["out"].numpy().view(np.float32)


class TestComputes:
    """The recorded data alone, run by Triton's interpreter, against the run side's CPU ops."""

    @pytest.mark.parametrize("size", [(24, 32), (23, 19)])
    @pytest.mark.parametrize("name", CASES)
    def test_ops(self, interpreted, name, size):
        op, shapes, output, attrs = CASES[name]
        rng = np.random.default_rng(0)
        # The program's sizes are multiples of 8; launches are planned for any.
        node = program(*CASES[name]).nodes[0]
        inputs = [rng.random(resolved(s, size), np.float32) for s in shapes]
        expected = np.full(resolved(output, size), np.nan, np.float32)
        ops.bind(op, inputs, expected, attrs)()
        tensors = {f"in{i}": torch.empty(x.shape) for i, x in enumerate(inputs)}
        tensors["out"] = torch.empty(expected.shape)
        made = recording._PLANNERS[op](node, tensors, 87)
        call = recording._recorded("[]", 87, made, tensors)
        arrays = {f"in{i}": x for i, x in enumerate(inputs)}
        arrays["out"] = np.full_like(expected, np.nan)
        if op in ("circular_convolution", "wiener_deconvolution"):
            spectrum = ops.filter_spectrum(op, inputs[1], size, attrs)
            arrays = {**arrays, "spectrum": spectrum.astype(np.complex64)}
        found = run(interpreted, call, made, arrays).reshape(expected.shape)
        # Float32 sums of at most a few hundred terms of about 1, gains up to 5.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("typestr", ["|u1", "<u2", "<f4"])
    def test_frames_in_and_out(self, interpreted, typestr):
        from fuseengine.runtime.frames import FrameAdapter

        size, given = (22, 30), program(*CASES["ddim"])
        adapter = FrameAdapter(size, "luma", 8)
        rng = np.random.default_rng(0)
        planes_key = (1, 1, *adapter.padded)
        found = {call.key: (call, made) for call, _, made in recording.record(given, size, 87)}
        for shape in ((*size, 3), size):
            key = launches.frame_key("frame_in", typestr, shape, planes_key, "luma")
            if key not in found:
                assert (typestr, len(shape)) == ("<u2", 3)  # no colour camera of 16 bits
                continue
            full = {"|u1": 255, "<u2": 65535, "<f4": 1}[typestr]
            frame = (rng.random(shape) * full).astype(typestr)
            expected = [np.empty(planes_key, np.float32) for _ in range(2)]
            adapter.load(frame, frame, *expected)
            call, made = found[key]
            arrays = {"in0": frame, "out": np.full_like(expected[0], np.nan)}
            numbers = {"low": 0.0, "scale": 1.0 / full}
            planes = run(interpreted, call, made, arrays, numbers).reshape(planes_key)
            np.testing.assert_allclose(planes, expected[0], rtol=0, atol=1e-6)

            call, made = found[launches.frame_key("frame_out", typestr, shape, planes_key, "luma")]
            fused = 1.0 - planes
            stored = adapter.store(fused, frame)
            arrays = {"in0": fused, "in1": frame, "out": np.full_like(frame, 42)}
            back = run(interpreted, call, made, arrays).view(np.uint8).view(typestr)
            difference = np.abs(back.reshape(shape).astype(float) - stored.astype(float))
            # A value on the edge between two counts may fall to either side.
            assert difference.max() <= (1e-6 if typestr == "<f4" else 1)
            assert (difference > 1e-6).mean() < 0.01


class TestRecord:
    @pytest.mark.parametrize("name", CASES)
    def test_numbers_survive_being_written(self, tmp_path, name):
        call, _ = recorded(name)
        Launches([call]).write(tmp_path)
        (again,) = Launches.load(tmp_path).calls.values()
        assert again.launches == call.launches
        assert (again.key, again.capability, again.scratch) == (
            call.key, call.capability, call.scratch,
        )  # fmt: skip
        for mine, theirs in zip(call.tables, again.tables, strict=True):
            np.testing.assert_array_equal(mine, theirs)

    def test_the_key_is_what_the_run_side_makes(self):
        call, _ = recorded("joint")
        op, shapes, output, attrs = CASES["joint"]
        assert call.key == key_of(op, map(resolved, shapes), resolved(output), attrs)

    def test_the_variant_is_what_would_be_compiled(self):
        """Addresses and numbers filled in on the run side ask for the same code."""
        from fuseengine.runtime.cubins import Pointer, variant_of

        for name in CASES:
            call, made = recorded(name)
            for launch, planned in zip(call.launches, made, strict=True):
                values = {
                    n: Pointer(1 << 20, a.type) if isinstance(a, Array) else a
                    for n, a in launch.arguments
                }
                variant = variant_of(
                    launch.kernel, values, launch.constants, launch.multiples, launch.options
                )
                assert variant == planned.variant(), (name, launch.label)

    def test_equal_calls_are_recorded_once(self):
        one = program(*CASES["ddim"])
        node = one.nodes[0]
        twice = one.with_nodes([node, Node("op", "ddim_step", node.inputs, ("z",), node.attrs)])
        twice = Program(**{**vars(twice), "values": {**twice.values, "z": Value("z", PICTURE)}})
        ops_of = [op for _, op, _ in recording.record(twice, SIZE, 87)]
        assert ops_of.count("ddim_step") == 1

    def test_cufft_where_the_tuning_table_says_so(self, monkeypatch):
        chosen = {**recording._tuning.choose("wiener_filter", torch.float32, 87, 768)}
        monkeypatch.setattr(
            recording._tuning, "choose", lambda *_: {**chosen, "method": "cufft", "rows": 256,
                                                     "columns": 8, "num_warps": 4},
        )  # fmt: skip
        ops_of = {op for _, op, _ in recording.record(program(*CASES["blur"]), SIZE, 87)}
        assert ops_of == {"frame_in", "frame_out"}

    def test_a_capability_without_kernels(self, tmp_path):
        with pytest.raises(SettingError, match="from 80"):
            recording.write(program(*CASES["ddim"]), SIZE, tmp_path, (75,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Compiled for two GPUs and for any later one."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "FRAMES", ((torch.uint8, 3),))
        return recording.write(program(*CASES["ddim"]), SIZE, folder, (87, 90))


class TestWrite:
    def test_every_launch_finds_its_code(self, folder):
        from fuseengine.runtime.cubins import Store

        store, found = Store.load(folder), Launches.load(folder)
        assert {c for _, c in found.calls} == {80, 87, 90}
        for (_, capability), call in found.calls.items():
            for launch, at in itertools.product(call.launches, (1 << 20, (1 << 20) + 4)):
                names = {a.name for _, a in launch.arguments if isinstance(a, Array)}
                numbers = {a.name: 0.5 for _, a in launch.arguments if isinstance(a, Number)}
                if at % 16 and not launch.kernel.startswith("frame_"):
                    continue  # buffers of ours lie on 16 bytes, frames are whoever's
                bound = BoundLaunch(launch, store, 89 if capability == 80 else capability, {})
                entry, values = bound.prepare(dict.fromkeys(names, at), numbers)
                assert (entry.capability, entry.form == "ptx") == (capability, capability == 80)
                assert [name for name, _ in entry.parameters] == [n for n, _ in launch.arguments]
                assert len(values) == len(entry.parameters)

    def test_the_run_side_reads_it_without_torch(self, folder):
        from tests.helpers import BLOCK_TORCH, run_python

        script = (
            f"{BLOCK_TORCH}from fuseengine.runtime.launches import Launches\n"
            f"print(len(Launches.load({str(folder)!r}).calls))"
        )
        assert int(run_python(script)) == len(Launches.load(folder).calls)

    def test_code_that_is_not_there(self, folder):
        from fuseengine.runtime.cubins import Store

        call, _ = recorded("joint")
        names = {a.name for _, a in call.launches[0].arguments if isinstance(a, Array)}
        with pytest.raises(BackendUnavailableError, match="joint_ddim_step_kernel"):
            BoundLaunch(call.launches[0], Store.load(folder), 87, dict.fromkeys(names, 1 << 20))


class TestDamage:
    @pytest.fixture
    def file(self, tmp_path):
        call, _ = recorded("blur")
        return Launches([call]).write(tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(KernelStoreError, match="cannot be read"):
            Launches.load(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 2}', '{"schema": 1}'])
    def test_not_such_a_file(self, file, text):
        file.write_text(text)
        with pytest.raises(KernelStoreError):
            Launches.load(file.parent)

    def test_a_changed_byte(self, file):
        file.write_text(file.read_text().replace('"capability": 87', '"capability": 86'))
        with pytest.raises(KernelStoreError, match="hash differs"):
            Launches.load(file.parent)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (["launches", 0, "grid"], [0]),
            (["launches", 0, "grid"], [1, 1, 1, 1]),
            (["launches", 0, "arguments"], [["x", {"array": "elsewhere", "type": "*fp32"}]]),
            (["launches", 0, "arguments"], [["x", {"array": "scratch7", "type": "*fp32"}]]),
            (["launches", 0, "arguments"], [["x", "text"]]),
            (["launches", 0, "arguments"], [["x"]]),
            (["launches", 0, "constants"], []),
            (["launches", 0, "kernel"], 3),
            (["scratch"], [-1]),
            (["scratch"], [1 << 50]),
            (["tables"], ["%%"]),
            (["key"], "no json"),
            (["capability"], "87"),
        ],
    )
    def test_values_that_cannot_be(self, file, path, value):
        """With a hash that fits: a file that somebody wrote on purpose."""
        import json

        data = json.loads(file.read_text())
        place = data["calls"][0]
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        data["sha256"] = launches._hash(data["calls"])
        file.write_text(json.dumps(data))
        with pytest.raises(KernelStoreError, match="damaged"):
            Launches.load(file.parent)
