"""Rigs and the frames that they align, against OpenCV's lens model and known pictures."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from fuseengine.alignment import Alignment, Camera, Rig, transfer
from fuseengine.errors import FrameError, SettingError, SizeMismatchError
from fuseengine.thermal import PercentileGain

LENS = Camera(
    (48, 64),
    np.array([[60.0, 0.5, 31.0], [0.0, 58.0, 23.5], [0.0, 0.0, 1.0]]),
    (-0.2, 0.05, 0.003, -0.002, 0.01),
)
TILT = np.array([[0.5, 0.02, 3.0], [-0.01, 0.52, 2.0], [1e-4, -5e-5, 1.0]])


def gradient(size, dtype=np.uint8):
    """A picture whose value is linear in the place: bilinear sampling gives it back exactly."""
    row, column = np.mgrid[: size[0], : size[1]].astype(np.float64)
    return (row + column).astype(dtype)


@pytest.mark.parametrize("terms", [4, 5, 8])
def test_distortion_is_opencv_s(terms):
    coefficients = (-0.2, 0.05, 0.003, -0.002, 0.01, 0.02, -0.01, 0.004)[:terms]
    matrix = np.array([[60.0, 0.0, 31.0], [0.0, 58.0, 23.5], [0.0, 0.0, 1.0]])
    places = np.random.default_rng(0).uniform(0, 48, (50, 2))
    rays = (places - matrix[:2, 2]) / matrix[[0, 1], [0, 1]]
    points = np.concatenate([rays, np.ones((50, 1))], 1)
    expected, _ = cv2.projectPoints(
        points, np.zeros(3), np.zeros(3), matrix, np.array(coefficients)
    )
    found = Camera((48, 64), matrix, coefficients).distort(places)
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-9)
    np.testing.assert_allclose(
        Camera((48, 64), matrix, coefficients).undistort(found), places, atol=1e-8
    )


def test_a_rig_survives_its_file(tmp_path):
    rig = Rig(LENS, Camera((108, 192)), TILT, 0.31, {"board": "9x6"})
    rig.save(tmp_path / "rig.json")
    assert [p.name for p in tmp_path.iterdir()] == ["rig.json"]
    again = Rig.load(tmp_path / "rig.json")
    np.testing.assert_array_equal(again.homography, TILT)
    np.testing.assert_array_equal(again.infrared.matrix, LENS.matrix)
    assert again.infrared.distortion == LENS.distortion and again.visible.matrix is None
    assert (again.error_px, again.notes) == (0.31, {"board": "9x6"})


class TestAlignment:
    def test_the_same_view_at_two_sizes(self):
        rig = Rig.of_same_view((24, 32), (48, 64))
        align = Alignment(rig, clamp=True)
        assert align.size == (48, 64) and align.covered == 1.0
        visible = gradient((48, 64))
        infrared, kept = align(gradient((24, 32)), visible)
        np.testing.assert_array_equal(kept, visible)
        # Pixel centres: pixel i of the large picture lies at (i + 1/2) / 2 - 1/2 of the small one.
        row, column = np.mgrid[:48, :64]
        place = np.clip((row + 0.5) / 2 - 0.5, 0, 23) + np.clip((column + 0.5) / 2 - 0.5, 0, 31)
        np.testing.assert_allclose(infrared, place / 255, atol=1e-6)

    @pytest.mark.parametrize("lens", [False, True])
    def test_a_tilted_infrared_camera(self, lens):
        camera = LENS if lens else Camera((48, 64))
        rig = Rig(camera, Camera((90, 120)), TILT)
        align = Alignment(rig, (45, 60))
        row, column = np.mgrid[:45, :60].astype(np.float64)
        places = transfer(TILT, np.stack([column * 2 + 0.5, row * 2 + 0.5], -1))
        places = camera.distort(places)
        inside = ((places >= 0) & (places <= [63, 47])).all(-1)
        assert inside.mean() > 0.5 and abs(align.covered - inside.mean()) < 0.05
        found = align.infrared(gradient((48, 64), np.uint16))
        np.testing.assert_allclose(
            found[inside] * 65535, places.sum(-1)[inside], atol=2e-3 * 65535 / 1000
        )
        outside = ((places < -1) | (places > [64, 48])).any(-1)
        assert (found[outside] == 0).all()

    def test_colour_and_gain_in_one_pass(self):
        rig = Rig(Camera((48, 64)), Camera((90, 120)), TILT)
        align, rng = Alignment(rig, (45, 60)), np.random.default_rng(0)
        colour = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        kept = align.visible(colour)
        assert kept.shape == (45, 60, 3) and kept.dtype == np.uint8
        means = colour.reshape(45, 2, 60, 2, 3).mean((1, 3))  # half size: between four pixels
        assert np.abs(kept - means).max() <= 0.5 + 1e-6
        counts = (20_000 + 100 * rng.standard_normal((48, 64))).astype(np.uint16)
        gain = PercentileGain()
        table = gain.table(counts)
        np.testing.assert_allclose(
            align.infrared(counts, table=table), align.infrared(table[counts]), atol=1e-6
        )

    def test_refusals(self):
        align = Alignment(Rig.of_same_view((24, 32), (48, 64)))
        small = np.zeros((24, 32), np.uint8)
        with pytest.raises(SizeMismatchError, match="visible frame: got 24x32 .*expected 48x64"):
            align(small, small)
        with pytest.raises(FrameError, match=r"infrared frame: got int16 \(24, 32\)"):
            align.infrared(small.astype(np.int16))
        with pytest.raises(FrameError, match="NaN or infinity"):
            align.infrared(np.full((24, 32), np.nan, np.float32))


class TestBadRigs:
    def test_values(self):
        with pytest.raises(SettingError, match="3 coefficients, expected 4"):
            Camera((4, 4), np.eye(3), (0.1, 0.2, 0.3))
        with pytest.raises(SettingError, match="without a matrix"):
            Camera((4, 4), None, (0.1, 0.2, 0.3, 0.4))
        with pytest.raises(SettingError, match="homography.*invertible"):
            Rig(Camera((4, 4)), Camera((4, 4)), np.zeros((3, 3)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 9}, "got version 9"),
            ({"homography": [[1, 2], [3, 4]]}, "expected an invertible 3x3"),
            ({"infrared": {"size": [4]}}, "cannot be read as a rig file"),
            ({"visible": None}, "cannot be read as a rig file"),
        ],
    )
    def test_files(self, change, message, tmp_path):
        path = tmp_path / "rig.json"
        Rig.of_same_view((24, 32), (48, 64)).save(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(SettingError, match=f"rig.json.*{message}"):
            Rig.load(path)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"'])
    def test_no_rig_at_all(self, content, tmp_path):
        path = tmp_path / "rig.json"
        with pytest.raises(SettingError, match="cannot be read as a rig file"):
            Rig.load(path)
        path.write_bytes(content)
        with pytest.raises(SettingError, match="cannot be read as a rig file"):
            Rig.load(path)


class TestShortWays:
    """What is not done where it would change nothing."""

    def rig(self, distortion=()):
        camera = Camera((60, 80), np.array([[90.0, 0, 40], [0, 90, 30], [0, 0, 1]]), distortion)
        return Rig(Camera((30, 40)), camera, np.diag([0.5, 0.5, 1.0]))

    def test_frames_on_their_own_grid_stay(self):
        frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        align = Alignment(self.rig())
        assert align.keeps_visible and align.visible(frame) is frame
        assert not Alignment(self.rig(), (30, 40)).keeps_visible
        assert not Alignment(self.rig((0.1, 0, 0, 0, 0))).keeps_visible
        with pytest.raises(FrameError, match="NaN"):
            align.visible(np.full((60, 80), np.nan, np.float32))

    @pytest.mark.parametrize("size", [(60, 80), (20, 30)])
    def test_look_up_first_or_on_the_way(self, size):
        """Enlarged or made smaller: the same picture as from counts that were looked up before."""
        counts = np.random.default_rng(0).integers(0, 65536, (30, 40), np.uint16)
        table = np.sqrt(np.linspace(0, 1, 65536, dtype=np.float32))
        align = Alignment(self.rig(), size)
        np.testing.assert_allclose(
            align.infrared(counts, table=table), align.infrared(table[counts]), atol=1e-6
        )
