"""The open demo of MIMIC-IV, turned into MEDS by SQL with the codes of its public extraction, read by our mapping."""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars as pl
import pytest
from cohort_example import Read, read_cohort

from trajlm.cohorts import meds
from trajlm.config import PrepareConfig
from trajlm.schema import LENGTH_OF_STAY, MORTALITY

MAPPING = Path(__file__).parents[1] / "recipes/mappings/mimic-iv.yaml"
SHARDS = 3
TABLES = {
    "hosp/patients": "subject_id, gender, anchor_age, anchor_year, dod",
    "hosp/admissions": "subject_id, admittime, dischtime, deathtime, admission_type, discharge_location, race,"
    " insurance",
    "icu/icustays": "stay_id, subject_id, intime, outtime, first_careunit, last_careunit",
    "hosp/labevents": "subject_id, itemid, charttime, storetime, valuenum, valueuom, value",
    "icu/chartevents": "subject_id, itemid, charttime, valuenum, valueuom",
    "icu/outputevents": "subject_id, itemid, charttime, value, valueuom",
    "icu/procedureevents": "subject_id, itemid, starttime",
}
ROWS = """
    select subject_id, null::timestamp as time, 'GENDER//' || gender as code, null::float as numeric_value,
        null::varchar as text_value from patients
    union all select subject_id, make_timestamp(anchor_year - anchor_age, 1, 1, 0, 0, 0), 'MEDS_BIRTH', null, null
        from patients
    union all select subject_id, coalesce(d.deathtime, dod::timestamp), 'MEDS_DEATH', null, null from patients
        left join (select subject_id, min(deathtime) as deathtime from admissions group by 1) d using (subject_id)
        where coalesce(d.deathtime, dod::timestamp) is not null
    union all select subject_id, admittime, 'HOSPITAL_ADMISSION//' || admission_type, null, null from admissions
    union all select subject_id, admittime, 'RACE//' || race, null, null from admissions
    union all select subject_id, admittime, 'INSURANCE//' || insurance, null, null from admissions
    union all select subject_id, dischtime, 'HOSPITAL_DISCHARGE//' || coalesce(discharge_location, 'UNK'), null, null
        from admissions
    union all select subject_id, intime, 'ICU_ADMISSION//' || first_careunit, null, null from icustays
    union all select subject_id, outtime, 'ICU_DISCHARGE//' || last_careunit, null, null from icustays
    union all select subject_id, charttime, 'LAB//SPECIMEN_COLLECTED//' || itemid, null, null from labevents
    union all select subject_id, storetime, 'LAB//RESULT//' || itemid || '//' || coalesce(valueuom, 'UNK'), valuenum,
        value from labevents where storetime is not null
    union all select subject_id, charttime, 'LAB//' || itemid || '//' || coalesce(valueuom, 'UNK'), valuenum, null
        from chartevents
    union all select subject_id, charttime, 'SUBJECT_FLUID_OUTPUT//' || itemid || '//' || valueuom, value, null
        from outputevents
    union all select subject_id, starttime, 'PROCEDURE//START//' || itemid, null, null from procedureevents
"""
STAYS = """
    select stay_id, icustays.subject_id, intime, outtime, death, anchor_year - anchor_age as born,
        least(outtime, death, intime + interval 48 hour) as closes
    from icustays join patients using (subject_id) left join (
        select subject_id, coalesce(min(deathtime), min(dod)::timestamp) as death
        from patients left join admissions using (subject_id) group by 1) using (subject_id)
"""


