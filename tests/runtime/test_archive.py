"""The bundles' container: a strict zip of stored members."""

from __future__ import annotations

import io
import os
import zipfile

import pytest

from fuseengine.errors import BundleError
from fuseengine.runtime import archive
from fuseengine.runtime.archive import Archive

MEMBERS = {"a.json": b"{}", "sub/b.bin": bytes(range(256)) * 9, "empty": b""}


@pytest.fixture
def written(tmp_path):
    archive.write(tmp_path / "x.fuse", MEMBERS)
    return tmp_path / "x.fuse"


def zipped(path, members, **options):
    """The same by Python's own zip module, as somebody else would make it."""
    with zipfile.ZipFile(path, "w", **options) as target:
        for name, content in members.items():
            target.writestr(zipfile.ZipInfo(name), content, options.get("compression"))
    return path


def opened(path):
    """Read all there is, as a reader of bundles does."""
    with Archive(path) as found:
        found.check_layout()
        return {name: found.read(name) for name in found.members}


class TestWrite:
    def test_read_again(self, written):
        assert opened(written) == MEMBERS

    def test_it_is_a_zip(self, written):
        with zipfile.ZipFile(written) as found:
            assert found.testzip() is None
            assert {i.filename: found.read(i) for i in found.infolist()} == MEMBERS

    def test_the_same_members_give_the_same_bytes(self, written, tmp_path):
        archive.write(tmp_path / "y.fuse", dict(MEMBERS))
        assert (tmp_path / "y.fuse").read_bytes() == written.read_bytes()

    def test_members_of_another_archive(self, written, tmp_path):
        with Archive(written) as source:
            copied = {name: (source, name) for name in source.members}
            archive.write(tmp_path / "y.fuse", {**copied, "more": b"x"})
        assert opened(tmp_path / "y.fuse") == {**MEMBERS, "more": b"x"}

    def test_an_archive_may_replace_itself(self, written):
        with Archive(written) as source:
            archive.write(written, {"only": (source, "sub/b.bin")})
            assert source.read("a.json") == b"{}"  # whoever has it open keeps the old one
        assert opened(written) == {"only": MEMBERS["sub/b.bin"]}

    def test_none(self, tmp_path):
        archive.write(tmp_path / "x", {})
        assert opened(tmp_path / "x") == {}

    @pytest.mark.parametrize("name", ["/a", "../a", "a/../b", "a//b", ".a", "a\\b", "", "é", "a b"])
    def test_names_that_are_not_plain(self, name, tmp_path):
        with pytest.raises(BundleError, match="not plain"):
            archive.write(tmp_path / "x.fuse", {name: b""})
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_left_where_writing_fails(self, written, tmp_path):
        before = written.read_bytes()
        with Archive(written) as source:
            damaged = {"x": b"1", "y": (source, "sub/b.bin")}
            source.members["sub/b.bin"] = source.members["sub/b.bin"]._replace(crc=1)
            with pytest.raises(BundleError, match="checksum"):
                archive.write(written, damaged)
        assert written.read_bytes() == before
        assert list(tmp_path.iterdir()) == [written]

    def test_places_that_cannot_be_written(self, tmp_path):
        with pytest.raises(BundleError, match="make its folder first"):
            archive.write(tmp_path / "no" / "x.fuse", {})
        with pytest.raises(BundleError, match="it is a folder"):
            archive.write(tmp_path, {})

    def test_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(archive, "MOST_BYTES", 3000)
        with pytest.raises(BundleError, match="more than 3000 bytes"):
            archive.write(tmp_path / "x.fuse", MEMBERS)
        assert list(tmp_path.iterdir()) == []


