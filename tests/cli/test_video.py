"""``fuseengine video``: files in, a file out, what is printed, interruptions."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fuseengine.cli import main
from fuseengine.cli.video import milliseconds
from fuseengine.runtime.images import write_image
from fuseengine.video import open_sink, open_source
from tests.video.conftest import SIZE, fused, moving

pytest.importorskip("av")

# A user's run with an engine that needs no compiling: the visible frame comes back.
# What a shell starts in its background ignores Ctrl-C, and so does all that it starts in turn.
FAKE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from types import SimpleNamespace
import fuseengine
class Engine:
    size = None
    program = SimpleNamespace(channels="luma")
    report = SimpleNamespace(summary=lambda: "fake engine")
    def __call__(self, infrared, visible, **options):
        time.sleep(0.01)
        return visible.copy()
fuseengine.compile = lambda *_, **__: Engine()
from fuseengine.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def videos(tmp_path):
    """Two recordings of 25 frames and a place for the output."""
    for name, step in (("ir", 1), ("vis", 2)):
        with open_sink(tmp_path / f"{name}.mp4", rate=25) as sink:
            for k, image in enumerate(moving(25, colour=True, step=step)):
                sink.write(fused(image, time_s=k / 25, index=k))
    return tmp_path / "ir.mp4", tmp_path / "vis.mp4", tmp_path / "fused.mp4"


def arguments(videos, *more):
    infrared, visible, out = videos
    return ["video", "--infrared", str(infrared), "--visible", str(visible), "-o", str(out), *more]


def test_two_files_become_one(videos, fake, capsys):
    assert main(arguments(videos)) == 0
    out = capsys.readouterr().out
    assert f"{videos[2]}: 25 frames in" in out
    for text in ("latency: p50", "pairs: 25, dropped 0", "visible: 25 captured, 0 unpaired"):
        assert text in out
    ((model, size, _),) = fake.asked
    assert (model, size) == ("drfusion-s", SIZE)
    with open_source(videos[2]) as source:
        frames = list(source)
    assert (len(frames), source.size) == (25, SIZE)
    np.testing.assert_allclose([f.time_s for f in frames], np.arange(25) / 25, atol=2e-3)


def test_max_frames_range_and_quiet(videos, fake, capsys):
    words = ["--max-frames", "7", "--infrared-range", "10,200", "--quiet"]
    assert main(arguments(videos, *words)) == 0
    assert capsys.readouterr() == ("", "")
    assert len(list(open_source(videos[2]))) == 7
    assert fake.calls[0][1] == {"infrared_range": (10.0, 200.0)}


def test_temporal(videos, fake, capsys):
    """The engine is compiled for it, and the stream uses it or says why not."""
    assert main(arguments(videos, "--temporal", "warm", "--model", "mask-difuser-s")) == 2
    assert fake.asked[0][2]["temporal"] == "warm"
    assert "compiled with --temporal warm" in capsys.readouterr().err


def test_progress_and_events_on_standard_error(videos, fake, capsys):
    assert main(arguments(videos, "--progress", "--max-frames", "5")) == 0
    err = capsys.readouterr().err
    assert "video:" in err
    assert "5/5" in err


def test_images_with_a_rate(tmp_path, fake, capsys):
    for k, (ir, vis) in enumerate(zip(moving(4), moving(4, colour=True), strict=True)):
        for name, image in (("ir", ir), ("vis", vis)):
            (tmp_path / name).mkdir(exist_ok=True)
            write_image(tmp_path / name / f"{k}.png", image)
    words = (tmp_path / "ir", tmp_path / "vis" / "%d.png", tmp_path / "out" / "%03d.png")
    assert main(arguments(words, "--rate", "10")) == 0
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [f"00{k}.png" for k in range(4)]


def test_no_pair_is_an_error(videos, fake, capsys):
    assert main(arguments(videos, "--offset=-5s")) == 2
    err = capsys.readouterr().err
    assert "no frame was fused of" in err
    assert "--offset" in err
    assert not videos[2].exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--visible": "none.mp4"}, "'none.mp4' does not exist"),
        ({"-o": "fused.gif"}, "got 'fused.gif', expected a file with one of .mp4"),
        ({"--deadline": "soon"}, "got 'soon', expected a time such as 33ms"),
        ({"--tolerance": "-4ms"}, "expected 0 or more"),
    ],
)
def test_what_cannot_be(change, text, videos, fake, capsys):
    words = arguments(videos)
    for option, value in change.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words.append(f"{option}={value}")
    assert main(words) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.splitlines()[-1].startswith("fuseengine: error: ")


def test_output_that_is_an_input(videos, fake, capsys):
    before = videos[0].read_bytes()
    assert main(arguments((videos[0], videos[1], videos[0]))) == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert videos[0].read_bytes() == before


def test_no_output(videos, fake, capsys):
    words = arguments(videos)
    del words[-2:]
    assert main(words) == 2
    assert "give -o OUT or --show" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("33ms", 33), ("0.1s", 100), ("-40", -40), (" 2S ", 2000)]
)
def test_times(text, value):
    assert milliseconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "ms", "inf", "nan", "3 h"])
def test_no_times(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a time such as 33ms"):
        milliseconds(text)


@pytest.fixture
def long_run(tmp_path):
    """A run of 20 s of video at its own speed, in a process of its own, that has begun to write."""
    for name in ("ir", "vis"):
        (tmp_path / name).mkdir()
    for k, image in enumerate(moving(200, colour=True)):
        for name in ("ir", "vis"):
            write_image(tmp_path / name / f"{k}.png", image)
    out = tmp_path / "fused.mp4"
    words = arguments((tmp_path / "ir", tmp_path / "vis", out), "--rate", "10")
    process = subprocess.Popen(
        [sys.executable, "-c", FAKE, *words, "--deadline", "500ms"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    return process, out


def wait_for_bytes(process, out, count):
    end = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size > count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_interrupted_file_plays(long_run):
    process, out = long_run
    wait_for_bytes(process, out, 0)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "fuseengine: interrupted" in stderr
    frames = list(open_source(out))
    assert 1 < len(frames) < 200
    assert f"{out}: {len(frames)} frames in" in stdout
    assert np.abs(frames[-1].rgb().astype(int) - moving(1, colour=True)[0]).mean() < 60


def test_killed_file_plays(long_run):
    process, out = long_run
    wait_for_bytes(process, out, 3000)  # the first fragment
    process.kill()
    process.communicate()
    assert len(list(open_source(out))) > 1


def test_a_real_engine(videos, command):
    done = command(*arguments(videos, "--max-frames", "3", "--precision", "fp32"))
    assert done.returncode == 0, done.stderr
    assert ": 3 frames in" in done.stdout
    frames = list(open_source(videos[2]))
    assert len(frames) == 3
    # Where the square of either source is, the fused frame is bright.
    assert frames[0].luma()[12:28, 0:12].mean() > 120 > frames[0].luma()[35:, 40:].mean()
