"""The synthetic release is laid out like the real one, is repeatable, and holds what it promises to have planted."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest
from conftest import cell, contents
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trajlm.cohorts.synthetic import RECORD, synthesize
from trajlm.cohorts.synthetic_course import courses, draw_severity, outcome_log_odds
from trajlm.errors import TrajlmError

DEMO = Path(__file__).parents[1].parent / "shared/data/mimic-iv-demo"
STAYS = 900
NOTE_HEADER = "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "release"
    synthesize(out, STAYS, 3)
    return out


@pytest.fixture(scope="module")
def db(release: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Every table of the release as a view, read by a program that shares no code with the writer."""
    connection = duckdb.connect()
    for file in release.rglob("*.csv.gz"):
        name = file.name.split(".csv")[0].replace("mimic-cxr-2.0.0-", "cxr_")
        if file.parent.name == "truth":
            name = f"truth_{name}"
        connection.execute(f"create table {name} as from read_csv('{file}', header=true, sample_size=-1)")
    connection.execute(
        "create view charted as select c.*, c.charttime > i.outtime as late, try_cast(c.valuenum as double) as number, "
        "date_diff('second', i.intime, c.charttime) / 3600 as h from chartevents c join icustays i using (stay_id)"
    )
    connection.execute(
        "create view sampled as select i.stay_id, l.*, date_diff('second', i.intime, l.charttime) / 3600 as h "
        "from labevents l join icustays i on l.subject_id = i.subject_id "
        "and l.charttime between i.intime - interval 2 day and i.outtime"
    )
    connection.execute(
        "create view reported as select i.stay_id, r.*, date_diff('second', i.intime, r.charttime) / 3600 as h "
        "from radiology r join icustays i on r.subject_id = i.subject_id "
        "and r.charttime between i.intime and i.outtime"
    )
    connection.execute(
        "create view pictured as select i.stay_id, x.*, "
        "date_diff('second', i.intime, x.at) / 3600 as h from (select *, strptime(StudyDate::varchar || "
        "lpad(floor(StudyTime)::int::varchar, 6, '0'), '%Y%m%d%H%M%S') as at from cxr_metadata) x "
        "join icustays i on x.subject_id = i.subject_id and x.at between i.intime - interval 1 second and i.outtime"
    )
    yield connection
    connection.close()


def _auroc(features: np.ndarray, died: np.ndarray) -> float:
    model = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler(), LogisticRegression(C=0.05))
    scores = cross_val_predict(model, features, died, cv=5, method="predict_proba")[:, 1]
    return float(roc_auc_score(died, scores))


def _outcomes(db: duckdb.DuckDBPyConnection) -> np.ndarray:
    query = "select hospital_expire_flag from icustays join admissions using (hadm_id) order by stay_id"
    return db.execute(query).fetchnumpy()["hospital_expire_flag"]


def test_same_stays_and_seed_give_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        synthesize(tmp_path / name, 12, seed)
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert any(name.endswith(".jpg") for name in first)
    assert first == second
    assert first["icu/chartevents.csv.gz"] != third["icu/chartevents.csv.gz"]
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c"}