class TestRefused:
    def test_a_flipped_bit_anywhere(self, written):
        content = written.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            written.write_bytes(changed)
            with pytest.raises(BundleError, match=r"x\.fuse"):
                opened(written)

    def test_cut_off_anywhere(self, written):
        content = written.read_bytes()
        for length in (*range(0, len(content), 13), len(content) - 1):
            written.write_bytes(content[:length])
            with pytest.raises(BundleError, match=r"cut off|no bundle|does not"):
                opened(written)

    def test_more_behind_or_before(self, written):
        content = written.read_bytes()
        for changed in (content + b"x", b"x" + content, content + content[-22:]):
            written.write_bytes(changed)
            with pytest.raises(BundleError):
                opened(written)

    @pytest.mark.parametrize(
        "name", ["/etc/passwd", "../x", "a/../../x", "C:\\x", "a\\..\\b", "a/", "x" * 201]
    )
    def test_names(self, name, tmp_path):
        path = zipped(tmp_path / "x.fuse", {"a": b"", name: b"1"})
        with pytest.raises(BundleError, match=r"plain relative names"):
            opened(path)

    def test_compressed(self, tmp_path):
        path = zipped(tmp_path / "x.fuse", {"a": bytes(1 << 20)}, compression=zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 5000
        with pytest.raises(BundleError, match="is compressed"):
            opened(path)

    def test_other_writers(self, tmp_path):
        path = zipped(tmp_path / "x.fuse", MEMBERS)
        with pytest.raises(BundleError, match="not as FuseEngine writes it"):
            opened(path)

    def test_twice(self, tmp_path):
        with (
            pytest.warns(UserWarning, match="Duplicate"),
            zipfile.ZipFile(tmp_path / "x.fuse", "w") as target,
        ):
            target.writestr("a", b"1")
            target.writestr("a", b"2")
        with pytest.raises(BundleError, match="twice"):
            opened(tmp_path / "x.fuse")

    def test_a_comment(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.fuse", "w") as target:
            target.comment = b"hello"
        with pytest.raises(BundleError, match="no end record"):
            opened(tmp_path / "x.fuse")

    def test_sizes_beyond_the_file(self, written):
        content = bytearray(written.read_bytes())
        record = content.rindex(b"PK\x01\x02")
        content[record + 20 : record + 28] = (2**31).to_bytes(4, "little") * 2
        written.write_bytes(content)
        with pytest.raises(BundleError, match="says 2147483648 bytes"):
            opened(written)

    def test_members_that_overlap(self, written):
        content = bytearray(written.read_bytes())
        first = content.index(b"PK\x01\x02")
        second = content.index(b"PK\x01\x02", first + 1)
        content[second + 42 : second + 46] = bytes(4)  # its content begins where the first's does
        written.write_bytes(content)
        with pytest.raises(BundleError):
            opened(written)

    def test_what_is_no_zip(self, tmp_path):
        for content in (b"", b"PK", b"hello" * 100, b"PK\x05\x06", bytes(22)):
            (tmp_path / "x").write_bytes(content)
            with pytest.raises(BundleError, match="is no bundle"):
                opened(tmp_path / "x")

    def test_what_is_no_file(self, tmp_path):
        with pytest.raises(BundleError, match="there is no such file"):
            Archive(tmp_path / "none.fuse")
        with pytest.raises(BundleError, match="it is no file"):
            Archive(tmp_path)
        if hasattr(os, "mkfifo"):  # a pipe would be waited for
            os.mkfifo(tmp_path / "pipe")
            with pytest.raises(BundleError, match="it is no file"):
                Archive(tmp_path / "pipe")

    def test_no_such_member(self, written):
        with Archive(written) as found, pytest.raises(BundleError, match="holds no b"):
            found.read("b")

    def test_too_many(self, tmp_path, monkeypatch):
        monkeypatch.setattr(archive, "MOST_MEMBERS", 2)
        archive.write(tmp_path / "x", MEMBERS)
        with pytest.raises(BundleError, match="3 members; expected at most"):
            opened(tmp_path / "x")


def test_files_are_closed(written):
    with Archive(written):
        pass
    Archive(written).close()
    with pytest.raises(BundleError):
        Archive(io.__file__)  # no zip: closed again, or pytest would warn
