from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from cohort_example import read_cohort
from conftest import TRAJLM, command, contents
from hypothesis import given, settings
from hypothesis import strategies as st
from physionet2012_example import (
    OUTCOMES_HEADER,
    REAL,
    needs_real,
    outcome,
    random_records,
    real_lines,
    record,
    write_release,
)

from trajlm.cohorts import physionet2012
from trajlm.config import PrepareConfig
from trajlm.dataset import load_prepared
from trajlm.errors import TrajlmError, UnexpectedInput
from trajlm.grouping import (
    Catalogue,
    LeftOut,
    build_events,
    feature_statistics,
    fit_features,
    group_measurements,
    merge_statistics,
)
from trajlm.prepare import prepare
from trajlm.schema import (
    DOCUMENT_COLUMNS,
    EVENT_COLUMNS,
    IMAGE_COLUMNS,
    MEASUREMENT_COLUMNS,
    SCORE_PREFIX,
    SPLITS,
    SPOOLED_COLUMNS,
    STAY_COLUMNS,
    Feature,
    Modality,
    empty,
    with_measured,
)
from trajlm.shards import plan_shards
from trajlm.splits import RARE

ROOT = Path(__file__).parents[1]


def config(raw: Path, **options) -> PrepareConfig:
    return PrepareConfig(cohort="physionet2012", raw=str(raw), **options)


def events_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "events" / "*.parquet")


def features_of(folder: Path) -> list[dict]:
    return json.loads((folder / "features.json").read_text())["features"]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), random_records(60))


