"""Image files: good, odd and hostile."""

from __future__ import annotations

import os
import stat
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from fuseengine.errors import ImageFileError
from fuseengine.runtime.images import list_images, pair_files, read_image, write_image

GRAY = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (5, 7), np.uint16)
LOSSLESS = [".png", ".tif", ".tiff", ".bmp", ".PNG"]


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", LOSSLESS)
    @pytest.mark.parametrize("array", [GRAY, COLOUR], ids=["gray", "colour"])
    def test_lossless(self, tmp_path, suffix, array):
        path = tmp_path / f"a{suffix}"
        write_image(path, array)
        got = read_image(path)
        assert got.dtype == np.uint8 and got.flags.writeable
        np.testing.assert_array_equal(got, array)
        assert names(tmp_path) == [path.name]

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_sixteen_bit(self, tmp_path, suffix):
        path = tmp_path / f"a{suffix}"
        write_image(path, DEEP[::-1])
        got = read_image(str(path))
        assert got.dtype == np.uint16
        np.testing.assert_array_equal(got, DEEP[::-1])

    @pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
    def test_lossy(self, tmp_path, suffix):
        rows, columns = np.mgrid[0:40, 0:50]
        array = np.stack([rows * 4, columns * 4, rows + columns], -1).astype(np.uint8)
        write_image(tmp_path / f"a{suffix}", array)
        got = read_image(tmp_path / f"a{suffix}")
        assert np.abs(got.astype(int) - array).mean() < 3
        if suffix != ".webp":  # which knows no gray
            write_image(tmp_path / f"g{suffix}", array[..., 0])
            assert read_image(tmp_path / f"g{suffix}").shape == (40, 50)


class TestModes:
    def save(self, tmp_path, image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    def test_palette(self, tmp_path):
        image = Image.fromarray(COLOUR // 64 * 64).convert(
            "P", palette=Image.Palette.ADAPTIVE, colors=64
        )
        got = self.save(tmp_path, image)
        np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))
        grays = Image.new("P", (7, 5))
        grays.putdata((GRAY // 2).reshape(-1).tolist())
        grays.putpalette([v for i in range(256) for v in (i,) * 3])
        np.testing.assert_array_equal(self.save(tmp_path, grays), GRAY // 2)

    def test_one_bit(self, tmp_path):
        image = Image.fromarray(GRAY).convert("1")
        got = self.save(tmp_path, image)
        assert got.dtype == np.uint8 and set(np.unique(got)) <= {0, 255}
        np.testing.assert_array_equal(got, np.asarray(image) * np.uint8(255))

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_alpha(self, tmp_path, mode):
        source = GRAY if mode == "LA" else COLOUR
        image = Image.fromarray(source)
        image.putalpha(255)
        np.testing.assert_array_equal(self.save(tmp_path, image), source)
        alpha = np.full(GRAY.shape, 255, np.uint8)
        alpha[2, 3] = 254
        image.putalpha(Image.fromarray(alpha))
        with pytest.raises(ImageFileError, match=r"a\.png: its alpha channel .*flatten it"):
            self.save(tmp_path, image)

    def test_transparent_palette_entry(self, tmp_path):
        image = Image.fromarray(GRAY).convert("P")
        used = int(np.asarray(image)[0, 0])
        with pytest.raises(ImageFileError, match="alpha channel"):
            self.save(tmp_path, image, transparency=used)

    def test_cmyk(self, tmp_path):
        image = Image.fromarray(COLOUR).convert("CMYK")
        got = self.save(tmp_path, image, "a.tif")
        np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))

    def test_integers_and_floats(self, tmp_path):
        fits = Image.fromarray(DEEP.astype(np.int32))
        np.testing.assert_array_equal(self.save(tmp_path, fits, "i.tif"), DEEP)
        for value in (-1, 65536):
            wide = Image.fromarray(np.array([[0, value], [1, 2]], np.int32))
            with pytest.raises(ImageFileError, match="at most 16 bits"):
                self.save(tmp_path, wide, "w.tif")
        with pytest.raises(ImageFileError, match="floating-point pixels"):
            self.save(tmp_path, Image.fromarray(np.zeros((4, 4), np.float32)), "f.tif")

    def test_big_endian(self, tmp_path):
        path = tmp_path / "a.pgm"  # netpbm's 16 bits are big-endian
        path.write_bytes(b"P5 7 5 65535\n" + DEEP.astype(">u2").tobytes())
        got = read_image(path)
        np.testing.assert_array_equal(got, DEEP)
        assert got.dtype.isnative

    def test_exif_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to show
        image = Image.fromarray(COLOUR)
        got = self.save(tmp_path, image, exif=exif)
        np.testing.assert_array_equal(got, np.rot90(COLOUR, -1))


class TestBadFiles:
    def refuse(self, path, message):
        with pytest.raises(ImageFileError, match=message) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None

    def test_missing_folder_empty_text(self, tmp_path):
        self.refuse(tmp_path / "no.png", "no such file; check the path")
        self.refuse(tmp_path, "it is a folder")
        (tmp_path / "empty.png").touch()
        self.refuse(tmp_path / "empty.png", "the file is empty")
        (tmp_path / "text.png").write_text("this is no image at all")
        self.refuse(tmp_path / "text.png", "not an image that Pillow knows")

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp"])
    def test_truncated_anywhere(self, tmp_path, name):
        path = tmp_path / name
        array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
        write_image(path, array)
        data = path.read_bytes()
        for keep in (1, 8, 20, len(data) // 3, len(data) // 2):
            path.write_bytes(data[:keep])
            self.refuse(path, "cannot read")

    def test_damaged_png(self, tmp_path):
        path = tmp_path / "a.png"
        write_image(path, COLOUR)
        data = bytearray(path.read_bytes())
        data[data.index(b"IDAT") + 6] ^= 0xFF
        path.write_bytes(bytes(data))
        self.refuse(path, "damaged or truncated")

    def test_decompression_bomb(self, tmp_path):
        def chunk(kind, body):
            return (
                struct.pack(">I", len(body))
                + kind
                + body
                + struct.pack(">I", zlib.crc32(kind + body))
            )

        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        path = tmp_path / "bomb.png"
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
        )
        self.refuse(path, "MAX_IMAGE_PIXELS")

    def test_no_permission(self, tmp_path, monkeypatch):
        path = tmp_path / "a.png"
        write_image(path, GRAY)

        def refuse(*args, **options):  # root, who runs many a container, may read everything
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Image, "open", refuse)
        self.refuse(path, "permission denied")


