"""Named float32 arrays as a safetensors file, without a library.

The format (huggingface/safetensors, version 0.x): 8 bytes little-endian, the header's length; the
header, JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}; the arrays' bytes, C order,
little-endian. The run side needs constants only: float32, small. So it reads and writes this part
of the format itself, rather than depend on one more wheel of machine code on every device.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import BundleError

_LENGTH = struct.Struct("<Q")
_MOST_DIMENSIONS = 16


def pack(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    """Arrays as a safetensors file; the same arrays in the same order give the same bytes.

    Raises:
        BundleError: an array that is not float32.
    """
    header: dict[str, Any] = {}
    place = 0
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise BundleError(f"constant {name!r} is {array.dtype}; expected float32")
        end = place + array.nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format allows it; the data lie on 8 bytes
    data = [np.ascontiguousarray(array, "<f4").tobytes() for array in arrays.values()]
    return b"".join([_LENGTH.pack(len(text)), text, *data])


def unpack(content: bytes) -> dict[str, NDArray[np.float32]]:
    """The inverse of :func:`pack`; the arrays are read-only views of the content.

    Raises:
        BundleError: no such file, other dtypes, or places that do not cover the data once.
    """
    if len(content) < _LENGTH.size:
        raise BundleError(f"constants of {len(content)} bytes; expected a safetensors file")
    (length,) = _LENGTH.unpack_from(content)
    begin = _LENGTH.size + length
    if begin > len(content):
        raise BundleError(
            f"constants: a header of {length} bytes in a file of {len(content)}; expected less"
        )
    try:
        header = json.loads(content[_LENGTH.size : begin])
    except (ValueError, RecursionError) as error:
        raise BundleError(f"constants: the header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise BundleError(f"constants: the header is a {type(header).__name__}; expected an object")
    header.pop("__metadata__", None)
    arrays, place = {}, begin
    for name, entry in header.items():
        shape, size = _described(name, entry, place - begin)
        if place + size > len(content):
            raise BundleError(f"constant {name!r} ends beyond the file; expected {size} bytes")
        data = np.frombuffer(content, "<f4", size // 4, place)
        arrays[name] = data.reshape(shape)
        place += size
    if place != len(content):
        raise BundleError(f"constants: {len(content) - place} bytes that no array describes")
    return arrays


def _described(name: str, entry: Any, place: int) -> tuple[tuple[int, ...], int]:
    """Shape and bytes of an array that has to begin at a place of the data."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise BundleError(
            f"constant {name!r} is {str(entry)[:80]}; expected dtype, shape and data_offsets"
        ) from error
    if dtype != "F32" or not whole or len(shape) > _MOST_DIMENSIONS:
        raise BundleError(f"constant {name!r} is {dtype} {str(shape)[:80]}; expected F32 numbers")
    size = 4 * math.prod(shape)
    if begin != place or end - begin != size:
        raise BundleError(
            f"constant {name!r} lies at {begin}..{end}; expected {size} bytes at {place}"
        )
    return tuple(shape), size
