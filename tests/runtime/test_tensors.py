"""Constants as safetensors: against the public library, and what is refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from safetensors import numpy as library

from fuseengine.errors import BundleError
from fuseengine.runtime import tensors

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.float32(2.5).reshape(()),
    "none": np.zeros((0, 4), np.float32),
    "odd name é": np.ones((1, 1, 3), np.float32)[..., ::2],
}


def same(have, want):
    assert have.keys() == want.keys()
    for name in want:
        assert have[name].dtype == np.float32 and have[name].shape == want[name].shape
        np.testing.assert_array_equal(have[name], want[name])


def test_round_trip():
    same(tensors.unpack(tensors.pack(ARRAYS)), ARRAYS)
    assert tensors.unpack(tensors.pack({})) == {}


def test_the_library_reads_ours_and_we_read_its():
    same(library.load(tensors.pack(ARRAYS)), ARRAYS)
    plain = {name: np.array(array) for name, array in ARRAYS.items()}
    same(tensors.unpack(library.save(plain, {"made": "elsewhere"})), ARRAYS)


def test_other_types_are_refused():
    with pytest.raises(BundleError, match="'x' is float64; expected float32"):
        tensors.pack({"x": np.zeros(2)})
    with pytest.raises(BundleError, match="is F64"):
        tensors.unpack(library.save({"x": np.zeros(2)}))


def made(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63),
        made(b"{"),
        made(b"[]"),
        made(b"[" * 100_000),
        made({"x": 3}),
        made({"x": {}}),
        made({"x": entry([2], 0, 8)}),
        made({"x": entry([2], 0, 8)}, bytes(7)),
        made({"x": entry([2], 0, 8)}, bytes(9)),
        made({"x": entry([2], 4, 12)}, bytes(12)),
        made({"x": entry([2], 0, 12)}, bytes(12)),
        made({"x": entry([-1], 0, 4)}, bytes(4)),
        made({"x": entry([True], 0, 4)}, bytes(4)),
        made({"x": entry([1.0], 0, 4)}, bytes(4)),
        made({"x": entry("1", 0, 4)}, bytes(4)),
        made({"x": entry([2**62, 4], 0, 0)}),
        made({"x": entry([1] * 17, 0, 4)}, bytes(4)),
        made({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, bytes(4)),
    ],
)
def test_malformed(content):
    with pytest.raises(BundleError, match="constant"):
        tensors.unpack(content)
