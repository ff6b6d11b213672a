"""What every error promises."""

from __future__ import annotations

import inspect
import pickle

import pytest

import fuseengine as fe
from fuseengine import errors

CLASSES = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_one_base_and_a_docstring(cls):
    assert issubclass(cls, fe.FuseEngineError)
    assert cls.__doc__ and cls.__doc__.strip().endswith(".")


def test_python_s_own_kinds():
    """Who catches ValueError for bad values and LookupError for bad names is served too."""
    assert issubclass(errors.FrameError, ValueError)
    assert issubclass(errors.SizeMismatchError, errors.FrameError)
    assert issubclass(errors.SettingError, ValueError)
    assert issubclass(errors.UnknownNameError, LookupError)


class TestUnknownName:
    def test_message(self):
        error = errors.UnknownNameError("backend", "openvin", ["torch", "openvino"])
        assert str(error) == (
            "unknown backend 'openvin'; expected one of: openvino, torch. Did you mean 'openvino'?"
        )
        assert (error.kind, error.given, error.known) == (
            "backend",
            "openvin",
            ["openvino", "torch"],
        )

    def test_nothing_close(self):
        message = str(errors.UnknownNameError("model", "xyz", {"drfusion": 1}))
        assert message == "unknown model 'xyz'; expected one of: drfusion."

    @pytest.mark.parametrize("given", [None, 3, ("a",)])
    def test_no_text(self, given):
        assert repr(given) in str(errors.UnknownNameError("model", given, ["drfusion"]))


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not errors.UnknownNameError])
def test_survives_a_process_boundary(cls):
    again = pickle.loads(pickle.dumps(cls("given, expected, remedy")))
    assert type(again) is cls and str(again) == "given, expected, remedy"
