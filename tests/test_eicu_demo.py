"""The eICU reader on the open demo, against SQL over the raw files and a plain loop."""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars as pl
import pytest
from cohort_example import read_cohort

from trajlm.cohorts import eicu
from trajlm.config import PrepareConfig
from trajlm.schema import LENGTH_OF_STAY, MORTALITY

FURTHER = ["vital_periodic", "vital_aperiodic", "infusion"]
TABLES = ["patient", "diagnosis", "treatment", "medication", "lab", "apacheApsVar", "vitalPeriodic", "vitalAperiodic",
          "infusiondrug", "apachePatientResult"]  # fmt: skip

SETTINGS = {
    "default": {},
    "whole": {
        "window_hours": None,
        "before_admission_hours": 24.0,
        "result_times": "charted",
        "aps_at_admission": True,
    },
    "paper": {"paper_faithful": True},
}


@pytest.fixture(scope="module")
def database(shared_data: Path) -> duckdb.DuckDBPyConnection:
    """The demo's tables, every cell as text."""
    sql = duckdb.connect()
    sql.execute("set threads = 1")
    for table in TABLES:
        source = f"'{shared_data}/eicu-demo/{table}.csv.gz', all_varchar = true, header = true, quote = '\"'"
        sql.execute(f"create table {table} as select * from read_csv({source})")
    sql.execute("create macro num(x) as try_cast(x as double)")
    return sql


class Case:
    """The demo read with some settings, and SQL tables of what must become of each row."""

    def __init__(self, sql: duckdb.DuckDBPyConnection, demo: Path, settings: PrepareConfig, folder: Path) -> None:
        self.sql, self.settings = sql, settings
        self.read = read_cohort(eicu, demo, settings, folder)
        window = 1e9 if settings.window_hours is None else settings.window_hours * 60
        self.sql.execute(f"""
            create or replace macro placed(known, begun, unit_end, hospital_end) as case
                when known is null then 'no time'
                when begun < {-60 * settings.before_admission_hours} then 'before admission to the unit'
                when known > unit_end then 'after the patient left the unit'
                when known > hospital_end then 'after discharge from the hospital or death'
                when known > {window} then 'after the window' else 'kept' end;
            create or replace table has_lab as
                select distinct patientunitstayid from lab where num(labresult) is not null;
            create or replace table p as select *, num(unitdischargeoffset) ue, num(hospitaldischargeoffset) he,
                num(hospitaldischargeoffset) - num(hospitaladmitoffset) los from patient;
            create or replace table fate as select patientunitstayid, uniquepid, ue, he, los,
                hospitaldischargestatus status, case
                when age is null or age = '' then 'age is unknown'
                when age = '> 89' then 'older than 89 years, recorded as > 89'
                when num(age) < 18 then 'younger than 18 years'
                when los < 720 then 'less than 12 hours in hospital'
                when los > 43200 then 'more than 720 hours in hospital'
                when {str(settings.paper_faithful).lower()} and patientunitstayid not in (from has_lab)
                    then 'no laboratory result, as in the paper' else 'kept' end as why from p;
            create or replace table s as select * from fate where why = 'kept';
            -- which stays have a laboratory result is known only after reading those of all
            create or replace table candidates as
                select * from fate where why in ('kept', 'no laboratory result, as in the paper');
        """)

    def dated(self, table: str, known: str, begun: str | None = None, before: str = "", stays: str = "s") -> None:
        """Table ``<table>_rows``: the minute of every row, and 'kept' or the reason for leaving it out."""
        self.sql.execute(f"""create or replace table {table}_rows as
            select t.*, {known} as minute, case when s.ue is null then 'its stay is not in the cohort' {before}
                else placed({known}, {begun or known}, s.ue, s.he) end as why
            from {table} t left join {stays} s using (patientunitstayid)""")

    def agree(self, table: str, modality: str) -> None:
        """Rows per reason, and events: minutes at which a stay has something."""
        counts = dict(self.sql.execute(f"select why, count(*) from {table}_rows group by why").fetchall())
        account = self.read.account[table]
        assert {"kept": account["kept"], **account["reasons"]} == counts
        events = self.sql.execute(f"""select count(distinct (patientunitstayid, greatest(minute, 0))) from {table}_rows
            where why = 'kept'""").fetchone()[0]
        mine = self.read.measurements.filter(pl.col("modality") == modality)
        minute = (pl.col("hours_since_admission") * 60).round(6)
        assert mine.select(pl.struct("stay_id", minute).n_unique()).item() == events > 0


