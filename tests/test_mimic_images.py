"""Pictures of every kind a folder of X-rays may hold: shapes, depths, transparency, and files that are no picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mimic_example import ANNA, FIRST, read, reasons, rows, write_release
from PIL import Image

from trajlm.cohorts.mimic_images import LEAST_PIXELS, MISSING, TOO_SMALL, UNREADABLE, small_picture


def shown(path: Path, pixels: int = 24) -> np.ndarray:
    stored = small_picture(path, pixels)
    assert isinstance(stored, bytes)
    picture = Image.open(io.BytesIO(stored))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (pixels, pixels))
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("size", [(40, 40), (41, 97), (300, 20), (16, 19)])
def test_a_picture_of_any_shape_becomes_a_square(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (90, 90, 90)).save(tmp_path / "x.jpg")
    assert abs(shown(tmp_path / "x.jpg").mean() - 90) <= 2


def ramp(low: float, high: float) -> np.ndarray:
    """32 high, 64 wide: darkest on the left, brightest on the right."""
    return np.linspace(low, high, 64)[None, :].repeat(32, axis=0)


@pytest.mark.parametrize(("low", "high"), [(0, 65535), (0, 4095), (30000, 30100)])
def test_16_bits_are_spread_over_black_to_white_and_not_clipped(tmp_path: Path, low: int, high: int) -> None:
    Image.fromarray(ramp(low, high).astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "deep.png").rename(tmp_path / "deep.jpg")  # as a converter that keeps the name would leave it
    pixels = shown(tmp_path / "deep.jpg", 16)
    expected = ramp(0, 255)[0, 16:48].reshape(16, 2).mean(axis=1)  # the middle square, two columns to a pixel
    assert np.abs(pixels - expected).max() <= 5
    assert (np.diff(pixels, axis=1) > 0).all()


def test_the_other_depths_are_read_too(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 500, np.uint16)).save(tmp_path / "flat.png")
    assert shown(tmp_path / "flat.png").max() == 0
    Image.fromarray(ramp(0, 1).astype(np.float32)).save(tmp_path / "float.tif")
    assert (np.diff(shown(tmp_path / "float.tif", 16), axis=1) > 0).all()
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(tmp_path / "nan.tif")
    assert small_picture(tmp_path / "nan.tif", 24) == UNREADABLE
    Image.new("1", (32, 32), 1).save(tmp_path / "bits.png")
    assert shown(tmp_path / "bits.png").min() == 255
    Image.new("CMYK", (32, 32), (0, 0, 0, 255)).save(tmp_path / "ink.jpg")
    assert shown(tmp_path / "ink.jpg").max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_black(tmp_path: Path, mode: str) -> None:
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[:, :16, 3] = 0  # white, hidden
    Image.fromarray(pixels).convert("LA" if mode == "PA" else mode).save(tmp_path / "clear.png")
    seen = shown(tmp_path / "clear.png", 32)
    assert seen[:, :15].max() <= 1
    assert seen[:, 17:].min() >= 254


def test_files_that_show_no_chest_are_told_apart(tmp_path: Path) -> None:
    Image.new("L", (1, 1), 200).save(tmp_path / "point.png")
    Image.new("L", (4000, LEAST_PIXELS - 1), 200).save(tmp_path / "line.png")
    assert small_picture(tmp_path / "point.png", 24) == TOO_SMALL
    assert small_picture(tmp_path / "line.png", 24) == TOO_SMALL
    (tmp_path / "note.jpg").write_text("this is no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert small_picture(tmp_path / "note.jpg", 24) == UNREADABLE
    assert small_picture(tmp_path / "empty.jpg", 24) == UNREADABLE


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["JPEG", "PNG"]), st.integers(0, 1500), st.binary(max_size=8))
def test_a_torn_or_garbled_file_is_a_picture_or_unreadable(kind: str, cut: int, garbage: bytes) -> None:
    whole = io.BytesIO()
    Image.fromarray(ramp(0, 255).astype(np.uint8)).save(whole, kind)
    stored = io.BytesIO(whole.getvalue()[:cut] + garbage)
    came = small_picture(stored, 24)  # type: ignore[arg-type]
    assert came == UNREADABLE or (isinstance(came, bytes) and Image.open(io.BytesIO(came)).size == (24, 24))


def test_real_x_rays_look_like_themselves(shared_data: Path) -> None:
    pictures = [path for path in sorted((shared_data / "chest-xray").iterdir()) if path.suffix in (".jpg", ".png")]
    assert len(pictures) == 9
    for path in pictures:
        with Image.open(path) as picture:
            whole = picture.convert("L")
        side = min(whole.size)
        left, top = ((length - side) // 2 for length in whole.size)
        plain = whole.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BOX)
        assert np.corrcoef(shown(path, 32).ravel(), np.asarray(plain).ravel())[0, 1] > 0.95


def test_each_row_of_a_dirty_folder_is_kept_or_told_why_not(tmp_path: Path) -> None:
    raw = write_release(tmp_path / "raw")
    study = raw / f"cxr/files/p10/p{ANNA}/s1"
    made = {"deep": MISSING, "clear": MISSING, "point": TOO_SMALL, "note": UNREADABLE, "gone": MISSING}
    Image.fromarray(ramp(0, 65535).astype(np.uint16)).save(study / "deep.png")
    Image.new("RGBA", (30, 30), (255, 0, 0, 128)).save(study / "clear.png")
    Image.new("L", (1, 1)).save(study / "point.jpg")
    (study / "note.jpg").write_text("no picture")
    for name in ("deep", "clear"):
        (study / f"{name}.png").rename(study / f"{name}.jpg")
    header = ["dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"]
    lines = [[name, ANNA, 1, "AP", "21500101", f"{7 + n:02}0000"] for n, name in enumerate(made)]
    (raw / "cxr/mimic-cxr-2.0.0-metadata.csv").write_text(rows(header, lines))
    result = read(raw)
    assert result.images.select("stay_id", "hours_since_admission").rows() == [(FIRST, 1.0), (FIRST, 2.0)]
    assert reasons(result, "mimic-cxr-2.0.0-metadata") == {4: TOO_SMALL, 5: UNREADABLE, 6: MISSING}
