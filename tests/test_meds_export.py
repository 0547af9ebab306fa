from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from physionet2012_example import random_records, write_release

from trajlm import export
from trajlm.cohorts.synthetic import synthesize
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError
from trajlm.export import export_meds
from trajlm.prepare import prepare

SYNTHETIC = {"cohort": "synthetic", "bin_hours": 4.0, "window_hours": None, "discharge_notes": True}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two prepared folders, of invented stays with notes and pictures and of PhysioNet 2012's layout."""
    folder = tmp_path_factory.mktemp("export")
    synthesize(folder / "icu", 40, 1)
    prepare(PrepareConfig(raw=str(folder / "icu"), **SYNTHETIC), folder / "synthetic")
    write_release(folder / "sets", random_records(30))
    prepare(
        PrepareConfig(cohort="physionet2012", raw=str(folder / "sets"), window_hours=30.0), folder / "physionet2012"
    )
    for name in ("synthetic", "physionet2012"):
        export_meds(folder / name, folder / f"{name}-meds")
    return {name: folder / name for name in ("synthetic", "physionet2012", "synthetic-meds", "physionet2012-meds")}


def events(folder: Path) -> list[tuple]:
    """Every event in order, features by name, without pictures; hours to the microsecond and some."""
    named = {row["feature_id"]: row["name"] for row in json.loads((folder / "features.json").read_text())["features"]}
    frame = pl.read_parquet(folder / "events/*.parquet").filter(pl.col("image").is_null())
    told = []
    for stay, hours, modality, ids, values, text, _ in frame.iter_rows():
        held = None if ids is None else dict(zip((named[i] for i in ids), values, strict=True))
        told.append((stay, round(hours, 9), modality, held, text))
    return told


@pytest.mark.parametrize("name", ["synthetic", "physionet2012"])
def test_what_is_written_is_meds(places: dict[str, Path], name: str) -> None:
    meds = pytest.importorskip("meds")
    root = places[f"{name}-meds"]
    shards = sorted((root / meds.data_subdirectory).rglob("*.parquet"))
    assert {shard.parent.name for shard in shards} == {meds.train_split, meds.tuning_split, meds.held_out_split}
    codes = pq.read_table(root / meds.code_metadata_filepath)
    meds.CodeMetadataSchema.validate(codes)
    splits = pq.read_table(root / meds.subject_splits_filepath)
    meds.SubjectSplitSchema.validate(splits)
    meds.DatasetMetadataSchema.validate(json.loads((root / meds.dataset_metadata_filepath).read_text()))
    split_of = dict(zip(*(column.to_pylist() for column in splits.columns), strict=True))
    seen: set[int] = set()
    for shard in shards:
        table = pq.read_table(shard)
        meds.DataSchema.validate(table)
        rows = [(row["subject_id"], row["time"]) for row in table.to_pylist()]
        subjects = list(dict.fromkeys(subject for subject, _ in rows))
        place = {subject: i for i, subject in enumerate(subjects)}
        assert rows == sorted(rows, key=lambda row: (place[row[0]], row[1] is not None, row[1] or 0))
        assert not seen & set(subjects)
        seen |= set(subjects)
        assert {split_of[subject] for subject in subjects} == {shard.parent.name}
        assert set(table["code"].to_pylist()) <= set(codes["code"].to_pylist())
    assert seen == set(split_of)
    for file in (root / "labels").rglob("*.parquet"):
        meds.LabelSchema.validate(pq.read_table(file))


@pytest.mark.parametrize(("name", "window"), [("synthetic", None), ("physionet2012", 30.0)])
def test_reading_it_back_gives_the_same_events_targets_and_splits(
    places: dict[str, Path], tmp_path: Path, name: str, window: float | None
) -> None:
    root = places[f"{name}-meds"]
    mapping = str(root / "mapping.yaml")
    prepare(PrepareConfig(cohort="meds", raw=str(root), mapping=mapping, window_hours=window), tmp_path / "back")
    first, second = places[name], tmp_path / "back"
    assert events(first) == events(second)
    assert any(text for *_, text in events(first)) == (name == "synthetic")
    before, after = (pl.read_parquet(folder / "stays.parquet") for folder in (first, second))
    same = [column for column in after.columns if column != "target_length_of_stay_hours"]
    scores = {column for column in before.columns if column.startswith("score_")}
    assert set(before.columns) - set(after.columns) <= {"present_chest_xray"} | scores
    assert before.select(same).equals(after.select(same))
    hours = [frame["target_length_of_stay_hours"].cast(pl.Float32) for frame in (before, after)]
    assert hours[0].equals(hours[1], check_names=False, null_equal=True)
    manifest = json.loads((second / "manifest.json").read_text())
    assert manifest["split_source"] == "published"
    assert all(table["rejected"] == 0 for key, table in manifest["tables"].items() if key != "metadata/codes")
    kinds = [
        {(f["modality"], f["name"]): (f["kind"], f["unit"], f["aggregate"], f["observed_in_training"]) for f in
         json.loads((folder / "features.json").read_text())["features"] if f["observed_in_training"]}
        for folder in (first, second)
    ]  # fmt: skip
    assert kinds[0] == kinds[1]


