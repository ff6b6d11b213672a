"""The executor: buffers, order, reuse of memory, timing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fuseengine.backends.cuda_device import TorchDevice
from fuseengine.engine import build_executor
from fuseengine.errors import CaptureError
from fuseengine.program import Node, Program, StageVariant, Value
from fuseengine.runtime import random
from fuseengine.runtime.executor import CpuDevice, Executor
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture
from tests.helpers import picture_pair, tiny


def program_of(nodes, shapes=None, constants=None, output="out"):
    """A program over pictures named by its nodes; every value is a full picture by default."""
    names = {"a", "b", *(constants or {})}
    for node in nodes:
        names.update(node.inputs, node.made())
    shapes = shapes or {}
    values = {n: Value(n, shapes.get(n, (1, 1, "H", "W"))) for n in names}
    program = Program("toy", "luma", 1, ("a", "b"), output, values, constants or {}, tuple(nodes))
    program.check()
    return program


def op(target, inputs, output, **attrs):
    return Node("op", target, tuple(inputs.split()), (output,), attrs)


def run(program, a, b, runners=None, device=None):
    executor = Executor(program, a.shape[2:], runners or {}, device)
    executor.inputs[0][...] = a
    executor.inputs[1][...] = b
    executor.run()
    return executor


A = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
B = np.full((1, 1, 3, 4), 2.0, np.float32)


class Doubler:
    """A stage runner that writes twice and four times its input."""

    def __init__(self, use=(0, 1)):
        self.use, self.bound = use, 0

    def bind(self, inputs, outputs):
        self.bound += 1
        assert len(outputs) == len(self.use)

        def call():
            for index, output in zip(self.use, outputs, strict=True):
                np.multiply(inputs[0], 2.0 * (index + 1), out=output)

        return call


class TestMemory:
    def test_sources_survive_a_run(self):
        """Inputs are never overwritten: a second run without filling them gives the same."""
        program = program_of([op("mul", "a", "x", scalar=2.0), op("add", "x b", "out")])
        executor = run(program, A, B)
        first = executor.output.copy()
        executor.run()
        np.testing.assert_array_equal(executor.output, first)
        np.testing.assert_array_equal(first, A * 2 + B)

    def test_a_value_read_later_is_not_overwritten(self):
        nodes = [
            op("mul", "a", "x", scalar=2.0),
            op("add", "x b", "y"),
            op("mul", "y", "z", scalar=3.0),
            op("sub", "z x", "out"),
        ]
        np.testing.assert_array_equal(run(program_of(nodes), A, B).output, (A * 2 + B) * 3 - A * 2)

    def test_the_same_value_twice(self):
        nodes = [op("mul", "a", "x", scalar=2.0), op("mul", "x x", "y"), op("add", "y y", "out")]
        np.testing.assert_array_equal(run(program_of(nodes), A, B).output, 8 * A * A)

    def test_constants_survive_a_run(self):
        c = np.full((1, 1, 3, 4), 5.0, np.float32)
        nodes = [op("add", "c a", "x"), op("add", "x c", "out")]
        program = program_of(nodes, shapes={"c": (1, 1, 3, 4)}, constants={"c": c})
        executor = run(program, A, B)
        executor.run()
        np.testing.assert_array_equal(executor.output, A + 10)
        np.testing.assert_array_equal(c, 5.0)

    def test_what_is_made_at_binding_survives_a_run(self):
        """Random numbers and fills are constants of the size: no op may write over them."""
        nodes = [
            op("standard_normal", "", "z", seed=5),
            op("full", "", "c", value=3.0),
            op("add", "z a", "x"),
            op("mul", "c x", "y"),
            op("add", "y z", "out"),
        ]
        executor = run(program_of(nodes), A, B)
        z = random.normal((1, 1, 3, 4), seed=5)
        for _ in range(2):
            np.testing.assert_allclose(executor.output, 3 * (z + A) + z, rtol=1e-6)
            executor.run()
        assert [t.label for t in executor.profile(1)] == ["add", "mul", "add"]

    def test_output_that_is_made_at_binding(self):
        executor = run(program_of([op("full", "", "out", value=0.5)]), A, B)
        assert (executor.output == 0.5).all() and executor.output.shape == A.shape

    def test_broadcast_result_does_not_take_the_smaller_buffer(self):
        shapes = {"x": (1, 2, "H", "W"), "y": (1, 1, "H", "W"), "out": (1, 2, "H", "W")}
        nodes = [
            op("concat", "a b", "x", axis=1),
            op("mul", "a", "y", scalar=2.0),
            op("add", "y x", "out"),
        ]
        expected = A * 2 + np.concatenate([A, B], axis=1)
        np.testing.assert_array_equal(run(program_of(nodes, shapes), A, B).output, expected)

    def test_long_chains_need_few_buffers(self):
        nodes = [op("add", "a b", "v0")]
        nodes += [op("mul", f"v{i}", f"v{i + 1}", scalar=1.5) for i in range(20)]
        nodes += [op("clamp", "v20", "out", min=0.0, max=100.0)]
        program = program_of(nodes)
        executor = run(program, A, B)
        np.testing.assert_allclose(executor.output, np.clip((A + B) * 1.5**20, 0, 100), rtol=1e-6)
        picture = A.nbytes + 64  # each buffer is over-allocated by its alignment
        assert executor.buffer_bytes <= 4 * picture

    def test_stage_outputs_never_share_its_inputs(self):
        stage = Node("stage", "net", ("x",), ("y", "z"))
        nodes = [op("add", "a b", "x"), stage, op("sub", "z y", "out")]
        program = program_of(nodes)
        runner = Doubler()
        executor = run(program, A, B, {StageVariant("net", (0, 1)): runner})
        np.testing.assert_array_equal(executor.output, 2 * (A + B))
        assert runner.bound == 1

    def test_unused_result_of_a_stage(self):
        stage = Node("stage", "net", ("a",), (None, "out"))
        executor = run(program_of([stage]), A, B, {StageVariant("net", (1,)): Doubler((1,))})
        np.testing.assert_array_equal(executor.output, 4 * A)

    def test_a_result_nobody_reads(self):
        """Without the prune pass such calls stay; their memory may be reused, not the others'."""
        nodes = [
            op("mul", "a", "x", scalar=2.0),
            op("mul", "b", "unread", scalar=9.0),
            op("add", "x b", "y"),
            op("add", "y x", "out"),
        ]
        np.testing.assert_array_equal(run(program_of(nodes), A, B).output, A * 4 + B)

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 2), (0, 4), ()])
    def test_buffers_are_aligned(self, shape):
        array = CpuDevice().empty(shape)
        assert array.shape == shape and array.dtype == np.float32
        assert array.ctypes.data % 64 == 0 or array.size == 0
        assert array.flags.c_contiguous and array.flags.writeable

    def test_output_is_an_input(self):
        executor = run(program_of([], output="a"), A, B)
        np.testing.assert_array_equal(executor.output, A)


