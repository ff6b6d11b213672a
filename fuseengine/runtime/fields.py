"""Checks that data read from JSON has the form that it should; an error names the field."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from fuseengine.errors import BundleError

_SHOWN = 60
"""Characters of a wrong value that an error shows."""


class Map(NamedTuple):
    """An object with any keys, whose values are alike."""

    values: Any


class OneOf(NamedTuple):
    """A value that takes one of several forms; None stands for null."""

    forms: tuple[Any, ...]


Form = Any
"""``str``, ``int``, ``float``, ``bool``; ``[form]`` a list; ``{key: form}`` an object with these
keys; :class:`Map`; :class:`OneOf`; None for null; ``object`` for anything."""


def parse(text: bytes, most: int, where: str) -> Any:
    """JSON as Python data, with a limit to what it may become.

    Args:
        text: UTF-8.
        most: values that it may hold, at about 100 bytes each.
        where: what it is, for errors.

    Raises:
        BundleError: no JSON, more values, numbers without a value, too deep.
    """
    if text.count(b",") + text.count(b"[") + text.count(b"{") > most:
        raise BundleError(f"{where} holds more than {most} values; expected fewer")

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is no JSON: {error}") from error


def expect(value: Any, form: Form, where: str) -> None:
    """Raise BundleError, naming the field, unless a value has a form.

    Args:
        value: data read from JSON.
        form: see :data:`Form`.
        where: the field.
    """
    if form is object:
        return
    if isinstance(form, OneOf):
        for alternative in form.forms:
            if _fits(value, alternative):
                expect(value, alternative, where)
                return
        raise _wrong(value, form, where)
    if not _fits(value, form):
        raise _wrong(value, form, where)
    if isinstance(form, list):
        for index, item in enumerate(value):
            expect(item, form[0], f"{where}[{index}]")
    elif isinstance(form, Map):
        for key, item in value.items():
            expect(item, form.values, f"{where}.{key[:_SHOWN]}")
    elif isinstance(form, dict):
        if value.keys() != form.keys():
            lacking = sorted(form.keys() - value.keys())
            unknown = sorted(key[:_SHOWN] for key in value.keys() - form.keys())
            raise BundleError(
                f"{where or 'the manifest'} lacks the fields {lacking} and has the unknown fields "
                f"{unknown}"
            )
        for key, item in form.items():
            expect(value[key], item, f"{where}.{key}" if where else key)


def _fits(value: Any, form: Form) -> bool:
    """Whether the outermost type is right."""
    if form is None:
        return value is None
    if form is float:
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(form, list):
        return type(value) is list
    if isinstance(form, (dict, Map)):
        return type(value) is dict
    return type(value) is form


def _wrong(value: Any, form: Form, where: str) -> BundleError:
    return BundleError(f"{where} = {str(value)[:_SHOWN]!r}; expected {_described(form)}")


def _described(form: Form) -> str:
    if isinstance(form, OneOf):
        return " or ".join(map(_described, form.forms))
    if isinstance(form, list):
        return "a list"
    if isinstance(form, (dict, Map)):
        return "an object"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return "null" if form is None else names[form]
