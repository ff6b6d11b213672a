"""Which files belong together, and what is said about the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fuseengine.errors import ImageFileError, SettingError
from fuseengine.evaluation.pairing import (
    Refusal,
    UnusablePairsError,
    image_size,
    name_methods,
    pair_folders,
)
from fuseengine.runtime.images import read_image

from .conftest import SIZE, picture, save


def pair(folders, refused=(), **methods):
    methods = methods or {"one": folders / "one", "two": folders / "two"}
    return pair_folders(folders / "ir", folders / "vis", methods, refused)


class TestNames:
    def test_last_part_of_a_folder(self, tmp_path):
        assert name_methods(["x/ours/", "theirs"]) == {
            "ours": Path("x/ours"),
            "theirs": Path("theirs"),
        }
        assert list(name_methods([str(tmp_path / "a" / "..")])) == [tmp_path.name]

    def test_given_names(self):
        assert name_methods([" DRMF =x/out"]) == {"DRMF": Path("x/out")}

    def test_same_last_parts_are_told_apart(self):
        assert list(name_methods(["a/out", "b/out", "c/fused"])) == ["a/out", "b/out", "fused"]

    def test_a_folder_with_an_equals_sign(self, tmp_path):
        (tmp_path / "steps=3").mkdir()
        folder = str(tmp_path / "steps=3")
        assert name_methods([folder]) == {"steps=3": Path(folder)}

    @pytest.mark.parametrize(
        "texts", [["=x"], ["a=x", "a=y"], ["x/a", "a=y"], ["visible=x"], ["x", "x"]]
    )
    def test_unusable_names(self, texts):
        with pytest.raises(SettingError, match="NAME=DIR"):
            name_methods(texts)


class TestPairing:
    def test_by_stem(self, folders):
        found = pair(folders)
        assert [case.name for case in found.cases] == ["a", "b", "c"]
        case = found.cases[1]
        assert (case.infrared.name, case.visible.name) == ("b.png", "b.bmp")
        assert [path.parent.name for path in case.fused] == ["one", "two"]
        assert case.size == SIZE
        assert found.methods == ("one", "two")
        assert found.unpaired == {} and found.refused == ()

    def test_files_without_partners_are_listed(self, folders):
        (folders / "one" / "b.png").unlink()
        save(folders / "ir" / "z.png", picture(0))
        (folders / "one" / "notes.txt").touch()
        found = pair(folders)
        assert [case.name for case in found.cases] == ["a", "c"]
        assert found.unpaired == {
            "infrared": ("b.png", "z.png"),
            "visible": ("b.bmp",),
            "two": ("b.png",),
        }

    def test_sizes_that_differ(self, folders):
        save(folders / "two" / "b.png", picture(0, (20, 28)))
        found = pair(folders)
        assert [case.name for case in found.cases] == ["a", "c"]
        (refusal,) = found.refused
        assert refusal.name == "b"
        assert refusal.reason == (
            "sizes differ (height x width): infrared 40x56, visible 40x56, one 40x56, two 20x28"
        )

    def test_damaged_files(self, folders):
        (folders / "one" / "c.png").write_bytes(b"")
        (refusal,) = pair(folders).refused
        assert refusal.name == "c" and "the file is empty" in refusal.reason

    def test_what_was_refused_before(self, folders):
        """A leftover of an earlier run is not taken for a result of this one."""
        found = pair(folders, [Refusal("a", "not fused: no")])
        assert [case.name for case in found.cases] == ["b", "c"]
        assert found.refused == (Refusal("a", "not fused: no"),)
        (folders / "one" / "a.png").unlink()
        assert pair(folders, [Refusal("a", "not fused: no")]).unpaired == {}

    def test_nothing_in_common(self, folders):
        save(folders / "other" / "x.png", picture(0))
        with pytest.raises(ImageFileError, match=r"no image is in all folders.*other .*\(1\)"):
            pair(folders, other=folders / "other")

    def test_two_files_of_one_stem(self, folders):
        save(folders / "one" / "a.jpg", picture(0))
        with pytest.raises(ImageFileError, match="same stem"):
            pair(folders)

    def test_missing_folder(self, folders):
        with pytest.raises(ImageFileError, match="cannot list"):
            pair(folders, gone=folders / "gone")

    def test_error_lists_all(self):
        error = UnusablePairsError([Refusal("a", "x"), Refusal("b", "y")], 9)
        assert str(error).startswith("2 of 9 pairs cannot be measured: a: x; b: y.")
        assert "skip=True" in str(error)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_is_that_of_the_picture_as_read(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    Image.fromarray(picture(0)).save(path, exif=exif)
    assert image_size(path) == read_image(path).shape
