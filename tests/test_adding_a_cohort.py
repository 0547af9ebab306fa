"""What docs/adding-a-cohort.md shows is true: its cohort prepares, and its excerpts stand in the code."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import polars as pl
import pytest

from trajlm.cohorts import COHORTS
from trajlm.config import PrepareConfig
from trajlm.prepare import prepare

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/adding-a-cohort.md").read_text()
BLOCKS = re.findall(r"```python\n# (trajlm/\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
EXCERPTS = [(file, text) for file, text in BLOCKS if (ROOT / file).exists()]
COMPLETE = {Path(file).stem: text for file, text in BLOCKS if not (ROOT / file).exists()}


def test_every_block_of_code_is_checked_here() -> None:
    assert PAGE.count("```python") == len(BLOCKS) == len(EXCERPTS) + 1
    assert set(COMPLETE) == {"ward"}


@pytest.mark.parametrize(("file", "text"), EXCERPTS)
def test_an_excerpt_stands_in_its_file(file: str, text: str) -> None:
    assert text in (ROOT / file).read_text()


def test_every_file_and_setting_that_is_named_exists() -> None:
    for name in re.findall(r"`((?:trajlm|tests|recipes)/[\w/.-]+\.\w+)`", PAGE):
        assert (ROOT / name).is_file(), name
    for name in ("result_times", "aps_at_admission", "paper_faithful"):
        assert f"`{name}" in PAGE
        assert name in PrepareConfig.__dataclass_fields__


def test_the_smallest_cohort_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ward.py").write_text(COMPLETE["ward"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COHORTS, "ward", "ward")
    importlib.invalidate_caches()
    raw = tmp_path / "raw"
    raw.mkdir()
    stays = [(i, f"p{i // 2}", 10 + i % 60, i % 5 == 0) for i in range(100)]
    lines = [f"{stay},{patient},{hours},{int(died)}" for stay, patient, hours, died in stays]
    (raw / "stays.csv").write_text("\n".join(["stay,patient,hours,died", *lines, "100,,,0", "0,p0,5,0"]) + "\n")
    ids = [stay for stay, *_ in stays] + [7, 7, 7, 999]
    hours, rates = [1.0] * 100 + [-1.0, 9e3, 2.0, 1.0], [80.0] * 102 + [None, 70.0]
    pulse = pl.DataFrame({"stay": ids, "hour": hours, "rate": rates})
    pulse.write_parquet(raw / "pulse.parquet")
    prepare(PrepareConfig(cohort="ward", raw=str(raw)), tmp_path / "prepared")
    manifest = json.loads((tmp_path / "prepared/manifest.json").read_text())
    assert manifest["tables"]["stays"]["reasons"] == {"length of stay is unknown": 1, "repeats one": 1}
    assert manifest["tables"]["pulse"]["kept"] == 100
    assert manifest["tables"]["pulse"]["reasons"] == {
        "after the patient left the unit": 1,
        "before admission to the unit": 1,
        "its stay is not in the cohort": 1,
        "no possible rate": 1,
    }
    assert [step["stays"] for step in manifest["attrition"]] == [101, 100]
    assert sum(split["vitals"] for split in manifest["events"].values()) == 100
    assert sum(manifest["patients"].values()) == 50