@pytest.fixture(scope="module", params=sorted(SETTINGS))
def case(
    request: pytest.FixtureRequest,
    database: duckdb.DuckDBPyConnection,
    shared_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    settings = PrepareConfig(cohort="eicu", further_modalities=FURTHER, **SETTINGS[request.param])
    return Case(database, shared_data / "eicu-demo", settings, tmp_path_factory.mktemp("demo"))


def test_demo_stays_patients_and_targets_are_those_of_sql(case: Case) -> None:
    counts = dict(case.sql.execute("select why, count(*) from fate group by why").fetchall())
    account = case.read.account["patient"]
    assert {"kept": account["kept"], **account["reasons"]} == counts
    known = case.sql.execute("""select count(*), count(distinct uniquepid), count(*) filter (status = 'Expired'),
        count(*) filter (status = 'Alive'), sum(los) / 60, sum(least(ue, he)) / 60 from s""").fetchone()
    stays = case.read.stays
    mortality = stays[MORTALITY]
    assert known[:4] == (stays.height, stays["subject_id"].n_unique(), mortality.sum(), (mortality == 0).sum())
    assert known[4:] == pytest.approx((stays[LENGTH_OF_STAY].sum(), stays["hours_in_unit"].sum()))
    assert mortality.null_count() == stays.height - known[2] - known[3] > 0
    steps = case.read.raw.attrition
    assert (steps[0].stays, steps[-1].stays) == (2520, stays.height)
    assert (steps[0].patients, steps[-1].patients) == (1841, known[1])
    assert [step.stays for step in steps] == sorted((step.stays for step in steps), reverse=True)
    assert stays.sort("subject_id", "admission_rank")["admission_rank"].to_list() == [
        rank + 1 for size in stays.group_by("subject_id").len().sort("subject_id")["len"] for rank in range(size)
    ]


def test_demo_severity_scores_are_those_of_sql(case: Case) -> None:
    found = case.sql.execute("""select s.patientunitstayid, num(acutephysiologyscore), num(apachescore),
        num(predictedhospitalmortality) from s join apachePatientResult r using (patientunitstayid)
        where apacheversion = 'IVa' order by 1""").fetchall()
    assert len(found) == len({row[0] for row in found}) > 1000
    known = {int(row[0]): [None if value is None or value < 0 else value for value in row[1:]] for row in found}
    names = ["score_aps", "score_apache_iva", "score_apache_iva_mortality"]
    for stay_id, *scores in case.read.stays.select("stay_id", *names).iter_rows():
        assert scores == pytest.approx(known.get(stay_id, [None] * 3))


def test_demo_rows_and_events_are_those_of_sql(case: Case) -> None:
    case.dated("diagnosis", "num(diagnosisoffset)")
    case.agree("diagnosis", "diagnosis")
    case.dated("treatment", "num(treatmentoffset)")
    case.agree("treatment", "treatment")
    case.dated("vitalPeriodic", "num(observationoffset)")
    case.agree("vitalPeriodic", "vital_periodic")
    case.dated("vitalAperiodic", "num(observationoffset)")
    case.agree("vitalAperiodic", "vital_aperiodic")
    case.dated("infusiondrug", "num(infusionoffset)", before="when num(drugrate) is null then 'no numeric rate'")
    case.agree("infusiondrug", "infusion")
    case.dated("apacheApsVar", "0" if case.settings.aps_at_admission else "1440")
    case.agree("apacheApsVar", "aps")


def test_demo_drug_orders_are_those_of_sql(case: Case) -> None:
    start, stop = "num(drugstartoffset)", "num(drugstopoffset)"
    ordered = start if case.settings.paper_faithful else f"greatest(num(drugorderoffset), {start})"
    known = f"(case when {start} < 0 and coalesce({stop}, 0) >= 0 then greatest({ordered}, 0) else {ordered} end)"
    case.dated(
        "medication", known, f"(case when {start} < 0 and {stop} < 0 then {start} else {known} end)",
        """when drugordercancelled = 'Yes' then 'cancelled order is not an administration'
        when coalesce(drugname, '') = '' and coalesce(drughiclseqno, '') = '' then 'names no drug'""",
    )  # fmt: skip
    case.agree("medication", "medication")


def test_demo_laboratory_results_are_those_of_sql(case: Case) -> None:
    drawn, revised = "num(labresultoffset)", "num(labresultrevisedoffset)"
    known = drawn if case.settings.result_times == "charted" else f"greatest({drawn}, {revised})"
    case.dated("lab", known, before="when num(labresult) is null then 'no numeric result'", stays="candidates")
    # What of the kept is impossible: an inspired fraction of oxygen that is none, as a fraction or in percent.
    percent = "(case when num(labresult) <= 1 then 100 * num(labresult) else num(labresult) end)"
    case.sql.execute(f"""update lab_rows set why = 'value outside the possible range'
        where why = 'kept' and labname = 'FiO2' and not {percent} between 20 and 100""")
    case.agree("lab", "lab")
    tests = case.sql.execute("""select labname, count(distinct patientunitstayid) from lab_rows where why = 'kept'
        group by labname""").fetchall()
    mine = case.read.measurements.filter(pl.col("modality") == "lab")
    assert dict(tests) == dict(mine.group_by("feature").agg(pl.col("stay_id").n_unique()).iter_rows())


def test_demo_paths_are_those_of_a_plain_loop(case: Case) -> None:
    case.dated("treatment", "num(treatmentoffset)")
    rows = case.sql.execute("select patientunitstayid, minute, treatmentstring from treatment_rows where why = 'kept'")
    expected = set()
    for stay, minute, path in rows.fetchall():
        names = path.split("|")
        for depth in range(len(names)):
            expected.add((int(stay), round(max(minute, 0.0) / 60, 9), "|".join(names[: depth + 1])))
    mine = case.read.measurements.filter(pl.col("modality") == "treatment")
    found = [(s, round(h, 9), f) for s, h, f in mine.select("stay_id", "hours_since_admission", "feature").iter_rows()]
    assert len(found) == len(expected)
    assert set(found) == expected
    assert set(mine["value"]) == {1.0}


def test_demo_features_hold_exactly_what_was_measured_and_every_row_is_accounted_for(case: Case) -> None:
    features = {(feature.modality, feature.name) for feature in case.read.raw.features}
    assert len(features) == len(case.read.raw.features)
    measured = set(case.read.measurements.select("modality", "feature").unique().iter_rows())
    assert measured <= features
    wide = {"aps", "vital_periodic", "vital_aperiodic"}
    assert {m for m, _ in features - measured} <= wide
    assert case.read.account["medication"]["read"] == 75_604
    assert case.read.measurements["hours_since_admission"].min() == 0
    for table, rows in case.read.account.items():
        assert rows["kept"] + rows["rejected"] == rows["read"], table


def test_demo_no_event_is_later_than_the_stay(case: Case) -> None:
    ends = dict(case.sql.execute("select cast(patientunitstayid as bigint), least(ue, he) / 60 from s").fetchall())
    last = case.read.measurements.group_by("stay_id").agg(pl.col("hours_since_admission").max())
    assert all(hours <= ends[stay] + 1e-9 for stay, hours in last.iter_rows())