class TestWrite:
    def test_refuses(self, tmp_path):
        for path, array, message in [
            ("a.gif", GRAY, "got suffix '.gif', expected one of"),
            ("a", GRAY, "got suffix ''"),
            ("a.png", GRAY.astype(np.float32), "got float32"),
            ("a.png", GRAY[None], r"got uint8 \(1, 5, 7\)"),
            ("a.png", np.zeros((0, 4), np.uint8), r"got uint8 \(0, 4\)"),
            ("a.jpg", DEEP, "uint16 .* for .png and .tif"),
            ("a.png", np.zeros((4, 4, 3), np.uint16), "got uint16"),
        ]:
            with pytest.raises(ImageFileError, match=message):
                write_image(tmp_path / path, array)
        (tmp_path / "d.png").mkdir()
        with pytest.raises(ImageFileError, match="it is a folder"):
            write_image(tmp_path / "d.png", GRAY)
        with pytest.raises(ImageFileError, match="make its folder first"):
            write_image(tmp_path / "no" / "a.png", GRAY)
        assert names(tmp_path) == ["d.png"]

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch, error):
        path = tmp_path / "a.png"
        write_image(path, GRAY)
        before = path.read_bytes()

        def save(self, file, **options):
            file.write(b"half")
            raise error

        monkeypatch.setattr(Image.Image, "save", save)
        with pytest.raises(ImageFileError if isinstance(error, OSError) else KeyboardInterrupt):
            write_image(path, 255 - GRAY)
        assert path.read_bytes() == before
        assert names(tmp_path) == ["a.png"]

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX file modes")
    def test_mode_follows_the_umask(self, tmp_path):
        old = os.umask(0o027)
        try:
            write_image(tmp_path / "a.png", GRAY)
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640


class TestFolders:
    def test_list(self, tmp_path):
        for name in ["b.PNG", "a.jpg", ".hidden.png", "notes.txt", "c.tif"]:
            (tmp_path / name).touch()
        (tmp_path / "folder.png").mkdir()
        assert [p.name for p in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.tif"]
        for bad in (tmp_path / "no", tmp_path / "a.jpg"):
            with pytest.raises(ImageFileError, match="cannot list .*expected a folder"):
                list_images(bad)

    def test_pairs(self, tmp_path):
        ir, vis = tmp_path / "ir", tmp_path / "vis"
        ir.mkdir()
        vis.mkdir()
        for name in ["2.png", "1.png", "only_ir.bmp"]:
            (ir / name).touch()
        for name in ["1.jpg", "2.png", "zz.png", "aa.png"]:
            (vis / name).touch()
        found = pair_files(ir, vis)
        assert found.pairs == [(ir / "1.png", vis / "1.jpg"), (ir / "2.png", vis / "2.png")]
        assert found.only_infrared == [ir / "only_ir.bmp"]
        assert found.only_visible == [vis / "aa.png", vis / "zz.png"]
        (vis / "1.png").touch()
        with pytest.raises(ImageFileError, match=r"1\.jpg and 1\.png have the same stem"):
            pair_files(ir, vis)
