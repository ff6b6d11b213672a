"""The top level: help, version, errors in one line, pipes, interruptions, missing libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

import fuseengine.cli
from fuseengine.cli import main
from fuseengine.errors import FuseEngineError

COMMANDS = [
    "fuse",
    "video",
    "demo",
    "evaluate",
    "models",
    "train",
    "doctor",
    "compile",
    "inspect",
    "verify",
]


def one_error(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fuseengine: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fuseengine {version('fuseengine')}\n"


def test_module_is_the_command(command):
    done = command("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "fuseengine")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_fits_a_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"\n  fuseengine {name}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in COMMANDS)


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage: fuseengine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["fus"], "invalid choice: 'fus'"),
        (["fuse", "a", "b"], "required: -o"),
        (["fuse", "a", "b", "-o", "c", "--threads", "0"], "got '0', expected a whole number"),
        (["fuse", "a", "b", "-o", "c", "--colour"], "unrecognized arguments: --colour"),
        (["fuse", "a", "b", "-o", "c", "--infrared-range", "-1,2"], "needs '='"),
        (["train", "drfusion-s", "--data", "d", "--out", "o", "--rate", "nan"], "got 'nan'"),
    ],
)
def test_wrong_arguments(argv, text, capsys):
    assert main(argv) == 2
    assert text in one_error(capsys)


def raising(error):
    def run(args):
        raise error

    return run


@pytest.fixture
def broken(monkeypatch):
    """Makes the command ``models`` raise."""

    def use(error):
        monkeypatch.setattr(fuseengine.cli.models, "run", raising(error))

    return use


class TestErrors:
    def test_one_line(self, broken, capsys):
        broken(FuseEngineError("got 1,\n  expected 2; pass resize='infrared'"))
        assert main(["models"]) == 2
        assert one_error(capsys) == (
            "fuseengine: error: got 1, expected 2; pass --resize infrared\n"
        )

    def test_traceback_when_asked(self, broken, capsys):
        broken(FuseEngineError("no"))
        assert main(["--traceback", "models"]) == 2
        text = capsys.readouterr().err
        assert "Traceback (most recent call last)" in text
        assert text.endswith("fuseengine: error: no\n")

    def test_system_errors(self, broken, capsys):
        broken(PermissionError(13, "Permission denied", "there"))
        assert main(["models"]) == 2
        assert one_error(capsys) == "fuseengine: error: there: Permission denied\n"

    def test_missing_library_names_its_extra(self, broken, capsys):
        broken(ModuleNotFoundError("No module named 'openvino'", name="openvino.properties"))
        assert main(["models"]) == 2
        assert "pip install 'fuseengine[openvino]'" in one_error(capsys)

    def test_own_faults_are_not_hidden(self, broken):
        broken(ModuleNotFoundError("No module named 'typo'", name="typo"))
        with pytest.raises(ModuleNotFoundError):
            main(["models"])

    def test_interrupted(self, broken, capsys):
        broken(KeyboardInterrupt())
        assert main(["models"]) == 130
        assert capsys.readouterr().err == "fuseengine: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("argv", [["models"], ["--version"]])
def test_closed_pipe(argv):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fuseengine", *argv],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
