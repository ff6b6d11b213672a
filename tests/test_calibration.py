"""Calibration of a rig that is known: boards through both lenses, and points by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine.alignment import Alignment, Camera, Rig, transfer
from fuseengine.calibration import find_board, from_boards, from_points
from fuseengine.cli import main
from fuseengine.errors import CalibrationError
from fuseengine.runtime.images import read_image, write_image
from tests.video.rig import INFRARED, VISIBLE, Renderer, board_poses, rig


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    """Fourteen pictures of a board by both cameras, as folders."""
    root, draw = tmp_path_factory.mktemp("boards"), Renderer(rig())
    for name in ("ir", "vis"):
        (root / name).mkdir()
    for index, board in enumerate(board_poses(14)):
        write_image(root / "ir" / f"{index}.png", draw.infrared(board.shade, seed=index))
        write_image(root / "vis" / f"{index}.png", draw.visible(board.shade))
    return root


def misplaced(found: Rig, truth: Rig) -> np.ndarray:
    """How far infrared places of the middle of the visible picture are off, in pixels."""
    row, column = np.mgrid[60:301:20, 80:401:20].astype(np.float64)
    places = np.stack([column, row], -1).reshape(-1, 2)

    def infrared(r: Rig) -> np.ndarray:
        return r.infrared.distort(transfer(r.homography, r.visible.undistort(places)))

    return np.linalg.norm(infrared(found) - infrared(truth), axis=-1)


class TestBoards:
    def test_the_rig_is_found(self, boards):
        found = from_boards(boards / "ir", boards / "vis", (9, 6))
        assert len(found.errors_px) >= 8 and found.rig.error_px < 0.2
        assert max(found.lens_errors_px) < 0.2
        off = misplaced(found.rig, rig())
        assert off.mean() < 0.3 and off.max() < 1.0
        assert found.rig.infrared.distortion[0] < -0.1 and found.rig.visible.distortion[0] < -0.1
        assert found.rig.visible.matrix[0, 0] == pytest.approx(VISIBLE.matrix[0, 0], rel=0.02)

    def test_straight_lenses_are_told_and_fit_less(self, boards):
        bent, fitted = (
            from_boards(boards / "ir", boards / "vis", (9, 6), lens=lens) for lens in (False, True)
        )
        assert bent.lens_errors_px == (None, None) and bent.rig.visible.matrix is None
        assert bent.rig.error_px > 1.3 * fitted.rig.error_px

    def test_the_command(self, boards, tmp_path, capsys):
        out = tmp_path / "rig.json"
        folders = ["--infrared", str(boards / "ir"), "--visible", str(boards / "vis")]
        assert main(["calibrate", *folders, "--board", "9x6", "-o", str(out)]) == 0
        told = capsys.readouterr().out
        assert "reprojection error 0.1" in told and "infrared lens: calibrated to" in told
        align = Alignment(Rig.load(out))
        assert align.size == VISIBLE.size and align.covered > 0.8
        picture = read_image(tmp_path / "rig.png")
        assert picture.shape == (*VISIBLE.size, 3)
        # Inverted polarity: where the cameras agree, red is the complement of cyan.
        middle = picture[120:240, 160:320].astype(float)
        assert np.corrcoef(middle[..., 0].ravel(), middle[..., 1].ravel())[0, 1] < -0.8

    def test_pictures_without_a_board_are_skipped_and_named(self, boards, tmp_path):
        for name, size in (("ir", INFRARED.size), ("vis", VISIBLE.size)):
            (tmp_path / name).mkdir()
            for index in range(2):
                picture = read_image(boards / name / f"{index}.png")
                write_image(tmp_path / name / f"{index}.png", picture)
            write_image(tmp_path / name / "empty.png", np.full(size, 90, np.uint8))
        found = from_boards(tmp_path / "ir", tmp_path / "vis", (9, 6))
        assert list(found.skipped) == ["empty"] and "no 9x6 corners" in found.skipped["empty"]
        assert found.lens_errors_px == (None, None)  # two views are too few

    def test_refusals(self, tmp_path):
        with pytest.raises(CalibrationError, match="expected inner corners, at least 3 by 3"):
            from_boards(tmp_path, tmp_path, (9, 2))
        for name in ("ir", "vis"):
            (tmp_path / name).mkdir()
        with pytest.raises(CalibrationError, match="no two pictures of one name"):
            from_boards(tmp_path / "ir", tmp_path / "vis", (9, 6))
        for index, size in enumerate(((40, 60), (40, 61))):
            for name in ("ir", "vis"):
                write_image(tmp_path / name / f"{index}.png", np.zeros(size, np.uint8))
            if not index:
                with pytest.raises(CalibrationError, match="no board of 9x6 inner corners was"):
                    from_boards(tmp_path / "ir", tmp_path / "vis", (9, 6))
        with pytest.raises(CalibrationError, match="got 40x61 .*but 40x60"):
            from_boards(tmp_path / "ir", tmp_path / "vis", (9, 6))


def test_a_board_of_inverted_polarity():
    draw, board = Renderer(rig(lens=False)), board_poses(1)[0]
    plain = find_board(draw.visible(board.shade)[..., 0], (9, 6))
    inverted = find_board(255 - draw.visible(board.shade)[..., 0], (9, 6))
    truth = transfer(board.pose, np.stack(np.meshgrid(range(9), range(6)), -1).reshape(-1, 2) * 1.0)
    for found in (plain, inverted):
        off = min(np.abs(found - order).max() for order in (truth, truth[::-1]))
        assert off < 0.5


class TestPoints:
    HEADER = "visible_x,visible_y,infrared_x,infrared_y\n"

    def test_a_homography_from_chosen_points(self, tmp_path, capsys):
        truth = rig(lens=False)
        places = np.array([[50, 40], [430, 60], [400, 320], [70, 300], [240, 180.0]])
        rows = np.concatenate([places, transfer(truth.homography, places)], 1)
        text = self.HEADER + "\n".join(",".join(map(str, row)) for row in rows)
        (tmp_path / "points.csv").write_text(text)
        found = from_points(tmp_path / "points.csv", INFRARED.size, VISIBLE.size)
        assert misplaced(found.rig, truth).max() < 1e-3 and found.rig.error_px < 1e-3
        for name, size in (("ir", INFRARED.size), ("vis", VISIBLE.size)):
            write_image(tmp_path / f"{name}.png", np.zeros(size, np.uint8))
        files = ["--infrared", str(tmp_path / "ir.png"), "--visible", str(tmp_path / "vis.png")]
        points = ["--points", str(tmp_path / "points.csv"), "-o", str(tmp_path / "rig.json")]
        assert main(["calibrate", *files, *points]) == 0
        assert "infrared lens: straight (not calibrated)" in capsys.readouterr().out
        assert Rig.load(tmp_path / "rig.json").infrared == Camera(INFRARED.size)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("1,2,3,4\n5,6,7,8\n", "got 2 points; expected at least 4"),
            ("1,2,3\n", "cannot be read as points"),
            ("1,2,3,nan\n" * 4, "not finite"),
            ("1,2,3,4\n" * 5, "no homography joins"),
        ],
    )
    def test_refusals(self, rows, message, tmp_path):
        (tmp_path / "points.csv").write_text(self.HEADER + rows)
        with pytest.raises(CalibrationError, match=message):
            from_points(tmp_path / "points.csv", INFRARED.size, VISIBLE.size)
        with pytest.raises(CalibrationError, match="cannot be read as points"):
            from_points(tmp_path / "none.csv", INFRARED.size, VISIBLE.size)
