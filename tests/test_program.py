"""Programs as data: printing, JSON, symbolic shapes, checks."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine.errors import CaptureError
from fuseengine.program import Node, Program, StageVariant, Value, resolve, symbolic
from tests.helpers import BLOCK_TORCH, run_python


def make(**changes):
    """out = clamp(0.5 * unet(concat(a, b), shift)[0]), with an unused second result."""
    full, double = (1, 1, "H", "W"), (1, 2, "H", "W")
    shapes = {"a": full, "b": full, "shift": (1, 4), "x": double, "y": full, "z": full, "out": full}
    parts = {
        "model": "toy",
        "channels": "luma",
        "multiple": 4,
        "inputs": ("a", "b"),
        "output": "out",
        "values": {name: Value(name, shape) for name, shape in shapes.items()},
        "constants": {"shift": np.arange(4, dtype=np.float32)[None]},
        "nodes": (
            Node("op", "concat", ("a", "b"), ("x",), {"axis": 1}),
            Node("stage", "unet", ("x", "shift"), ("y", None)),
            Node("op", "mul", ("y",), ("z",), {"scalar": 0.123456789}),
            Node("op", "clamp", ("z",), ("out",), {"min": 0.0, "max": 1.0}),
        ),
    }
    return Program(**{**parts, **changes})


class TestText:
    def test_prints_one_line_per_call(self):
        assert str(make()).splitlines() == [
            "program toy(a: f32[1, 1, H, W], b: f32[1, 1, H, W]):",
            "    const shift: f32[1, 4]",
            "    x: f32[1, 2, H, W] = concat(a, b, axis=1)",
            "    y: f32[1, 1, H, W], _ = stage unet(x, shift)",
            "    z: f32[1, 1, H, W] = mul(y, scalar=0.123457)",
            "    out: f32[1, 1, H, W] = clamp(z, min=0, max=1)",
            "    return out",
        ]

    def test_round_trip(self):
        program = make()
        again = Program.from_json(program.to_json(), program.constants)
        assert str(again) == str(program)
        # Attributes keep all digits, tuples stay tuples, and what is unused stays unused.
        assert again.nodes == program.nodes
        assert again.values == program.values
        assert (again.inputs, again.output, again.multiple) == (("a", "b"), "out", 4)
        assert again.to_json() == program.to_json()

    def test_text_is_plain_json_without_the_arrays(self):
        data = json.loads(make().to_json())
        assert data["schema"] == 1
        assert data["constants"] == ["shift"]

    def test_padding(self):
        program = dataclasses.replace(make(), padding="white")
        assert Program.from_json(program.to_json(), program.constants).padding == "white"
        older = json.loads(program.to_json())
        del older["padding"]
        assert Program.from_json(json.dumps(older), program.constants).padding == "reflect"

    def test_no_torch(self):
        run_python(BLOCK_TORCH + "import fuseengine.program, fuseengine.runtime.executor")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": 2}, "schema 2; expected 1"),
            ({"nodes": None}, "not a program"),
            ({"values": {"a": 3}}, "not a program"),
            ({"output": "lost"}, "'lost' is never made"),
            ({"constants": ["shift", "more"]}, r"\['more'\] of the program are missing"),
        ],
    )
    def test_bad_text(self, change, message):
        data = {**json.loads(make().to_json()), **change}
        with pytest.raises(CaptureError, match=message):
            Program.from_json(json.dumps(data), make().constants)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"schema": 1}'])
    def test_no_program(self, text):
        with pytest.raises(CaptureError):
            Program.from_json(text, {})

    @pytest.mark.parametrize("key", ["model", "channels", "inputs", "values", "nodes", "schema"])
    def test_missing_entry(self, key):
        data = json.loads(make().to_json())
        del data[key]
        with pytest.raises(CaptureError, match=key):
            Program.from_json(json.dumps(data), make().constants)


class TestCheck:
    def test_good(self):
        make().check()

    @pytest.mark.parametrize(
        ("nodes", "message"),
        [
            (lambda n: n[1:], "uses 'x' before it is made"),
            (lambda n: (n[1], n[0], *n[2:]), "uses 'x' before it is made"),
            (lambda n: (n[0], *n), "makes 'x' twice"),
            (lambda n: (dataclasses.replace(n[0], outputs=("a",)), *n[1:]), "makes 'a' twice"),
            (lambda n: (dataclasses.replace(n[0], outputs=("new",)), *n), "without a shape"),
            (lambda n: n[:-1], "'out' is never made"),
            (lambda n: (), "'out' is never made"),
        ],
    )
    def test_bad(self, nodes, message):
        with pytest.raises(CaptureError, match=message):
            make(nodes=nodes(make().nodes)).check()


class TestQueries:
    def test_variants_are_told_apart_by_the_used_results(self):
        program = make()
        second = Node("stage", "unet", ("x", "shift"), ("p", "q"))
        third = Node("stage", "unet", ("x", "shift"), ("r", None))
        program = dataclasses.replace(program, nodes=(*program.nodes, second, third))
        variants = program.variants()
        assert [(v.stage, v.use) for v in variants] == [("unet", (0,)), ("unet", (0, 1))]
        assert [len(calls) for calls in variants.values()] == [2, 1]
        assert [v.label for v in variants] == ["unet-0", "unet-0-1"]
        assert StageVariant("", (0,)).label == "model-0"
        assert program.stage_calls()[1] is second

    def test_with_nodes_drops_what_is_not_mentioned(self):
        program = make()
        nodes = [Node("op", "clamp", ("a",), ("out",), {"min": 0.0, "max": 1.0})]
        less = program.with_nodes(nodes)
        assert set(less.values) == {"a", "b", "out"} and less.constants == {}
        less.check()
        assert set(program.values) == {"a", "b", "shift", "x", "y", "z", "out"}  # not in place


SIZES = ((32, 48), (48, 80))


def shape_of(dims, size):
    return tuple(f(*size) for f in dims)


class TestShapes:
    @pytest.mark.parametrize(
        ("dims", "expected"),
        [
            ((lambda h, w: 1, lambda h, w: 3, lambda h, w: h, lambda h, w: w), (1, 3, "H", "W")),
            ((lambda h, w: h // 8, lambda h, w: w // 16), ("H/8", "W/16")),
            ((lambda h, w: h * w, lambda h, w: h * w // 64), ("H*W", "H*W/64")),
            ((lambda h, w: 3 * h, lambda h, w: 3 * w // 8), ("3 H", "3 W/8")),
            ((lambda h, w: w, lambda h, w: h), ("W", "H")),
            ((), ()),
        ],
    )
    def test_symbolic_and_back(self, dims, expected):
        shape = symbolic(shape_of(dims, SIZES[0]), shape_of(dims, SIZES[1]), SIZES)
        assert shape == expected
        for size in (*SIZES, (480, 640), (16, 16)):
            assert resolve(shape, size) == shape_of(dims, size)

    @given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["H", "W", "H*W"]))
    def test_any_ratio(self, numerator, denominator, symbol):
        sizes = tuple((h * 27720, w * 27720) for h, w in ((2, 3), (3, 5)))  # lcm of 1..12
        values = [
            {"H": h, "W": w, "H*W": h * w}[symbol] * numerator // denominator for h, w in sizes
        ]
        shape = symbolic((values[0],), (values[1],), sizes)
        assert resolve(shape, sizes[0]) == (values[0],)
        assert resolve(shape, sizes[1]) == (values[1],)

    def test_neither_fixed_nor_a_ratio(self):
        with pytest.raises(CaptureError, match=r"40 at \(32, 48\) and 56 at \(48, 80\)"):
            symbolic((32 + 8,), (48 + 8,), SIZES)

    def test_not_whole(self):
        with pytest.raises(CaptureError, match="H/8 is not whole for 36x48"):
            resolve(("H/8",), (36, 48))