def test_rows_agree_with_sql_over_the_prepared_folder(places: dict[str, Path]) -> None:
    prepared, root = places["synthetic"], places["synthetic-meds"]
    sql = duckdb.connect()
    sql.execute(f"create view rows as select * from read_parquet('{root}/data/**/*.parquet')")
    sql.execute(f"create view events as select * from read_parquet('{prepared}/events/*.parquet')")
    sql.execute(f"create view stays as select * from read_parquet('{prepared}/stays.parquet')")
    modality = "select split_part(code, '//', 1), count(*) from rows where code not like 'ICU%' group by 1"
    items = "select modality, sum(case when text is null then len(feature_ids) else 1 end) from events"
    items += " where image is null group by 1"
    assert dict(sql.execute(modality).fetchall()) == dict(sql.execute(items).fetchall())
    marks = dict(sql.execute("select code, count(*) from rows where code like 'ICU%' group by 1").fetchall())
    begun, ended = sql.execute("select count(*), count(hours_in_unit) from stays").fetchone()
    assert marks == {"ICU_ADMISSION": begun, "ICU_DISCHARGE": ended}
    late = """select count(*) from read_parquet('{}/labels/mortality/*.parquet') l
        join stays s on l.subject_id = stay_id where boolean_value != (target_mortality = 1)
            or abs(epoch(prediction_time - timestamp '2000-01-01') / 3600 - hours_in_unit) > 1e-6"""
    assert sql.execute(late.format(root)).fetchone() == (0,)
    patients = "select count(*) from rows join stays on rows.subject_id = stay_id where patient_id != stays.subject_id"
    assert sql.execute(patients).fetchone() == (0,)
    pictures = sql.execute("select count(*) from events where image is not null").fetchone()[0]
    assert pictures > 0
    assert f"{pictures} pictures of chest_xray are left out" in (root / "README.md").read_text()


def without_events(whole: Path, folder: Path) -> Path:
    (folder / "events").mkdir(parents=True)
    for name in ("manifest.json", "features.json", "stays.parquet"):
        (folder / name).write_bytes((whole / name).read_bytes())
    return folder


@pytest.mark.parametrize("held", [None, 0, 7])
def test_stays_without_events_are_subjects_all_the_same(
    places: dict[str, Path], tmp_path: Path, held: int | None
) -> None:
    bare = without_events(places["physionet2012"], tmp_path / "bare")
    stays = pl.read_parquet(bare / "stays.parquet")
    if held is not None:
        events = pl.read_parquet(places["physionet2012"] / "events/*.parquet")
        kept = events.filter(pl.col("stay_id") == stays["stay_id"][held])
        kept.write_parquet(bare / "events/part-00000.parquet")
    export_meds(bare, tmp_path / "out")
    rows = pl.read_parquet(tmp_path / "out/data/**/*.parquet")
    assert set(rows["subject_id"]) == set(stays["stay_id"])
    others = rows.filter(~pl.col("code").str.starts_with("ICU_"))
    assert set(others["subject_id"]) == (set() if held is None else {stays["stay_id"][held]})


def test_events_in_several_files_make_the_same_rows(places: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    whole, parts = places["synthetic"], without_events(places["synthetic"], tmp_path / "parts")
    frame = pl.read_parquet(whole / "events/*.parquet")
    third = frame["stay_id"].unique().sort().to_list()[13::13]
    cuts = [0, *third, frame["stay_id"].max() + 1]
    for number, (low, high) in enumerate(pairwise(cuts)):
        part = frame.filter(pl.col("stay_id").is_between(low, high, closed="left"))
        part.write_parquet(parts / f"events/part-{number:05d}.parquet")
    monkeypatch.setattr(export, "_BATCH_EVENTS", 7)
    export_meds(parts, tmp_path / "out")
    assert len(list((tmp_path / "out/data/train").iterdir())) > 1
    rows = []
    for root in (places["synthetic-meds"], tmp_path / "out"):
        shards = pl.concat(pl.read_parquet(file) for file in sorted((root / "data").rglob("*.parquet")))
        rows.append(shards.sort("subject_id", maintain_order=True))
    assert rows[0].equals(rows[1])
    frame.filter(pl.col("stay_id") == third[0]).write_parquet(parts / "events/part-99999.parquet")
    with pytest.raises(TrajlmError, match=f"stay {third[0]} is in no row of stays.parquet, or in two files"):
        export_meds(parts, tmp_path / "again")


def test_an_export_is_whole_or_absent(places: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held/file").touch()
    with pytest.raises(TrajlmError, match="held exists and is not empty"):
        export_meds(places["synthetic"], tmp_path / "held")
    with pytest.raises(TrajlmError, match="is not a prepared folder"):
        export_meds(tmp_path / "held", tmp_path / "out")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(export, "write_labels", fail)
    with pytest.raises(OSError, match="no space"):
        export_meds(places["synthetic"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["held"]


def test_the_mapping_says_how_it_is_read(places: dict[str, Path]) -> None:
    text = (places["physionet2012-meds"] / "mapping.yaml").read_text()
    assert text.startswith("# trajlm prepare --cohort meds --raw . --mapping mapping.yaml --window-hours 30 ")
    targets = yaml.safe_load(text)["targets"]
    assert targets == {name: f"labels/{column}/*.parquet" for name, column in
                       {"mortality": "mortality", "length_of_stay": "length_of_stay_hours"}.items()}  # fmt: skip
