"""``fuseengine fuse``: files, folders, all that can be wrong with them, and a real engine."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image

from fuseengine.cli import main
from fuseengine.errors import ImageFileError
from fuseengine.runtime.formats import SUFFIXES
from fuseengine.runtime.images import read_image, write_image

from .conftest import SIZE, make_pair, save


def fuse(*argv):
    return main(["fuse", *map(str, argv)])


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fuseengine: error: ") and captured.err.count("\n") == 1
    return captured.err


class TestFiles:
    def test_writes_the_fused_image(self, pair, fake, capsys):
        ir, vis, out = pair
        assert fuse(ir, vis, "-o", out) == 0
        np.testing.assert_array_equal(read_image(out), read_image(vis) // 2 + 1)
        captured = capsys.readouterr()
        assert captured.out.startswith(f"{out}: 64x48, fused in ")
        assert captured.err == "fake engine, 99 dB\n"

    def test_options_reach_the_engine(self, pair, fake):
        ir, vis, out = pair
        options = "--backend torch --precision fp32 --device cpu --effort full --threads 3"
        frames = ["--resize", "infrared", "--infrared-range=-20,120.5"]
        assert fuse(ir, vis, "-o", out, *options.split(), "--no-cache", *frames) == 0
        assert fake.asked == [
            (
                "drfusion-s",
                SIZE,
                {
                    "backend": "torch",
                    "precision": "fp32",
                    "device": "cpu",
                    "effort": "full",
                    "threads": 3,
                    "cache": False,
                },
            )
        ]
        assert fake.calls == [(SIZE, {"resize": "infrared", "infrared_range": (-20.0, 120.5)})]

    def test_defaults(self, pair, fake):
        ir, vis, out = pair
        assert fuse(ir, vis, "-o", out, "--infrared-range", "minmax") == 0
        ((model, size, options),) = fake.asked
        assert (model, size) == ("drfusion-s", SIZE)
        assert options == {
            "backend": "auto",
            "precision": "auto",
            "device": "auto",
            "effort": "quick",
            "threads": None,
            "cache": True,
        }
        assert fake.calls[0][1] == {"resize": None, "infrared_range": "minmax"}

    def test_quiet_and_report(self, pair, fake, capsys):
        ir, vis, out = pair
        assert fuse(ir, vis, "-o", out, "-q") == 0
        assert capsys.readouterr() == ("", "")
        fake.report = "THE TABLE"
        assert fuse(ir, vis, "-o", out, "--report") == 0
        assert "THE TABLE" in capsys.readouterr().out

    def test_sixteen_bits(self, tmp_path, fake):
        deep = (make_pair()[0].astype(np.uint16) * 257).reshape(SIZE)
        vis = save(tmp_path / "vis.png", deep)
        ir = save(tmp_path / "ir.tif", deep)
        assert fuse(ir, vis, "-o", tmp_path / "out.png") == 0
        np.testing.assert_array_equal(read_image(tmp_path / "out.png"), deep // 2 + 1)


class TestBadFiles:
    """Each is refused before an engine is compiled, and writes nothing."""

    @pytest.fixture(autouse=True)
    def nothing_is_done(self, fake, tmp_path):
        yield
        assert fake.asked == []
        assert not (tmp_path / "fused.png").exists()

    @pytest.mark.parametrize("which", [0, 1])
    def test_missing(self, pair, capsys, which):
        pair[which].unlink()
        assert fuse(*pair[:2], "-o", pair[2]) == 2
        assert f"cannot read {pair[which]}: no such file" in error_of(capsys)

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize(
        ("damage", "text"),
        [
            (lambda whole: b"", "the file is empty"),
            (lambda whole: whole[: len(whole) // 2], "damaged or truncated"),
            (lambda whole: b"these are words, not pixels\n", "not an image"),
        ],
        ids=["empty", "truncated", "text"],
    )
    def test_damaged(self, pair, capsys, which, damage, text):
        pair[which].write_bytes(damage(pair[which].read_bytes()))
        assert fuse(*pair[:2], "-o", pair[2]) == 2
        message = error_of(capsys)
        assert str(pair[which]) in message and text in message

    @pytest.mark.parametrize("size", [(1, 1), (1, 64), (48, 1)])
    def test_too_small(self, pair, capsys, size):
        ir, vis, out = pair
        for path, frame in zip((ir, vis), make_pair(0, size), strict=True):
            save(path, frame)
        assert fuse(ir, vis, "-o", out) == 2
        message = error_of(capsys)
        assert f"got {size[0]}x{size[1]} pixels" in message and "at least 2x2" in message

    def test_different_sizes(self, pair, capsys):
        ir, vis, out = pair
        save(ir, make_pair(0, (24, 32))[0])
        assert fuse(ir, vis, "-o", out) == 2
        message = error_of(capsys)
        assert "infrared 24x32" in message and "visible 48x64" in message
        assert "--resize infrared" in message

    @pytest.mark.parametrize("text", ["5,2", "1,1", "1", "a,b", "0,inf", "nan,1", "1,2,3", "max"])
    def test_wrong_range(self, pair, capsys, text):
        assert fuse(*pair[:2], "-o", pair[2], "--infrared-range", text) == 2
        assert "expected minmax or two numbers" in error_of(capsys)

    def test_wrong_resize(self, pair, capsys):
        assert fuse(*pair[:2], "-o", pair[2], "--resize", "visible") == 2
        assert "--resize: got 'visible', expected 'infrared'" in error_of(capsys)

    def test_output_suffix(self, pair, capsys, tmp_path):
        assert fuse(*pair[:2], "-o", tmp_path / "fused.gif") == 2
        assert "got suffix '.gif', expected one of .bmp" in error_of(capsys)

    def test_output_folder_missing(self, pair, capsys, tmp_path):
        assert fuse(*pair[:2], "-o", tmp_path / "no" / "fused.png") == 2
        assert "make it first" in error_of(capsys)

    def test_output_is_a_folder(self, pair, capsys, tmp_path):
        assert fuse(*pair[:2], "-o", tmp_path) == 2
        assert "it is a folder, expected a file name" in error_of(capsys)

    @pytest.mark.parametrize("which", [0, 1])
    def test_output_is_an_input(self, pair, capsys, which):
        before = pair[which].read_bytes()
        assert fuse(*pair[:2], "-o", pair[which]) == 2
        assert "it is one of the inputs" in error_of(capsys)
        assert pair[which].read_bytes() == before

    @pytest.mark.parametrize("swap", [False, True])
    def test_file_and_folder(self, pair, capsys, tmp_path, swap):
        inputs = [tmp_path, pair[1]]
        assert fuse(*(reversed(inputs) if swap else inputs), "-o", pair[2]) == 2
        assert f"{tmp_path} is a folder and {pair[1]} is not" in error_of(capsys)

    def test_suffix_is_for_folders(self, pair, capsys):
        assert fuse(*pair[:2], "-o", pair[2], "--suffix", ".jpg") == 2
        assert "it is for folders" in error_of(capsys)


@pytest.fixture
def full_disk(monkeypatch):
    """Image files cannot be written beyond their first bytes."""

    def save(self, file, **options):
        file.write(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)


def test_existing_output_is_kept_when_writing_fails(pair, fake, full_disk, capsys, tmp_path):
    ir, vis, out = pair
    out.write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())
    assert fuse(ir, vis, "-o", out) == 2
    assert "No space left" in error_of(capsys)
    assert out.read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == before


def test_suffixes_are_those_that_can_be_written(tmp_path):
    for suffix in SUFFIXES:
        write_image(tmp_path / f"a{suffix}", make_pair()[1])
    with pytest.raises(ImageFileError) as caught:
        write_image(tmp_path / "a.xyz", make_pair()[1])
    assert ", ".join(SUFFIXES) in str(caught.value)


class TestFolders:
    def test_all_pairs(self, folders, fake, capsys):
        ir, vis, out = folders
        assert fuse(ir, vis, "-o", out) == 0
        assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "c.png"]
        for path in out.iterdir():
            expected = read_image(vis / f"{path.stem}.bmp") // 2 + 1
            np.testing.assert_array_equal(read_image(path), expected)
        assert [size for _, size, _ in fake.asked] == [None]  # one engine for all sizes
        captured = capsys.readouterr()
        assert captured.out.startswith(f"fused 3 of 3 pairs into {out} in ")
        assert "ms per pair" in captured.out and "sizes met: 2;" in captured.out
        assert "failed" not in captured.out and "partner" not in captured.out
        assert captured.err == "fake engine, 99 dB\n"  # no bar without a terminal

    def test_pairs_of_one_size_follow_each_other(self, folders, fake):
        ir, vis, out = folders
        assert fuse(ir, vis, "-o", out) == 0
        assert [size for size, _ in fake.calls] in (
            [SIZE, SIZE, (32, 40)],
            [(32, 40), SIZE, SIZE],
        )

    def test_progress_bar(self, folders, fake, capsys):
        ir, vis, out = folders
        assert fuse(ir, vis, "-o", out, "--progress") == 0
        assert "3/3" in capsys.readouterr().err

    def test_suffix(self, folders, fake, capsys):
        ir, vis, out = folders
        assert fuse(ir, vis, "-o", out, "--suffix", ".jpg") == 0
        assert {path.suffix for path in out.iterdir()} == {".jpg"}
        assert fuse(ir, vis, "-o", out, "--suffix", "gif") == 2
        assert "--suffix: got 'gif'" in capsys.readouterr().err

    def test_failures_do_not_stop_the_others(self, folders, fake, capsys):
        ir, vis, out = folders
        save(vis / "d.png", make_pair()[1])
        (ir / "d.png").write_bytes((ir / "a.png").read_bytes()[:200])
        save(ir / "e.png", make_pair(0, (24, 32))[0])
        save(vis / "e.png", make_pair()[1])
        assert fuse(ir, vis, "-o", out) == 2
        assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "c.png"]
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("fused 3 of 5 pairs")
        at = lines.index("failed: 2")
        assert lines[at + 1].startswith("  d.png: cannot read ")
        assert lines[at + 2].startswith("  e.png: got infrared 24x32 and visible 48x64")

    def test_a_fault_of_the_backend_is_a_failure_too(self, folders, fake, capsys):
        ir, vis, out = folders
        fake.fail = {2: RuntimeError("bad\nkernel")}
        assert fuse(ir, vis, "-o", out) == 2
        captured = capsys.readouterr()
        assert "fused 2 of 3" in captured.out and ": RuntimeError: bad kernel\n" in captured.out
        assert "Traceback" not in captured.err

    def test_traceback_of_a_failure(self, folders, fake, capsys):
        ir, vis, out = folders
        fake.fail = {2: RuntimeError("bad kernel")}
        assert main(["--traceback", "fuse", str(ir), str(vis), "-o", str(out)]) == 2
        assert "Traceback (most recent call last)" in capsys.readouterr().err

    def test_failed_writes_are_failures(self, folders, fake, full_disk, capsys):
        ir, vis, out = folders
        out.mkdir()
        (out / "a.png").write_bytes(b"precious")
        assert fuse(ir, vis, "-o", out) == 2
        assert "failed: 3" in capsys.readouterr().out
        assert [path.name for path in out.iterdir()] == ["a.png"]
        assert (out / "a.png").read_bytes() == b"precious"

    def test_quiet_says_what_failed(self, folders, fake, capsys):
        ir, vis, out = folders
        assert fuse(ir, vis, "-o", out, "-q") == 0
        assert capsys.readouterr() == ("", "")
        (ir / "b.png").write_bytes(b"")
        assert fuse(ir, vis, "-o", out, "-q") == 2
        captured = capsys.readouterr()
        assert captured.out == "" and "the file is empty" in captured.err

    def test_unpaired_names_are_listed(self, folders, fake, capsys):
        ir, vis, out = folders
        (ir / "c.png").rename(ir / "z.png")
        (vis / "notes.txt").touch()
        assert fuse(ir, vis, "-o", out) == 0
        text = capsys.readouterr().out
        assert "infrared without a partner: z.png\n" in text
        assert "visible without a partner: c.bmp\n" in text
        assert "notes" not in text

    def test_interrupted(self, folders, fake, capsys):
        ir, vis, out = folders
        fake.fail = {2: KeyboardInterrupt()}
        assert fuse(ir, vis, "-o", out) == 130
        captured = capsys.readouterr()
        # The first pair's write may have been cancelled; what was written is counted, and whole.
        assert captured.out.startswith(f"fused {len(list(out.iterdir()))} of 3")
        assert captured.err.endswith("fuseengine: interrupted\n")
        for path in out.iterdir():
            read_image(path)

    def test_no_pairs(self, folders, fake, capsys):
        ir, _, out = folders
        (out.parent / "none").mkdir()
        assert fuse(ir, out.parent / "none", "-o", out) == 2
        message = error_of(capsys)
        assert "no pairs in" in message and "(3 images)" in message and "(0 images)" in message
        assert fake.asked == [] and not out.exists()

    def test_missing_folder(self, folders, fake, capsys):
        ir, vis, out = folders
        assert fuse(ir, vis.with_name("viz"), "-o", out) == 2
        assert "viz: no such folder" in error_of(capsys)

    def test_output_is_a_file(self, folders, fake, capsys):
        ir, vis, out = folders
        out.touch()
        assert fuse(ir, vis, "-o", out) == 2
        assert f"{out} is a file; expected a folder" in error_of(capsys)

    def test_output_is_an_input(self, folders, fake, capsys):
        ir, vis, _ = folders
        assert fuse(ir, vis, "-o", vis / ".." / "vis") == 2
        assert "is one of the inputs" in error_of(capsys)


class TestEngine:
    """The real compile(): names, missing libraries, and pictures."""

    @pytest.mark.parametrize(
        ("option", "given", "hint"),
        [
            ("--model", "drfusion-z", "Did you mean 'drfusion-s'?"),
            ("--backend", "openvno", "Did you mean 'openvino'?"),
            ("--precision", "fp3", "Did you mean 'fp32'?"),
            ("--device", "cud", "Did you mean 'cuda'?"),
            ("--effort", "ful", "Did you mean 'full'?"),
        ],
    )
    def test_unknown_names(self, pair, capsys, option, given, hint):
        ir, vis, out = pair
        assert fuse(ir, vis, "-o", out, option, given) == 2
        message = error_of(capsys)
        assert repr(given) in message and hint in message
        assert not out.exists()

    @pytest.mark.parametrize(
        ("backend", "library", "extra"),
        [("openvino", "openvino", "openvino"), ("inductor", "torch", "compile")],
    )
    def test_backend_not_installed(self, pair, capsys, monkeypatch, backend, library, extra):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *a: None if name == library else find(name, *a),
        )
        ir, vis, out = pair
        argv = ["-o", out, "--device", "cpu", "--backend", backend]
        assert fuse(ir, vis, *argv) == 2
        assert f"pip install 'fuseengine[{extra}]'" in error_of(capsys)

    def test_cold_without_torch(self, pair, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setitem(sys.modules, "torch", None)
        ir, vis, out = pair
        assert fuse(ir, vis, "-o", out, "--device", "cpu") == 2
        assert "pip install 'fuseengine[compile]'" in error_of(capsys)

    def test_cold_then_warm(self, pair, command):
        pytest.importorskip("torch")
        ir, vis, out = pair
        argv = ["fuse", ir, vis, "-o", out, "--device", "cpu", "--report"]
        cold = command(*argv)
        assert cold.returncode == 0, cold.stderr
        assert "chosen" in cold.stdout and cold.stderr == ""
        first = read_image(out)
        assert first.shape == (*SIZE, 3)
        warm = command(*argv, probe=True)
        assert warm.returncode == 0, warm.stderr
        assert "from the cache" in warm.stdout
        imported = warm.stdout.splitlines()[-1].split()
        assert "torch" not in imported and "tqdm" not in imported
        np.testing.assert_array_equal(read_image(out), first)

    @pytest.mark.slow
    def test_folders(self, folders, command):
        pytest.importorskip("torch")
        pytest.importorskip("onnxruntime")
        ir, vis, out = folders
        (vis / "c.bmp").write_bytes(b"BM")
        options = ["--device", "cpu", "--backend", "onnxruntime", "--precision", "fp32"]
        done = command("fuse", ir, vis, "-o", out, *options)
        assert done.returncode == 2
        assert done.stdout.startswith("fused 2 of 3 pairs") and "  c: cannot read" in done.stdout
        assert read_image(out / "a.png").shape == (*SIZE, 3)
        assert read_image(out / "b.png").shape == (32, 40, 3)
        assert "Traceback" not in done.stderr
