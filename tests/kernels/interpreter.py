"""Runs functions with Triton's interpreter: requests on standard input, replies on output, pickled.

Started by the fixture ``interpreted`` as ``python -m tests.kernels.interpreter``.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import sys
import traceback


def pack(value):
    """Bytes of a message; pickle alone cannot read uint16 tensors back."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack(data):
    """The inverse of :func:`pack`."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def _multiply_bfloat16():
    """The interpreter keeps bfloat16 as uint16 and would multiply the bit patterns."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _serve():
    # Replies go where standard output was; what libraries print goes to standard error.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import numpy as np
    import torch

    np.seterr(all="ignore")
    # Fresh memory is NaN: an element that no program writes shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _multiply_bfloat16()
    while True:
        try:
            function, arguments, options = unpack(pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        module, _, name = function.partition(":")
        try:
            reply = True, getattr(importlib.import_module(module), name)(*arguments, **options)
        except Exception as error:
            reply = False, "".join(traceback.format_exception(error))
        pickle.dump(pack(reply), replies)
        replies.flush()


if __name__ == "__main__":
    _serve()
