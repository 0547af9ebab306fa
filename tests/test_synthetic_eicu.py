"""The synthetic eICU release is laid out like the real one, is repeatable, and holds the traps it promises."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest
from cohort_example import read_cohort
from conftest import cell, contents
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trajlm.cohorts import SYNTHETIC_MARK, eicu
from trajlm.cohorts.synthetic import synthesize
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError

STAYS = 800
SEED = 3
TABLES = {
    "patient", "apacheApsVar", "diagnosis", "treatment", "medication", "lab", "vitalPeriodic", "vitalAperiodic",
    "infusionDrug",
}  # fmt: skip
OFFSETS = {
    "diagnosis": "diagnosisoffset", "treatment": "treatmentoffset", "medication": "drugstartoffset",
    "lab": "labresultoffset", "vitalPeriodic": "observationoffset", "vitalAperiodic": "observationoffset",
    "infusionDrug": "infusionoffset",
}  # fmt: skip


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic_eicu") / "release"
    synthesize(out, STAYS, SEED, "eicu")
    return out


@pytest.fixture(scope="module")
def db(release: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Every table as text, read by a program that shares no code with the writer; offsets as numbers where asked."""
    connection = duckdb.connect()
    for file in release.rglob("*.csv.gz"):
        name = ("truth_" if file.parent.name == "truth" else "") + file.name.removesuffix(".csv.gz")
        connection.execute(f"create table {name} as from read_csv('{file}', header=true, all_varchar=true)")
    connection.execute(
        "create view stays as select patientunitstayid as id, unitdischargeoffset::int as unit_end, "
        "hospitaladmitoffset::int as hospital_start, hospitaldischargeoffset::int as hospital_end, "
        "* exclude (patientunitstayid) from patient"
    )
    yield connection
    connection.close()


def test_same_stays_and_seed_give_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        synthesize(tmp_path / name, 15, seed, "eicu")
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first["lab.csv.gz"] != third["lab.csv.gz"]
    assert {name.removesuffix(".csv.gz") for name in first if "/" not in name} - {SYNTHETIC_MARK} == TABLES