@pytest.fixture(scope="module")
def sql(shared_data: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    for table, columns in TABLES.items():
        file = shared_data / f"mimic-iv-demo/{table}.csv.gz"
        connection.execute(f"create table {file.name.split('.')[0]} as select {columns} from read_csv('{file}')")
    connection.execute(f"create table rows as {ROWS}")
    connection.execute(f"create view stays as {STAYS}")
    return connection


@pytest.fixture(scope="module")
def came(sql: duckdb.DuckDBPyConnection, tmp_path_factory: pytest.TempPathFactory) -> Read:
    folder = tmp_path_factory.mktemp("demo")
    place = folder / "raw/data"
    place.mkdir(parents=True)
    for shard in range(SHARDS):
        mine = f"select * from rows where subject_id % {SHARDS} = {shard} order by subject_id, time nulls first"
        sql.execute(f"copy ({mine}) to '{place}/{shard}.parquet' (format parquet, row_group_size 20000)")
    return read_cohort(meds, folder / "raw", PrepareConfig(cohort="meds", mapping=str(MAPPING)), folder)


def test_stays_deaths_and_ages_agree_with_the_tables(came: Read, sql: duckdb.DuckDBPyConnection) -> None:
    assert came.stays.height == sql.execute("select count(*) from icustays").fetchone()[0]
    deaths = sql.execute("select count(*) from stays where death between intime and outtime").fetchone()[0]
    assert (came.stays[MORTALITY] == 1).sum() == deaths > 0
    hours = sql.execute("select sum(epoch(outtime - intime) / 3600) from icustays").fetchone()[0]
    assert came.stays[LENGTH_OF_STAY].sum() == pytest.approx(hours)
    # Nobody is in the unit after death, although the release lets some leave it then.
    ended = "case when death between intime and outtime then death else outtime end"
    inside = sql.execute(f"select sum(epoch({ended} - intime) / 3600) from stays").fetchone()[0]
    assert came.stays["hours_in_unit"].sum() == pytest.approx(inside)
    assert inside < hours
    ages = came.measurements.filter(pl.col("feature") == "age")["value"]
    born = sql.execute(
        "select sum(epoch(intime - make_timestamp(born, 1, 1, 0, 0, 0))) / 31556952 from stays"
    ).fetchone()
    assert ages.sum() == pytest.approx(born[0])


def test_events_of_every_modality_agree_with_the_tables(came: Read, sql: duckdb.DuckDBPyConnection) -> None:
    within = "join stays s on t.subject_id = s.subject_id and {time} between intime and closes"
    named = "coalesce(valueuom, 'UNK')"
    valued = f"""(itemid, {named}) in (
        select (itemid, {named}) from {{table}} where true {{also}} group by itemid, {named}
        having count(valuenum) >= 0.1 * count(*) and count(valuenum) > 0)"""
    counts = {}
    for modality, table, time, also in (
        ("laboratory", "labevents", "storetime", "and storetime is not null"),
        ("bedside", "chartevents", "charttime", ""),
    ):
        held = f"(valuenum is not null or not {valued.format(table=table, also=also)})"
        query = f"select count(*) from {table} t {within.format(time=f't.{time}')} where {held}"
        counts[modality] = sql.execute(query).fetchone()[0]
    output = f"select count(*) from outputevents t {within.format(time='charttime')}"
    procedures = f"select count(*) from procedureevents t {within.format(time='starttime')}"
    counts["fluid_output"] = sql.execute(output).fetchone()[0]
    counts["procedure"] = sql.execute(procedures).fetchone()[0]
    found = dict(came.measurements["modality"].value_counts().rows())
    assert {name: found[name] for name in counts} == counts
    assert all(count > 500 for count in counts.values())


def test_demographics_are_those_of_the_last_admission_before_the_stay(
    came: Read, sql: duckdb.DuckDBPyConnection
) -> None:
    wanted = sql.execute("""
        with numbered as (select *, row_number() over (partition by subject_id order by intime) as ordinal from stays)
        select s.subject_id * 1000 + ordinal, 'RACE//' || max_by(race, admittime) from numbered s
        join admissions a on a.subject_id = s.subject_id and admittime <= intime group by 1
    """).fetchall()
    races = came.measurements.filter(pl.col("feature").str.starts_with("RACE//")).select("stay_id", "feature")
    assert sorted(wanted) == sorted(races.rows())


def test_what_is_told_by_discharge_is_not_read(came: Read) -> None:
    names = {feature.name for feature in came.raw.features}
    assert not any(name.startswith(("HOSPITAL_DISCHARGE", "LAB//SPECIMEN", "ICU_", "MEDS_")) for name in names)
    assert came.account["data"]["reasons"]["code is left out by the mapping"] > 0
    assert any("HOSPITAL_DISCHARGE" in code for code in came.rejected("data")["code"])