@settings(max_examples=8, deadline=None)
@given(stays=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_any_size_and_seed_give_that_many_stays(
    stays: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("any") / "release"
    synthesize(out, stays, seed)
    with gzip.open(out / "icu/icustays.csv.gz", "rt") as table:
        assert len(table.readlines()) == stays + 1
    with gzip.open(out / "note/radiology.csv.gz", "rt") as table:
        assert table.readline().strip() == NOTE_HEADER


def test_repeated_it_leaves_its_own_release_alone_and_refuses_anything_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "release"
    leftover = out.parent / ".release.partial"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("interrupted")
    out.mkdir()
    synthesize(out, 3, 1)
    assert not leftover.exists()
    assert not (out / "half").exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    synthesize(out, 3, 1)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    for stays, seed in ((3, 2), (4, 1)):
        with pytest.raises(TrajlmError, match="choose another --out"):
            synthesize(out, stays, seed)
    (out / "hosp/patients.csv.gz").write_bytes(b"changed")
    with pytest.raises(TrajlmError, match="changed"):
        synthesize(out, 3, 1)
    (out / RECORD).write_text("[]")
    with pytest.raises(TrajlmError, match="record"):
        synthesize(out, 3, 1)


def test_it_does_not_write_where_others_files_lie(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(TrajlmError, match="other files"):
        synthesize(tmp_path, 3, 1)
    with pytest.raises(TrajlmError, match="file or link"):
        synthesize(tmp_path / "mine.txt", 3, 1)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    for stays, seed in ((0, 1), (3, -1)):
        with pytest.raises(TrajlmError, match="at least 1 stay"):
            synthesize(tmp_path / "out", stays, seed)


def test_columns_are_those_of_the_real_release(release: Path) -> None:
    if not DEMO.is_dir():
        pytest.skip("the MIMIC-IV demo is not at ../shared/data/mimic-iv-demo")
    tables = [p for folder in ("hosp", "icu") for p in (release / folder).iterdir()]
    assert len(tables) == 9
    for table in tables:
        real = DEMO / table.parent.name / table.name
        with gzip.open(table, "rt", encoding="utf-8") as ours, gzip.open(real, "rt", encoding="utf-8") as theirs:
            assert ours.readline() == theirs.readline(), table.name


def test_items_are_named_as_in_the_real_release(db: duckdb.DuckDBPyConnection) -> None:
    if not DEMO.is_dir():
        pytest.skip("the MIMIC-IV demo is not at ../shared/data/mimic-iv-demo")
    for table, columns, folder in (
        ("d_items", "itemid, label, linksto, category, param_type", "icu"),
        ("d_labitems", "itemid, label, fluid, category", "hosp"),
    ):
        real = f"read_csv('{DEMO}/{folder}/{table}.csv.gz', header=true, sample_size=-1)"
        assert db.execute(f"select {columns} from {table} except select {columns} from {real}").fetchall() == []
    for table, items in (("chartevents", "d_items"), ("outputevents", "d_items"), ("labevents", "d_labitems")):
        assert cell(db, f"select count(*) from {table} anti join {items} using (itemid)") == 0


def test_identifiers_join_and_every_stay_has_an_admission(db: duckdb.DuckDBPyConnection) -> None:
    assert cell(db, "select count(distinct stay_id) from icustays") == STAYS
    assert cell(db, "select count(*) from icustays join admissions using (subject_id, hadm_id)") == STAYS
    assert cell(db, "select count(distinct subject_id) from icustays") == cell(db, "select count(*) from patients")
    assert cell(db, "select count(*) from icustays anti join patients using (subject_id)") == 0
    assert cell(db, "select count(*) from truth_stays semi join icustays using (stay_id)") == STAYS
    repeated = "select count(*) from (select subject_id from icustays group by all having count(*) > 1)"
    assert 0.05 < cell(db, repeated) / STAYS < 0.16
    assert cell(db, "select count(*) - count(distinct note_id) from radiology") == 0


def test_times_lie_where_they_must(db: duckdb.DuckDBPyConnection) -> None:
    wrong = {
        "stays outside admissions": "from icustays join admissions using (hadm_id) where not (admittime <= intime and "
        "intime + interval 12 hour <= outtime and outtime <= dischtime)",
        "los": "from icustays where abs(los - date_diff('second', intime, outtime) / 86400) > 1e-9 or los > 20",
        "deaths": "from admissions where (deathtime is null) = (hospital_expire_flag = 1) or deathtime <> dischtime",
        "dates of death": "from admissions join patients using (subject_id) where deathtime::date <> dod "
        "or dod < dischtime::date",
        "return after death": "from admissions a join admissions b using (subject_id) where b.admittime > a.admittime "
        "and (b.admittime < a.dischtime or a.hospital_expire_flag = 1)",
        "charting before the stay": "from charted where h < 0",
        "output": "from outputevents o join icustays using (stay_id) where not charttime between intime and outtime",
        "storage before charting": "from chartevents where storetime < charttime",
        "labs": "from labevents l left join admissions a using (hadm_id) where l.hadm_id is not null "
        "and not l.charttime between a.admittime and a.dischtime",
        "reports": "from radiology join admissions using (hadm_id) where not charttime between admittime and dischtime",
        "summaries": "from discharge join admissions using (hadm_id) where charttime <> dischtime::date",
        "emergency room": "from admissions where not (edregtime < admittime and admittime < edouttime)",
    }
    found = {name: cell(db, f"select count(*) {rest}") for name, rest in wrong.items()}
    assert found == dict.fromkeys(wrong, 0)
    assert cell(db, "select count(*) from pictured") == cell(db, "select count(*) from cxr_metadata")


def test_blemishes_of_a_release_are_there_and_rare(db: duckdb.DuckDBPyConnection) -> None:
    rows = cell(db, "select count(*) from chartevents")
    doubled = "select count(*) - (select count(*) from (select distinct * from chartevents)) from chartevents"
    for query in (
        "select count(*) from chartevents where itemid = 220045 and valuenum = 9999",
        "select count(*) from chartevents where value = 'ERROR' and valuenum is null",
        "select count(*) from charted where late",
        doubled,
    ):
        assert 0 < cell(db, query) < 0.01 * rows, query
    unlinked = "select avg((hadm_id is null)::int) from labevents"
    assert 0.01 < cell(db, unlinked) < 0.2
    assert cell(db, "select count(*) from labevents where valuenum is null and value = '___'") > 0
    assert 0 < cell(db, "select avg((language = '?')::int) from admissions") < 0.2
    assert cell(db, "select count(*) from patients p where dod > (select max(dischtime) from admissions a "
                      "where a.subject_id = p.subject_id)") > 0  # fmt: skip
    words = "select distinct value, valuenum from chartevents where itemid = 223901 and value <> 'ERROR'"
    assert ("Obeys Commands", 6) in db.execute(words).fetchall()


def test_outcome_follows_from_the_recorded_severity_alone(db: duckdb.DuckDBPyConnection) -> None:
    """What happens after the window is shaped by the outcome; nothing in the window may be."""
    rows = db.execute(
        "select s.los * 24, p_death, demographic_logit, list(t.severity order by t.hour) from icustays s "
        "join truth_stays using (stay_id) join truth_severity t using (stay_id) group by all"
    ).fetchall()
    for hours, p_death, demographic_logit, severity in rows:
        log_odds = outcome_log_odds(np.array(severity), hours, demographic_logit)
        assert p_death == pytest.approx(1 / (1 + np.exp(-log_odds)), abs=2e-4)
    died = _outcomes(db)
    assert abs(died.mean() - np.mean([row[1] for row in rows])) < 3 * np.sqrt(0.18 * 0.82 / STAYS)
    assert 0.14 < died.mean() < 0.22


@given(level=st.floats(-2, 2), trend=st.floats(0.5, 1.5), seed=st.integers(0, 1000))
def test_rising_kills_and_the_same_values_falling_do_not(level: float, trend: float, seed: int) -> None:
    severity = draw_severity(np.random.default_rng(seed), 48.0, level, trend)
    wander = draw_severity(np.random.default_rng(seed), 48.0, level, 0.0)
    assert severity.mean() == pytest.approx(wander.mean())
    falling = draw_severity(np.random.default_rng(seed), 48.0, level, -trend)
    assert outcome_log_odds(severity, 48.0, 0.0) > outcome_log_odds(falling, 48.0, 0.0) + 2 * trend
    steady = level + trend * np.linspace(-1, 1, 49)
    assert outcome_log_odds(steady, 48.0, 0.0) > outcome_log_odds(steady[::-1], 48.0, 0.0) + 3 * trend


def test_demographics_alone_foretell_little() -> None:
    cohort = list(courses(5000, 11))
    died = np.array([course.deathtime is not None for course in cohort])
    kinds = sorted({course.admission_type for course in cohort})
    features = [[c.age, c.patient.gender == "M", *(c.admission_type == k for k in kinds)] for c in cohort]
    assert 0.16 < died.mean() < 0.20
    assert 0.55 < _auroc(np.array(features, float), died) < 0.68


def _halves(db: duckdb.DuckDBPyConnection, view: str, expression: str) -> np.ndarray:
    """float[stays, items]: one aggregate per item, NaN where never measured."""
    rows = db.execute(
        f"pivot (select s.stay_id, itemid, {expression} as figure from icustays s left join {view} v "
        "on v.stay_id = s.stay_id and h between 0 and least(48, s.los * 24) and valuenum < 9000 "
        "group by all) on itemid using first(figure) group by stay_id order by stay_id"
    )
    columns = rows.fetchnumpy()
    return np.column_stack(
        [np.ma.filled(np.ma.asarray(v, float), np.nan) for k, v in columns.items() if k != "stay_id"]
    )


def test_vitals_and_labs_foretell_death_mostly_by_their_order(db: duckdb.DuckDBPyConnection) -> None:
    died = _outcomes(db)
    views = ("charted", "sampled")
    mean = np.hstack([_halves(db, view, "avg(valuenum)") for view in views])
    ends = [f"avg(valuenum) filter (h {side} least(24, s.los * 12))" for side in ("<", ">=")]
    ordered = np.hstack([_halves(db, view, end) for view in views for end in ends])
    assert len(mean) == len(died)
    assert 0.74 < _auroc(ordered, died) < 0.90
    assert _auroc(ordered, died) > _auroc(mean, died) + 0.07


def test_pictures_whiten_with_severity(release: Path, db: duckdb.DuckDBPyConnection) -> None:
    rows = db.execute(
        "select x.subject_id, study_id, dicom_id, severity, ViewPosition from pictured x join truth_severity t "
        "on t.stay_id = x.stay_id and t.hour = round(x.h)"
    ).fetchall()
    assert {row[-1] for row in rows} == {"AP", "PA", "LATERAL"}
    whiteness, severity = [], []
    for subject, study, dicom, truth, view in rows:
        shelf = release / "cxr/files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}"
        with Image.open(shelf / f"{dicom}.jpg") as picture:
            assert (picture.size, picture.mode, picture.format) == ((96, 96), "L", "JPEG")
            pixels = np.asarray(picture, float)
        if view != "LATERAL":
            whiteness.append(pixels[20:70, 20:38].mean() + pixels[20:70, 58:76].mean())
            severity.append(truth)
    assert np.corrcoef(whiteness, severity)[0, 1] > 0.7
    assert len(list((release / "cxr/files").rglob("*.jpg"))) == len(rows)


def test_reports_grow_graver_with_severity(db: duckdb.DuckDBPyConnection) -> None:
    rows = db.execute(
        "select lower(split_part(text, 'IMPRESSION:', 2)), severity, text from reported r "
        "join truth_severity t on t.stay_id = r.stay_id and t.hour = round(r.h) where text like '%CHEST (%'"
    ).fetchall()
    clear = [s for text, s, _ in rows if "no acute" in text or "no radiographic evidence" in text or "clear" in text]
    grave = [s for text, s, _ in rows if "ards" in text or "multifocal" in text or "near complete" in text]
    assert min(len(clear), len(grave)) > 50
    assert np.mean(grave) - np.mean(clear) > 1.3
    assert all("___" in text for *_, text in rows)
    assert len({text for *_, text in rows}) > 0.98 * len(rows)
    expired = "select count(*) from discharge join admissions using (hadm_id) where (text like '%Expired%') <> "
    assert cell(db, expired + "(hospital_expire_flag = 1)") == 0


def test_absence_depends_on_severity_and_on_the_unit(db: duckdb.DuckDBPyConnection) -> None:
    db.execute(
        "create or replace table seen as select s.stay_id, first_careunit as unit, los, avg(severity) as severity, "
        "s.stay_id in (from (select stay_id from pictured)) as image, "
        "s.stay_id in (from (select stay_id from reported)) as report, "
        "s.stay_id in (from (select stay_id from chartevents)) as chart, "
        "(select count(distinct charttime) from charted c where c.stay_id = s.stay_id and h <= 12) as visits, "
        "(select count(distinct charttime) from sampled l where l.stay_id = s.stay_id and h between 0 and 12) panels "
        "from icustays s join truth_severity t on t.stay_id = s.stay_id and t.hour <= 12 group by all"
    )
    assert 0.30 < cell(db, "select avg((not image)::int) from seen") < 0.48
    assert 0.13 < cell(db, "select avg((not report)::int) from seen") < 0.27
    assert 0.01 < cell(db, "select avg((not chart)::int) from seen") < 0.06
    assert cell(db, "select count(*) from seen where not chart and (image or report or panels > 0)") == 0
    for figure in ("image::int", "report::int", "visits", "panels"):
        averages = [
            cell(db, f"select avg({figure}) from seen where chart and severity {side}") for side in ("> 0.5", "< -0.5")
        ]
        assert averages[0] > 1.15 * averages[1], figure
    medical, neuro = (
        cell(db, f"select avg(image::int) from seen where unit like '{unit}%' and abs(severity) < 1")
        for unit in ("Medical Intensive", "Neuro")
    )
    assert medical > neuro + 0.25


def test_the_record_says_that_nothing_is_real(release: Path) -> None:
    record = json.loads((release / RECORD).read_text())
    assert (record["stays"], record["seed"]) == (STAYS, 3)
    assert "no row describes a real person" in record["what"]
    assert {p.relative_to(release).as_posix() for p in release.rglob("*.csv.gz")} <= set(record["files"])