@pytest.fixture(scope="module")
def prepared(release, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(config(release), out)
    return out


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("real") / "out"
    prepare(config(REAL), out)
    return out


# The folder


def check_folder(folder: Path) -> dict:
    """What the contract says of any prepared folder; returns the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    modalities = [m["name"] for m in manifest["modalities"]]
    events, stays, features = events_of(folder), pl.read_parquet(folder / "stays.parquet"), features_of(folder)
    assert dict(events.schema) == EVENT_COLUMNS
    own = {name for name in stays.columns if name.startswith(SCORE_PREFIX)}  # where the release has severity scores
    assert set(STAY_COLUMNS) | {"split"} | {f"present_{m}" for m in modalities} | own == set(stays.columns)
    order = {name: i for i, name in enumerate(modalities)}
    keys = [(s, h, order[m]) for s, h, m in events.select(events.columns[:3]).iter_rows()]
    assert keys == sorted(keys)
    assert stays["stay_id"].is_sorted()
    assert stays["stay_id"].is_unique().all()
    assert [f["feature_id"] for f in features] == list(range(len(features)))
    at = [order[f["modality"]] for f in features]
    assert at == sorted(at)
    numeric = events.select("modality", "feature_ids", "values").explode("feature_ids", "values")
    of = pl.DataFrame({"feature_ids": range(len(features)), "of": [f["modality"] for f in features]})
    matched = numeric.join(of.cast({"feature_ids": pl.Int32}), on="feature_ids")
    assert matched.height == numeric.height
    assert (matched["modality"] == matched["of"]).all()
    for name in modalities:
        holds = set(events.filter(pl.col("modality") == name)["stay_id"])
        assert holds == set(stays.filter(pl.col(f"present_{name}"))["stay_id"])
    for split in SPLITS:
        mine = stays.filter(pl.col("split") == split)
        assert manifest["stays"][split] == mine.height == sum(manifest["combinations"][split].values())
        known = mine["target_mortality"].drop_nulls()
        assert manifest["prevalence"][split]["target_mortality"]["positive"] == known.sum()
        counts = events.filter(pl.col("stay_id").is_in(mine["stay_id"].implode()))["modality"].to_list()
        assert manifest["events"][split] == {name: counts.count(name) for name in modalities}
    for table, account in manifest["tables"].items():
        assert account["read"] == account["kept"] + account["rejected"]
        assert sum(account["reasons"].values()) == account["rejected"]
        if account["rejected"]:
            assert pl.read_parquet(folder / "rejected" / f"{table}.parquet").height == account["rejected"]
    return manifest


def test_a_prepared_folder_keeps_its_contract(prepared, release):
    manifest = check_folder(prepared)
    assert set(manifest["inputs"]) == {"Outcomes-a.txt", *(f"set-a/{i}.txt" for i in range(1001, 1061))}
    assert manifest["split_source"] == "own"
    assert manifest["settings"]["raw"] == str(release)
    assert manifest["bin_hours"] == 0


@needs_real
def test_the_real_set_is_whole(real):
    manifest = check_folder(real)
    assert manifest["stays"] == {"train": 2800, "tuning": 600, "held_out": 600}
    shares = [manifest["prevalence"][split]["target_mortality"]["prevalence"] for split in SPLITS]
    assert all(abs(share - 554 / 4000) < 0.03 for share in shares)
    kept = sum(row["kept"] for row in manifest["tables"].values())
    urine = Counter((stay, time) for stay, _, time, name, _ in real_lines() if name == "Urine")
    added_up = sum(urine.values()) - len(urine)
    # less a RecordID and an outcome per stay, and amounts of the same minute stand as one
    assert events_of(real)["values"].list.len().sum() == kept - 2 * 4000 - added_up


def test_the_same_release_gives_the_same_bytes(prepared, release, tmp_path):
    prepare(config(release), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(prepared)


# Statistics


def by_feature(folder: Path, split: str) -> dict[int, list[float]]:
    stays = pl.read_parquet(folder / "stays.parquet")
    chosen = set(stays.filter(pl.col("split") == split)["stay_id"])
    found = defaultdict(list)
    for stay_id, _, _, ids, values, _, _ in events_of(folder).iter_rows():
        if stay_id in chosen:
            for feature_id, value in zip(ids, values, strict=True):
                found[feature_id].append(value)
    return found


def check_statistics(folder: Path) -> None:
    seen = by_feature(folder, "train")
    for feature in features_of(folder):
        values = seen.get(feature["feature_id"], [])
        assert feature["observed_in_training"] == len(values)
        if feature["kind"] == "category":
            assert set(values) == {1.0}
            assert (feature["mean"], feature["std"]) == (0, 1)
        elif not values:
            assert (feature["mean"], feature["std"]) == (0, 1)
        else:
            logs = [math.copysign(math.log1p(abs(v)), v) for v in values]
            assert feature["mean"] == pytest.approx(statistics.fmean(logs), rel=1e-9)
            assert feature["std"] == pytest.approx(statistics.pstdev(logs) or 1, rel=1e-7)


def test_statistics_are_those_of_the_training_split(prepared):
    check_statistics(prepared)


@needs_real
def test_statistics_of_the_real_set_are_those_of_its_training_split(real):
    check_statistics(real)
    assert all(f["observed_in_training"] for f in features_of(real))


def altered(release: Path, stay_id: int, into: Path) -> Path:
    """The release with other values of every heart rate of one stay."""
    records = {int(p.stem): p.read_text() for p in (release / "set-a").iterdir()}
    lines = records[stay_id].splitlines()
    changed = [",".join([*x.split(",")[:2], "199"]) if ",HR," in x else x for x in lines]
    assert changed != lines
    records[stay_id] = "\n".join(changed) + "\n"
    return write_release(into, records)


@pytest.mark.parametrize("split", SPLITS)
def test_only_the_training_split_moves_what_is_fitted(prepared, release, tmp_path, split):
    stay_id = pl.read_parquet(prepared / "stays.parquet").filter(pl.col("split") == split)["stay_id"][0]
    prepare(config(altered(release, stay_id, tmp_path / "raw")), tmp_path / "out")
    before, after = contents(prepared), contents(tmp_path / "out")
    assert after["stays.parquet"] == before["stays.parquet"]
    assert after["events/part-00000.parquet"] != before["events/part-00000.parquet"]
    assert (after["features.json"] == before["features.json"]) == (split != "train")


def test_a_category_that_training_never_shows_leaves_with_the_events_that_hold_nothing_else(tmp_path):
    rows = {1: "01:00,MechVent,1", 2: "02:00,HR,70", 3: "03:00,MechVent,0 04:00,MechVent,0 04:00,FiO2,0.5"}
    raw = write_release(tmp_path / "raw", {i: record(i, text) for i, text in rows.items()})
    (tmp_path / "splits.csv").write_text("stay_id,split\n1,train\n2,tuning\n3,held_out\n")
    prepare(config(raw, splits=str(tmp_path / "splits.csv")), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = {f["name"] for f in features_of(tmp_path / "out")}
    assert "MechVent=yes" in names
    assert "MechVent=no" not in names
    support = events_of(tmp_path / "out").filter((pl.col("stay_id") == 3) & (pl.col("modality") == "support"))
    assert support["hours_since_admission"].to_list() == [4.0]
    assert support["values"].to_list() == [[0.5]]
    assert any("2 measurements dropped, 1 events" in note and "MechVent=no" in note for note in manifest["notes"])
    # FiO2 and HR are never seen in training: continuous features keep a place, mean 0 and deviation 1.
    unseen = [f for f in features_of(tmp_path / "out") if f["name"] in ("FiO2", "HR")]
    assert [(f["mean"], f["std"], f["observed_in_training"]) for f in unseen] == [(0, 1, 0)] * 2
    check_statistics(tmp_path / "out")
    assert manifest["split_source"] == "published"


# Events


AMOUNTS = ("Urine", "c")


def grouped_by_hand(measurements: list[tuple], order: dict[str, int], bin_hours: float) -> list[tuple]:
    """(stay, hours, modality, {feature: value}) in order, by plain loops; the last value stands, amounts add up."""
    width = 1 if bin_hours == 0 else round(bin_hours * 60)
    groups: dict[tuple, list[tuple]] = defaultdict(list)
    for stay_id, hours, modality, feature, value, *_ in measurements:
        groups[stay_id, modality, round(hours * 60) // width].append((hours, feature, value))
    events = []
    for (stay_id, modality, _), rows in groups.items():
        held = {}
        for _hours, feature, value in sorted(rows, key=lambda row: row[0]):
            held[feature] = held.get(feature, 0.0) + value if feature in AMOUNTS else value
        events.append((stay_id, max(row[0] for row in rows), modality, held))
    return sorted(events, key=lambda event: (event[0], event[1], order[event[2]]))


@needs_real
@pytest.mark.parametrize("bin_hours", [0.0, 1.0, 0.25])
def test_events_are_those_of_a_plain_loop_on_twenty_real_stays(real, bin_hours, tmp_path):
    out = real
    if bin_hours:
        out = tmp_path / "out"
        prepare(config(REAL, bin_hours=bin_hours), out)
    timelines = read_cohort(physionet2012, REAL, config(REAL), tmp_path / "read")
    chosen = random.Random(1).sample(timelines.stays["stay_id"].to_list(), 20)
    order = {m.name: i for i, m in enumerate(timelines.raw.modalities)}
    mine = timelines.measurements.filter(pl.col("stay_id").is_in(chosen))
    wanted = grouped_by_hand(list(mine.iter_rows()), order, bin_hours)
    names = [f["name"] for f in features_of(out)]
    found = events_of(out).filter(pl.col("stay_id").is_in(chosen))
    assert found.height == len(wanted) > 500
    for (stay_id, hours, modality, held), row in zip(wanted, found.iter_rows(named=True), strict=True):
        assert (row["stay_id"], row["hours_since_admission"], row["modality"]) == (stay_id, hours, modality)
        assert row["feature_ids"] == sorted(row["feature_ids"])
        values = dict(zip((names[i] for i in row["feature_ids"]), row["values"], strict=True))
        assert values == pytest.approx(held, rel=1e-6)


PANEL = (Modality("static", "numeric", static=True), Modality("panel", "numeric"), Modality("note", "text"))
TRIO = tuple(Feature("panel", name, aggregate="sum" if name in AMOUNTS else "last") for name in "abc")


CATALOGUE = Catalogue((*PANEL, Modality("picture", "image")), TRIO)
Rows = dict[str, pl.DataFrame]


def tiny(measurements: list[tuple], documents: Sequence[tuple] = (), images: Sequence[tuple] = ()) -> Rows:
    wanted = {
        "measurements": (measurements, MEASUREMENT_COLUMNS),
        "documents": (documents, DOCUMENT_COLUMNS),
        "images": (images, IMAGE_COLUMNS),
    }
    frames = {
        kind: pl.DataFrame(list(rows), schema=columns, orient="row") if rows else empty(columns)
        for kind, (rows, columns) in wanted.items()
    }
    return frames | {"measurements": with_measured(frames["measurements"])}


def built(rows: Rows, bin_hours: float) -> pl.DataFrame:
    cells, _ = group_measurements(CATALOGUE, rows["measurements"], bin_hours)
    fitted = fit_features(CATALOGUE, feature_statistics(cells, pl.Series([1, 2])), 2)
    events, lost = build_events(CATALOGUE, cells, rows["documents"], rows["images"], fitted)
    assert lost == LeftOut(0, 0)
    return events


measured = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.integers(0, 300), st.sampled_from("abc"), st.integers(-50, 50)), max_size=60
)


@settings(max_examples=60, deadline=None)
@given(measured, st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]))
def test_any_measurements_group_as_a_plain_loop_groups_them(drawn, bin_hours):
    rows = [(s, minute / 60, "panel", name, float(value)) for s, minute, name, value in drawn]
    events = built(tiny(rows), bin_hours)
    wanted = grouped_by_hand(rows, {"panel": 0}, bin_hours)
    found = [
        (s, h, m, dict(zip(("abc"[i] for i in ids), values, strict=True)))
        for s, h, m, ids, values, _, _ in events.iter_rows()
    ]
    assert found == wanted


late = st.lists(
    st.tuples(
        st.sampled_from([1, 2]), st.integers(0, 200), st.integers(-100, 90), st.sampled_from("abc"), st.integers(0, 50)
    ),
    max_size=50,
)


@settings(max_examples=80, deadline=None)
@given(late, st.sampled_from([0.0, 0.5, 2.0]))
def test_the_value_measured_last_stands_whenever_it_was_known(drawn, bin_hours):
    """A plain loop over the rows as they come to be known: what was measured before the newest known never stands."""
    rows = [(s, known / 60, "panel", name, float(v), (known - lag) / 60) for s, known, lag, name, v in drawn]
    frame = pl.DataFrame(rows, schema=SPOOLED_COLUMNS, orient="row")
    cells, superseded = group_measurements(CATALOGUE, frame, bin_hours)
    bins: dict[tuple, list] = {}
    for at, (stay, known, _, name, value, measured) in enumerate(rows):
        bin_of = math.floor(known / bin_hours + 1e-6) if bin_hours else math.floor(known * 60 + 1e-6)
        bins.setdefault((stay, bin_of, "abc".index(name)), []).append((measured, known, at, value))
    wanted, newest, gone = {}, {}, 0
    for (stay, bin_of, feature), held in sorted(bins.items()):
        if "abc"[feature] in AMOUNTS:
            wanted[stay, bin_of, feature] = sum(value for *_, value in held)
            continue
        measured, _, _, value = max(held)
        stands = measured >= newest.get((stay, feature), -math.inf) - 1e-9
        newest[stay, feature] = max(measured, newest.get((stay, feature), -math.inf))
        gone += len(held) - stands
        if stands:
            wanted[stay, bin_of, feature] = value
    found = {tuple(key): value for *key, value in cells.select("stay_id", "bin", "feature_index", "value").rows()}
    assert found == pytest.approx(wanted)
    assert superseded == gone
    for stay, bin_of, hours in cells.select("stay_id", "bin", "hours").rows():
        known_by = [known for (s, b, _), held in bins.items() if (s, b) == (stay, bin_of) for _, known, *_ in held]
        assert hours <= max(known_by) + 1e-12
        sums = [held for (s, b, f), held in bins.items() if (s, b) == (stay, bin_of) and "abc"[f] in AMOUNTS]
        assert all(known <= hours + 1e-12 for held in sums for _, known, *_ in held), "an event has seen all it sums"


def test_an_event_of_a_bin_is_dated_by_its_last_row_and_never_later():
    rows = [(1, 0.0, "panel", "a", 1.0), (1, 0.75, "panel", "b", 2.0), (1, 1.0, "panel", "a", 3.0)]
    events = built(tiny(rows), 1.0)
    assert events["hours_since_admission"].to_list() == [0.75, 1.0]
    assert events["values"].to_list() == [[1.0, 2.0], [3.0]]


def test_notes_and_pictures_are_events_of_their_own_and_ties_follow_the_modalities():
    notes = [(1, 2.0, "note", "first"), (1, 2.0, "note", "second"), (2, 0.5, "note", "other")]
    events = built(tiny([(1, 2.0, "panel", "a", 1.0)], notes, [(1, 2.0, "picture", b"png")]), 0.0)
    assert events.select("stay_id", "modality", "text", "image").rows() == [
        (1, "panel", None, None),
        (1, "note", "first", None),
        (1, "note", "second", None),
        (1, "picture", None, b"png"),
        (2, "note", "other", None),
    ]
    alone = built(tiny([], notes), 0.0)
    assert alone["text"].to_list() == ["first", "second", "other"]


@settings(max_examples=60, deadline=None)
@given(measured, st.lists(st.integers(0, 3), min_size=2, max_size=2))
def test_statistics_of_parts_are_those_of_the_whole_and_of_numpy(drawn, part_of):
    rows = [(s, minute / 60, "panel", name, float(value)) for s, minute, name, value in drawn]
    cells, _ = group_measurements(CATALOGUE, tiny(rows)["measurements"], 1.0)
    ids = pl.Series([1, 2])
    parts = [
        cells.filter(pl.Series(cells["stay_id"]).is_in([s for s in (1, 2) if part_of[s - 1] == k])) for k in range(4)
    ]
    merged = merge_statistics(feature_statistics(part, ids) for part in parts)
    assert merged["feature_index"].to_list() == sorted(set(cells["feature_index"]))
    for row in merged.iter_rows(named=True):
        mine = cells.filter(pl.col("feature_index") == row["feature_index"])
        x = [math.copysign(math.log1p(abs(v)), v) for v in mine["value"].to_list()]
        assert (row["count"], row["stays"]) == (len(x), mine["stay_id"].n_unique())
        assert (row["least"], row["most"]) == pytest.approx((min(x), max(x)))
        assert row["mean"] == pytest.approx(statistics.fmean(x))
        assert row["squares"] == pytest.approx(statistics.pvariance(x) * len(x), abs=1e-9)


def test_shards_and_processes_change_nothing(release, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trajlm.prepare.plan_shards", partial(plan_shards, weight=150))
    for processes in (1, 2):
        out = tmp_path / str(processes)
        prepare(config(release, processes=processes), out)
        assert len(list((out / "events").iterdir())) > 5
        assert events_of(out).equals(events_of(prepared))
        assert (out / "stays.parquet").read_bytes() == (prepared / "stays.parquet").read_bytes()
        for mine, theirs in zip(features_of(out), features_of(prepared), strict=True):
            assert mine == pytest.approx(theirs)
        manifest, other = (json.loads((folder / "manifest.json").read_text()) for folder in (out, prepared))
        apart = {"settings": 0, "bytes": 0}
        assert {**manifest, **apart} == {**other, **apart}
        assert not (out / "spool").exists()


def test_a_feature_that_too_few_training_stays_hold_is_left_out():
    features = tuple(Feature("panel", name, least_share=share) for name, share in (("a", 0.5), ("b", 0.51), ("c", 0.0)))
    catalogue = Catalogue(PANEL, features)
    rows = [
        (1, 0.0, "panel", "a", 1.0),
        (1, 0.0, "panel", "b", 1.0),
        (1, 2.0, "panel", "b", 1.0),
        (2, 0.0, "panel", "b", 2.0),
    ]
    cells, _ = group_measurements(catalogue, tiny(rows)["measurements"], 0.0)
    fitted = fit_features(catalogue, feature_statistics(cells, pl.Series([1])), 2)
    assert [f.name for f in fitted] == ["a", "c"], "b is held by one training stay of two, and stay 2 does not train"


def test_stored_rejects_are_capped_and_all_are_counted(release, prepared, tmp_path):
    prepare(config(release, rejected_rows=3), tmp_path / "out")
    table = json.loads((tmp_path / "out" / "manifest.json").read_text())["tables"]["set-a"]
    whole = json.loads((prepared / "manifest.json").read_text())["tables"]["set-a"]
    stored = pl.read_parquet(tmp_path / "out" / "rejected" / "set-a.parquet")
    assert {**table, "stored": 0} == {**whole, "stored": 0}
    assert whole["stored"] == whole["rejected"] > table["stored"] == stored.height
    assert dict(stored["reason"].value_counts().iter_rows()) == {r: min(n, 3) for r, n in table["reasons"].items()}


# Splits


@needs_real
def test_strata_of_the_real_set_are_in_proportion(real):
    combos = json.loads((real / "manifest.json").read_text())["combinations"]
    for held in set().union(*combos.values()):
        total = sum(combos[split].get(held, 0) for split in SPLITS)
        if total >= RARE:
            assert abs(combos["train"].get(held, 0) - 0.7 * total) <= 2


def test_one_set_learned_from_another_judged_by(tmp_path, monkeypatch):
    """As docs/evidence.md shows it: the code and the command that stand there."""
    records = random_records(45)
    sets = {"a": dict(list(records.items())[:30]), "b": dict(list(records.items())[30:])}
    for letter, own in sets.items():
        write_release(tmp_path / "physionet2012", own, letter=letter)
    told = (ROOT / "docs/evidence.md").read_text().split("## Splits")[1]
    _, code, words, *_ = re.findall(r"```(?:python|sh)\n(.*?)```", told, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/evidence.md", "exec"), {})
    program, *flags = shlex.split(words)
    assert program == "trajlm"
    command(*TRAJLM, *(flag.replace("recipes/", f"{ROOT}/recipes/") for flag in flags))
    split_of = dict(load_prepared(tmp_path / "runs/a-to-b/prepared").stays.select("stay_id", "split").iter_rows())
    assert {stay for stay, split in split_of.items() if split == "held_out"} == set(sets["b"])
    assert set(split_of) == set(records)
    assert {split_of[stay] for stay in sets["a"]} == {"train", "tuning"}


def test_published_splits_are_taken_as_they_are(tmp_path, release):
    wanted = {1001 + i: ("held_out", "train", "train", "tuning")[i % 4] for i in range(60)}
    with (tmp_path / "splits.csv").open("w") as stream:
        csv.writer(stream).writerows([("split", "stay_id"), *((s, i) for i, s in reversed(wanted.items()))])
    prepare(config(release, splits=str(tmp_path / "splits.csv")), tmp_path / "out")
    stays = pl.read_parquet(tmp_path / "out" / "stays.parquet")
    assert dict(stays.select("stay_id", "split").iter_rows()) == wanted
    check_statistics(tmp_path / "out")
    (tmp_path / "splits.csv").write_text((tmp_path / "splits.csv").read_text().replace("tuning", "held_out"))
    with pytest.raises(TrajlmError, match="the file of splits is another"):
        prepare(config(release, splits=str(tmp_path / "splits.csv")), tmp_path / "out")


# What is left behind


def test_a_fault_leaves_nothing_behind(tmp_path):
    raw = write_release(tmp_path / "raw", {1: record(1), 2: record(2, "01:00,HR,fast")})
    with pytest.raises(UnexpectedInput, match=r"2\.txt, line 8, column Value"):
        prepare(config(raw), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    with pytest.raises(TrajlmError, match=r"prepare\.raw is not set"):
        prepare(PrepareConfig(cohort="physionet2012"), tmp_path / "out")


@pytest.mark.parametrize("moment", ["fit_features", "_version"])
def test_a_killed_run_leaves_nothing_that_looks_whole_and_is_made_good(prepared, release, tmp_path, moment):
    code = (
        f"import os, signal, sys; from pathlib import Path; from trajlm import prepare as p; "
        f"from trajlm.config import PrepareConfig; p.{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
        f"p.prepare(PrepareConfig(cohort='physionet2012', raw=sys.argv[1]), Path(sys.argv[2]))"
    )
    arguments = [sys.executable, "-c", code, str(release), str(tmp_path / "out")]
    killed = subprocess.run(arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", ".out.lock"}
    assert not list(tmp_path.rglob("manifest.json"))
    prepare(config(release), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == contents(prepared)


def test_a_second_run_returns_early_and_another_release_or_setting_is_named(tmp_path, capsys):
    raw = write_release(tmp_path / "raw", random_records(20))
    out = raw / "out"  # inside the raw folder: must not count as a change of it
    prepare(config(raw), out)
    before = contents(out)
    capsys.readouterr()
    prepare(config(raw), out)
    assert "already prepared" in capsys.readouterr().out
    (raw / "README").write_text("not read by anyone")
    prepare(config(raw), out)
    assert "already prepared" in capsys.readouterr().out
    for options, message in (({"seed": 3}, "seed was 0 and is now 3"), ({"window_hours": 24.0}, "window_hours was 48")):
        with pytest.raises(TrajlmError, match=message):
            prepare(config(raw, **options), out)
    write_release(raw, {9: record(9)}, letter="b")
    with pytest.raises(TrajlmError, match=r"Outcomes-b\.txt is new"):
        prepare(config(raw), out)
    (raw / "Outcomes-b.txt").unlink()
    (raw / "set-b" / "9.txt").unlink()
    (raw / "set-b").rmdir()
    file = raw / "set-a" / "1001.txt"
    file.write_text(file.read_text() + "47:59,HR,71\n")
    with pytest.raises(TrajlmError, match=r"set-a/1001\.txt has changed"):
        prepare(config(raw), out)
    assert contents(out) == before


def test_a_damaged_folder_is_not_called_prepared(tmp_path):
    raw = write_release(tmp_path / "raw", random_records(20))
    prepare(config(raw), tmp_path / "out")
    part = next((tmp_path / "out" / "events").iterdir())
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(TrajlmError, match=rf"events/{part.name} has \d+ bytes, not the \d+ written; remove"):
        prepare(config(raw), tmp_path / "out")
    part.unlink()
    with pytest.raises(TrajlmError, match=f"events/{part.name} is gone"):
        prepare(config(raw), tmp_path / "out")


def test_a_folder_that_is_not_ours_is_not_touched(release, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(TrajlmError, match="is not a prepared folder"):
        prepare(config(release), tmp_path / "out")
    assert contents(tmp_path) == {"out/thesis.txt": b"years of work"}
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(TrajlmError, match="not one of ours"):
        prepare(config(release), tmp_path / "out")


def test_an_empty_folder_is_taken(release, tmp_path):
    (tmp_path / "out").mkdir()
    prepare(config(release), tmp_path / "out")
    check_folder(tmp_path / "out")


def test_the_summary_tells_rows_splits_presence_and_prevalence(tmp_path, capsys):
    outcomes = "\n".join([OUTCOMES_HEADER, *(outcome(i, death=i % 2) for i in range(1, 41))]) + "\n"
    raw = write_release(tmp_path / "raw", {i: record(i, "01:00,HR,70") for i in range(1, 41)}, outcomes)
    prepare(config(raw), tmp_path / "out")
    printed = capsys.readouterr().out
    manifest = check_folder(tmp_path / "out")
    assert next(w for w in printed.splitlines() if w.startswith("set-a")).split()[1] == "280"  # 40 records of 7 rows
    assert next(w for w in printed.splitlines() if "with vitals" in w).split()[2:] == ["28", "6", "6"]
    share = manifest["prevalence"]["train"]["target_mortality"]["prevalence"]
    assert f"{share:.1%}" in printed