@settings(max_examples=8, deadline=None)
@given(stays=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_any_size_and_seed_give_that_many_stays_and_every_table(
    stays: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("any") / "release"
    synthesize(out, stays, seed, "eicu")
    with gzip.open(out / "patient.csv.gz", "rt") as table:
        assert len(table.readlines()) == stays + 1
    for name in TABLES:
        with gzip.open(out / f"{name}.csv.gz", "rt") as table:
            assert "patientunitstayid" in table.readline().split(",")


def test_the_mark_names_the_layout_and_nothing_else_is_overwritten(release: Path, tmp_path: Path) -> None:
    mark = json.loads((release / SYNTHETIC_MARK).read_text())
    assert (mark["layout"], mark["stays"], mark["seed"]) == ("eicu", STAYS, SEED)
    assert "no row describes a real person" in mark["what"]
    assert set(mark["files"]) == {p.relative_to(release).as_posix() for p in release.rglob("*.csv.gz")}
    out = tmp_path / "out"
    synthesize(out, 2, 1, "eicu")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    synthesize(out, 2, 1, "eicu")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    for layout, seed in (("mimic-iv", 1), ("eicu", 2)):
        with pytest.raises(TrajlmError, match="choose another --out"):
            synthesize(out, 2, seed, layout)
    with pytest.raises(TrajlmError, match="mimic-iv, eicu, came 'eicu-crd'"):
        synthesize(tmp_path / "other", 2, 1, "eicu-crd")


def test_both_layouts_tell_the_same_courses(tmp_path: Path) -> None:
    synthesize(tmp_path / "mimic", 12, 8)
    synthesize(tmp_path / "eicu", 12, 8, "eicu")
    mimic, eicu = contents(tmp_path / "mimic"), contents(tmp_path / "eicu")
    assert mimic["truth/severity.csv.gz"] == eicu["truth/severity.csv.gz"]
    assert "layout" not in json.loads(mimic[SYNTHETIC_MARK])
    # The laboratory draws the same blood: what one layout reports, the other does.
    db = duckdb.connect()
    values = [
        f"select i.stay_id as stay, l.valuenum as value from read_csv('{tmp_path}/mimic/hosp/labevents.csv.gz') l join "
        f"read_csv('{tmp_path}/mimic/icu/icustays.csv.gz') i using (subject_id) where itemid = 50983",
        f"select patientunitstayid, labresult from read_csv('{tmp_path}/eicu/lab.csv.gz') where labname = 'sodium'",
    ]
    common = f"select count(*) from ({values[1]}) e semi join ({values[0]}) m on m.stay = e.patientunitstayid "
    reported = cell(db, f"select count(*) from ({values[1]})")
    assert cell(db, common + "and m.value = e.labresult") > 0.95 * reported > 10


def test_columns_are_those_of_the_real_release(release: Path, shared_data: Path) -> None:
    real = {p.name.lower(): p for p in (shared_data / "eicu-demo").glob("*.csv.gz")}
    for name in TABLES:
        ours, theirs = release / f"{name}.csv.gz", real[f"{name.lower()}.csv.gz"]
        with gzip.open(ours, "rt") as one, gzip.open(theirs, "rt") as other:
            assert one.readline() == other.readline(), name


def test_names_are_those_of_the_real_release(db: duckdb.DuckDBPyConnection, shared_data: Path) -> None:
    for table, column in (
        ("lab", "labname"),
        ("lab", "labmeasurenamesystem"),
        ("treatment", "treatmentstring"),
        ("patient", "unittype"),
        ("patient", "hospitaldischargelocation"),
        ("patient", "apacheadmissiondx"),
        ("patient", "ethnicity"),
    ):
        real = f"read_csv('{shared_data}/eicu-demo/{table}.csv.gz', header=true, all_varchar=true)"
        query = f"select distinct {column} from {table} except select {column} from {real}"
        assert db.execute(query).fetchall() == [], (table, column)
    real = f"read_csv('{shared_data}/eicu-demo/diagnosis.csv.gz', header=true, all_varchar=true)"
    strange = f"select distinct diagnosisstring from diagnosis except select diagnosisstring from {real}"
    assert len(db.execute(strange).fetchall()) <= 3  # of few stays in the demo
    given_codes = f"select distinct diagnosisstring, icd9code from diagnosis semi join {real} using (diagnosisstring)"
    assert db.execute(f"{given_codes} except select diagnosisstring, icd9code from {real}").fetchall() == []


def test_rows_join_and_numbers_are_unique(db: duckdb.DuckDBPyConnection) -> None:
    assert cell(db, "select count(distinct id) from stays") == STAYS
    assert cell(db, "select count(*) from stays semi join truth_stays on stay_id = id") == STAYS
    for name in TABLES - {"patient"}:
        rows = f"from {name}"
        assert cell(db, f"select count(*) {rows} anti join patient using (patientunitstayid)") == 0
        key = f"{name.lower()}id"
        assert cell(db, f"select count(*) - count(distinct {key}) {rows}") == 0, name
    assert cell(db, "select count(*) - count(distinct patientunitstayid) from apacheApsVar") == 0


def test_a_hospital_stay_holds_several_visits_that_share_its_end(db: duckdb.DuckDBPyConnection) -> None:
    several = "select patienthealthsystemstayid as h from stays group by all having count(*) > 1"
    assert 0.01 * STAYS < cell(db, f"select count(*) from ({several})") < 0.1 * STAYS
    repeated = "select count(*) from (select uniquepid from stays group by all having count(*) > 1)"
    assert cell(db, repeated) > cell(db, f"select count(*) from ({several})")
    wrong = {
        "ends": "select h.patienthealthsystemstayid from stays h group by all having count(distinct "
        "coalesce(hospitaldischargestatus, '?')) > 1 or count(distinct hospitaldischargeyear) > 1 or "
        "max(hospital_end - hospital_start) - min(hospital_end - hospital_start) > 1",
        "visits": "select patienthealthsystemstayid from stays group by all "
        "having list(unitvisitnumber::int order by unitvisitnumber::int) <> range(1, count(*) + 1)",
        "order": "select a.id from stays a join stays b using (patienthealthsystemstayid) where a.unitvisitnumber::int "
        "< b.unitvisitnumber::int and -b.hospital_start < -a.hospital_start + a.unit_end",
        "dead come back": "select a.id from stays a join stays b using (patienthealthsystemstayid) "
        "where a.unitvisitnumber::int < b.unitvisitnumber::int and a.unitdischargestatus = 'Expired'",
        "status": "select id from stays where unitdischargestatus = 'Expired' and hospitaldischargestatus <> 'Expired'",
        "clocks": "select id from stays where (date_diff('minute', unitadmittime24::time, unitdischargetime24::time) - "
        "unit_end) % 1440 <> 0",
    }
    for name, query in wrong.items():
        assert db.execute(query).fetchall() == [], name


def test_the_traps_of_the_release_are_there_and_rare(db: duckdb.DuckDBPyConnection) -> None:
    doubled = "count(*) - count(distinct ({}))"
    same_draw = "patientunitstayid, labresultoffset, labname"
    shares = {
        "over 89": ("avg((age = '> 89')::int) from patient", 0.01, 0.1),
        "unknown status": ("avg((hospitaldischargestatus is null)::int) from patient", 0.003, 0.05),
        "hospital left before unit": ("avg((hospital_end < unit_end)::int) from stays", 0, 0.05),
        "hospital entered after unit": ("avg((hospital_start > 0)::int) from stays", 0, 0.03),
        "before admission": ("avg((labresultoffset::int < 0)::int) from lab", 0.01, 0.2),
        "home drugs": ("avg((drugstartoffset::int < -1000)::int) from medication", 0.01, 0.2),
        "cancelled": ("avg((drugordercancelled = 'Yes')::int) from medication", 0.01, 0.1),
        "no stop": ("avg((drugstopoffset = '0')::int) from medication", 0.01, 0.1),
        "no name": ("avg((drugname is null)::int) from medication", 0.1, 0.7),
        "neither": ("avg((drugname is null and drughiclseqno is null)::int) from medication", 0.005, 0.2),
        "no number": ("avg((labresult is null)::int) from lab", 0.001, 0.02),
        "sent twice": (f"{doubled.format(same_draw + ', labresult, labresultrevisedoffset')} from lab", 5, 1000),
        "revised": (f"{doubled.format(same_draw)} from lab", 50, 3000),
        "revised before drawn": (
            "avg((labresultrevisedoffset::int < labresultoffset::int)::int) from lab", 0.001, 0.05),
        "rates that are no number": ("count(*) from infusionDrug where drugrate in ('ERROR', 'OFF')", 1, 1000),
        "not listed as -1": ("avg((ph = '-1')::int) from apacheApsVar", 0.5, 0.95),
        "coma scale unknown": ("avg((eyes = '-1')::int) from apacheApsVar", 0.01, 0.1),
        "lead off": ("count(*) from vitalPeriodic where heartrate::double = 0", 1, 300),
    }  # fmt: skip
    for name, (query, low, high) in shares.items():
        assert low < cell(db, f"select {query}") < high, name
    late = "select count(*) from {} join stays on id = patientunitstayid where {}::int > unit_end"
    for table in ("lab", "diagnosis", "treatment"):
        assert 0 < cell(db, late.format(table, OFFSETS[table])) < 0.02 * cell(db, f"select count(*) from {table}")
    assert cell(db, "select max(len(string_split(diagnosisstring, '|'))) from diagnosis") >= 5
    rarely = "select treatmentstring from treatment group by all having count(distinct patientunitstayid) < "
    assert db.execute(f"{rarely} {0.03 * STAYS}").fetchall()
    # The same oxygen under the same name and unit, once in per cent and once as a fraction.
    scales = "select distinct labresult::double <= 1 from lab where labname = 'FiO2' and labresult is not null"
    assert len(db.execute(scales).fetchall()) == 2
    assert cell(db, "select count(distinct labmeasurenameinterface) from lab where labname = 'BUN'") == 3


def test_revised_results_are_known_later_and_differ(db: duckdb.DuckDBPyConnection) -> None:
    pairs = (
        "select count(*), count(*) filter (a.labresult <> b.labresult) from lab a join lab b using (patientunitstayid, "
        "labresultoffset, labname) where a.labresultrevisedoffset::int < b.labresultrevisedoffset::int"
    )
    found = db.execute(pairs).fetchone()
    assert found is not None
    assert found[1] > 0.5 * found[0] > 30


def test_the_score_is_the_worst_that_the_first_day_charted(db: duckdb.DuckDBPyConnection) -> None:
    """Where a monitor's table holds the stay, its numbers are those the score was made from."""
    wrong = (
        "select count(*) from apacheApsVar a join (select patientunitstayid, max(abs(heartrate::double - 75)) as far "
        "from vitalPeriodic where observationoffset::int < 1440 and heartrate::double > 0 group by all) v using "
        "(patientunitstayid) where heartrate <> '-1' and abs(abs(heartrate::double - 75) - far) > 1"
    )
    assert cell(db, "select count(*) from apacheApsVar semi join vitalPeriodic using (patientunitstayid)") > 100
    assert cell(db, wrong) <= 0.02 * STAYS  # a lead that came off hides the worst one


def test_absence_depends_on_severity_unit_and_hospital(db: duckdb.DuckDBPyConnection) -> None:
    held = ", ".join(f"id in (select patientunitstayid from {name}) as {name}_held" for name in TABLES - {"patient"})
    db.execute(
        "create or replace table seen as select s.*, severity, " + held + " from stays s join (select stay_id, "
        "avg(severity::double) as severity from truth_severity where hour::int <= 24 group by all) on stay_id = id"
    )
    anything = " or ".join(f"{name}_held" for name in TABLES - {"patient"})
    assert 0.01 < cell(db, f"select avg((not ({anything}))::int) from seen") < 0.06
    for name in ("diagnosis", "treatment", "infusionDrug"):
        sick, well = (
            cell(db, f"select avg({name}_held::int) from seen where severity {side}") for side in ("> 0.7", "< -0.7")
        )
        assert sick > well + 0.05, name
    without = cell(db, "select count(*) from seen where not lab_held")
    assert 0.03 * STAYS < without < 0.25 * STAYS
    by_hospital = "select hospitalid, avg(medication_held::int) as share from seen group by all having count(*) > 10"
    assert cell(db, f"select min(share) from ({by_hospital})") == 0
    combinations = (
        "select count(distinct (diagnosis_held, treatment_held, medication_held, lab_held, apacheApsVar_held))"
    )
    assert cell(db, f"{combinations} from seen") > 15


def test_the_reader_of_eicu_takes_rows_of_every_table(
    release: Path, db: duckdb.DuckDBPyConnection, tmp_path: Path
) -> None:
    further = ["vital_periodic", "vital_aperiodic", "infusion"]
    read = read_cohort(eicu, release, PrepareConfig(raw=str(release), further_modalities=further), tmp_path)
    account = {table.lower(): rows for table, rows in read.account.items()}
    assert set(account) == {table.lower() for table in TABLES}
    for table, rows in account.items():
        assert rows["read"] == cell(db, f"select count(*) from {table}"), table
        assert 0.3 * rows["read"] < rows["kept"] < rows["read"], table
    assert account["medication"]["reasons"]["cancelled order is not an administration"] <= cell(
        db, "select count(*) from medication where drugordercancelled = 'Yes'"
    )
    assert read.raw.attrition[0].stays == STAYS
    assert 0.85 * STAYS < read.raw.stays.height < STAYS


def _outcomes(db: duckdb.DuckDBPyConnection) -> np.ndarray:
    query = "select (unitdischargestatus = 'Expired' or hospitaldischargestatus = 'Expired')::int as died from stays"
    return db.execute(query + " order by id").fetchnumpy()["died"]


def test_outcomes_follow_the_truth(db: duckdb.DuckDBPyConnection) -> None:
    died = _outcomes(db)
    expected = db.execute("select p_death::double as p from truth_stays order by stay_id").fetchnumpy()["p"]
    assert 0.13 < died.mean() < 0.25
    assert abs(died.mean() - expected.mean()) < 3 * np.sqrt(0.18 * 0.82 / STAYS)
    assert roc_auc_score(died, expected) > 0.85


def _features(db: duckdb.DuckDBPyConnection, table: str, column: str, value: str, when: str) -> np.ndarray:
    """float[stays, names]: one aggregate of each name's rows within 48 hours, NaN where there is none."""
    offset = OFFSETS[table]
    rows = db.execute(
        f"pivot (select id, coalesce({column}, '') as name, {value} as figure from stays left join {table} t "
        f"on t.patientunitstayid = id and {offset}::int between 0 and least(2880, unit_end) and {when} group by all) "
        "on name using first(figure) group by id order by id"
    )
    columns = rows.fetchnumpy()
    return np.column_stack([np.ma.filled(np.ma.asarray(v, float), np.nan) for k, v in columns.items() if k != "id"])


def _auroc(features: np.ndarray, died: np.ndarray) -> float:
    model = make_pipeline(
        SimpleImputer(keep_empty_features=True, add_indicator=True), StandardScaler(), LogisticRegression(C=0.02)
    )
    scores = cross_val_predict(model, features, died, cv=5, method="predict_proba")[:, 1]
    return float(roc_auc_score(died, scores))


def test_labs_and_treatments_foretell_death_mostly_by_their_order(db: duckdb.DuckDBPyConnection) -> None:
    died = _outcomes(db)
    middle = "least(1440, unit_end / 2)"
    for table, column, value, absent in (
        ("lab", "labname", "avg(try_cast(labresult as double))", np.nan),
        ("treatment", "treatmentstring", "count(*)", 0.0),
    ):
        whole = _features(db, table, column, value, "true")
        halves = [f"{OFFSETS[table]}::int {side} {middle}" for side in ("<", ">=")]
        ordered = np.hstack([_features(db, table, column, value, half) for half in halves])
        assert len(whole) == len(died) == STAYS
        held = ~np.isnan(whole).all(1)
        by_order, regardless = (_auroc(np.nan_to_num(f, nan=absent)[held], died[held]) for f in (ordered, whole))
        assert 0.65 < by_order < 0.92, table
        assert by_order > regardless + 0.02, table