class TestFrame:
    """Frames that cover a part of the buffers: the rest is padding."""

    def executor(self, frame):
        nodes = [op("sub", "a b", "x"), op("stretch", "x", "out", per="channel")]
        a = A.copy()
        a[:, :, 2:] = 99.0  # padding that must not be seen
        a[:, :, :, 3:] = -99.0
        executor = Executor(program_of(nodes), (3, 4), {}, frame=frame)
        executor.inputs[0][...], executor.inputs[1][...] = a, B
        return executor

    def test_statistics_are_of_the_frame(self):
        executor = self.executor((2, 3))
        for _ in range(2):
            executor.run()
            seen = executor.output[0, 0, :2, :3]
            np.testing.assert_allclose(seen, A[0, 0, :2, :3] / 6, rtol=1e-6)

    def test_whole_by_default(self):
        executor = self.executor(None)
        executor.run()
        assert executor.frame == (3, 4)
        assert executor.output.min() == 0 and executor.output.max() == 1

    def test_of_frame(self):
        executor = self.executor((2, 3))
        assert executor.of_frame((2, 3)) is executor
        other = executor.of_frame((2, 4))
        assert other.frame == (2, 4) and other.runners == executor.runners
        assert other.inputs[0] is not executor.inputs[0]
        plain = Executor(program_of([op("add", "a b", "out")]), (3, 4), {})
        assert plain.of_frame((2, 2)) is plain  # nothing in it looks at the whole picture

    def test_torch_device(self):
        nodes = [op("stretch", "a", "out", per="picture")]
        executor = Executor(program_of(nodes), (3, 4), {}, TorchDevice("cpu"), (3, 2))
        executor.inputs[0][...] = torch.from_numpy(A)
        executor.run()
        np.testing.assert_allclose(executor.output[0, 0, :, :2], A[0, 0, :, :2] / 9, rtol=1e-6)


class TestRun:
    def test_size_that_does_not_fit(self):
        shapes = {"x": (1, 1, "H/2", "W/2")}
        nodes = [op("block_mean", "a", "x", scale=2), op("block_repeat", "x", "out", scale=2)]
        program = program_of(nodes, shapes)
        assert Executor(program, (4, 6), {}).output.shape == (1, 1, 4, 6)
        with pytest.raises(CaptureError, match="H/2 is not whole for 3x4"):
            Executor(program, (3, 4), {})

    def test_unknown_op(self):
        with pytest.raises(CaptureError, match="'sharpen' is unknown"):
            Executor(program_of([op("sharpen", "a", "out")]), (3, 4), {})

    def test_profile(self):
        nodes = [
            op("add", "a b", "x"),
            Node("stage", "net", ("x",), ("y", "z")),
            op("sub", "z y", "out"),
        ]
        variant = StageVariant("net", (0, 1))
        executor = run(program_of(nodes), A, B, {variant: Doubler()})
        timings = executor.profile(7)
        assert [t.label for t in timings] == ["add", "net-0-1", "sub"]
        assert [t.variant for t in timings] == [None, variant, None]
        assert all(t.samples.shape == (7,) and (t.samples > 0).all() for t in timings)

    @pytest.mark.parametrize("settings", [{}, {"steps": 1}, {"correct_last": True}])
    def test_torch_device_gives_the_same_picture(self, settings):
        """What a GPU runs, but for the graph: torch tensors as buffers."""
        model, pair = tiny(**settings), picture_pair((16, 24))
        program = capture(model)
        choice = dict.fromkeys(program.variants(), ("torch", "fp32"))
        source = ModelStages(model, program)
        executor = build_executor(program, source, choice, (16, 24), "cpu", 1)
        other = Executor(program, (16, 24), executor.runners, TorchDevice("cpu"))
        for target, device in ((executor, executor.device), (other, other.device)):
            for buffer, picture in zip(target.inputs, pair, strict=True):
                buffer[...] = device.constant(picture.numpy())
            target.run()
        assert isinstance(other.output, torch.Tensor)
        np.testing.assert_allclose(other.output.numpy(), executor.output, rtol=0, atol=2e-6)
        host = other.device.staging([other.output])
        assert host[0].shape == other.output.shape
        assert other.device.staging([other.output])[0] is host[0]  # made once

    def test_programs_are_not_changed(self):
        program = program_of([op("add", "a b", "out")])
        before = dataclasses.asdict(program)
        run(program, A, B)
        assert dataclasses.asdict(program) == before
