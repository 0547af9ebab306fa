"""The MIMIC-IV reader against a release written by hand: stays, series, notes, X-rays, and when each was known."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mimic_example import ANNA, BENS, FIRST, SECOND, held, read, reasons, spoil, values, write_release

from trajlm.cohorts import tables_files
from trajlm.cohorts.mimic_links import STAY_WINDOW, link_by_time
from trajlm.cohorts.mimic_notes import AFTER_OUTCOME, clean_note
from trajlm.cohorts.synthetic import synthesize
from trajlm.errors import TrajlmError
from trajlm.schema import LENGTH_OF_STAY, MORTALITY, PHENOTYPE_PREFIX


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_release(tmp_path / "raw")


def test_stays_are_the_adults_with_their_targets(raw: Path) -> None:
    result = read(raw)
    stays = {row["stay_id"]: row for row in result.stays.iter_rows(named=True)}
    assert set(stays) == {FIRST, SECOND, BENS}
    assert [stays[i][MORTALITY] for i in (FIRST, SECOND, BENS)] == [0, 0, 1]
    assert [stays[i][LENGTH_OF_STAY] for i in (FIRST, SECOND, BENS)] == [96.0, 24.0, 33.0]
    assert [stays[i]["hours_in_unit"] for i in (FIRST, SECOND, BENS)] == [96.0, 24.0, 32.0]  # Ben died an hour before
    assert stays[FIRST]["admission_rank"] < stays[SECOND]["admission_rank"]
    assert stays[FIRST]["subject_id"] == str(ANNA)
    assert reasons(result, "icustays") == {5: "younger than 18 years"}
    assert reasons(result, "patients") == {
        4: "every ICU stay of this patient is rejected",
        5: "no ICU stay of this patient",
    }
    assert reasons(result, "admissions") == {
        3: "no ICU stay of this admission",
        5: "every ICU stay of this admission is rejected",
    }


def test_attrition_tells_what_every_rule_cost(raw: Path) -> None:
    steps = read(raw).raw.attrition
    assert (steps[0].rule, steps[0].stays, steps[0].patients) == ("rows of icustays", 4, 3)
    by_rule = {step.rule: (step.stays, step.patients) for step in steps}
    assert by_rule["age is unknown"] == (4, 3)
    assert by_rule["younger than 18 years"] == (3, 2)
    assert (steps[-1].stays, steps[-1].patients) == (3, 2)
    assert [step.stays for step in steps] == sorted((step.stays for step in steps), reverse=True)


def test_demographics_are_eight_features_at_hour_0_and_absent_where_empty(raw: Path) -> None:
    result = read(raw)
    frame = result.measurements.filter(pl.col("modality") == "demographics", pl.col("stay_id") == BENS)
    assert set(frame["hours_since_admission"]) == {0.0}
    assert dict(frame.select("feature", "value").iter_rows()) == {
        "age": 71.0, "gender=M": 1.0, "admission_type=EW EMER.": 1.0, "insurance=Other": 1.0, "language=?": 1.0,
        "race=UNKNOWN": 1.0,
    }  # fmt: skip
    assert values(result, FIRST, "age") == [(0.0, 62.0)]
    assert {f.name.split("=")[0] for f in result.raw.features if f.modality == "demographics"} == {
        "age", "gender", "admission_type", "admission_location", "insurance", "language", "marital_status", "race",
    }  # fmt: skip


def test_chart_values_are_dated_converted_and_ranged(raw: Path) -> None:
    result = read(raw)
    assert values(result, FIRST, "heart_rate") == [(1.5, 88.0), (1.5, 88.0), (48.0, 71.0)]
    assert values(result, FIRST, "temperature") == [(2.0, pytest.approx(37.0))]
    assert values(result, FIRST, "fraction_inspired_oxygen") == [(2.0, pytest.approx(0.4)), (3.0, pytest.approx(0.5))]
    assert values(result, FIRST, "height") == [(2.0, pytest.approx(177.8))]
    assert values(result, FIRST, "weight") == [(2.0, pytest.approx(90.718474))]
    assert reasons(result, "chartevents") == {
        4: "before admission to the unit",
        6: "after the window",
        8: "value outside the possible range",
        18: "no numeric value",
        19: "not an item of the series",
        20: "after death",
        21: "its ICU stay is rejected",
        22: "names no known ICU stay",
    }


def test_words_of_the_glasgow_coma_scale_become_numbers_and_a_total_where_all_three_are_known(raw: Path) -> None:
    result = read(raw)
    assert values(result, FIRST, "glasgow_coma_scale_eye_opening") == [(2.0, 3.0)]
    assert values(result, FIRST, "glasgow_coma_scale_motor_response") == [(2.0, 6.0), (3.0, 4.0)]
    assert values(result, FIRST, "glasgow_coma_scale_total") == [(2.0, 3.0 + 4.0 + 6.0)]
    assert values(result, FIRST, "capillary_refill_rate") == [(3.0, 1.0)]


def test_a_total_is_known_with_the_last_of_its_components_and_is_not_made_where_one_was_charted(raw: Path) -> None:
    spoil(raw, "icu/chartevents", "08:00:00,,223900", "08:00:00,2150-01-01 10:30:00,223900")
    assert values(read(raw), FIRST, "glasgow_coma_scale_total") == [(4.5, 13.0)]
    row = "10000001,20000001,30000001,,2150-01-01 08:00:00,,198,11,11,,0\n"
    path = raw / "icu/chartevents.csv"
    path.write_text(path.read_text(encoding="utf-8") + row, encoding="utf-8")
    assert values(read(raw, raw.parent / "charted"), FIRST, "glasgow_coma_scale_total") == [(2.0, 11.0)]


@pytest.mark.parametrize("block", [600, 1000])
def test_batches_of_any_size_read_the_same(raw: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The components of one Glasgow total lie in different batches of a few rows."""
    whole = read(raw)
    monkeypatch.setattr(tables_files, "_BLOCK_BYTES", block)
    parts = read(raw, raw.parent / "parts")
    assert whole.account == parts.account
    for name in ("stays", "measurements", "documents", "images"):
        assert in_order(getattr(whole, name)).equals(in_order(getattr(parts, name)))
    assert values(parts, FIRST, "glasgow_coma_scale_total") == [(2.0, 13.0)]


def test_laboratory_results_find_their_stay_by_admission_or_else_by_patient(raw: Path) -> None:
    result = read(raw)
    assert values(result, FIRST, "creatinine") == [(4.0, 1.5)]
    assert values(result, SECOND, "creatinine") == [(1.0, 1.7)]
    assert reasons(result, "labevents") == {  # the second row takes two lines
        5: "after the patient left the unit",
        6: "no ICU stay of this admission",
        7: "no numeric value",
        8: "no ICU stay of this admission",
    }


def test_equal_amounts_of_urine_both_count_and_extra_columns_survive_in_rejected_rows(raw: Path) -> None:
    result = read(raw)
    assert values(result, FIRST, "urine_output") == [(2.0, 100.0), (2.0, 100.0)]
    assert result.rejected("outputevents")["kept"].to_list() == ["no"]
    (urine,) = [f for f in result.raw.features if f.name == "urine_output"]
    assert (urine.aggregate, urine.unit) == ("sum", "mL")


def store(raw: Path, place: str, charttime: str, storetime: str) -> None:
    """Give the first row of that charttime a storetime; both stand side by side."""
    spoil(raw, place, f"{charttime},,", f"{charttime},{storetime},")


def test_rows_are_dated_by_when_they_could_be_known(raw: Path) -> None:
    store(raw, "icu/chartevents", "2150-01-01 05:59:00", "2150-01-01 06:15:00")  # charted before, known in the unit
    store(raw, "icu/chartevents", "2150-01-01 07:30:00", "2150-01-01 09:00:00")
    store(raw, "icu/chartevents", "2150-01-03 06:00:00", "2150-01-03 06:00:01")  # known a second after the window
    store(raw, "icu/outputevents", "2150-01-01 08:00:00", "2150-01-01 07:10:00")  # stored ahead of its own time
    store(raw, "note/radiology", "2150-01-01 12:00:00", "2150-01-02 00:00:00")
    result = read(raw)
    assert values(result, FIRST, "heart_rate") == [(0.25, 70.0), (3.0, 88.0), (1.5, 88.0)]
    assert values(result, FIRST, "urine_output") == [(2.0, 100.0), (2.0, 100.0)]
    assert result.documents["hours_since_admission"].to_list() == [18.0, 2.0]
    assert reasons(result, "chartevents")[5] == "after the window"
    charted = read(raw, raw.parent / "charted", result_times="charted")
    assert values(charted, FIRST, "heart_rate") == [(1.5, 88.0), (1.5, 88.0), (48.0, 71.0)]
    assert charted.documents["hours_since_admission"].to_list() == [6.0, 2.0]
    assert any("not by when the result was available" in leak for leak in charted.raw.open_leaks)
    assert not any("not by when the result was available" in leak for leak in result.raw.open_leaks)


def test_rows_without_storetime_stand_at_charttime_and_are_counted(raw: Path) -> None:
    leaks = [leak for leak in read(raw).raw.open_leaks if "storetime" in leak]
    assert [leak.split(" do not")[0] for leak in leaks] == [
        "13 of 13 rows kept of chartevents",
        "2 of 2 rows kept of labevents",
        "2 of 2 rows kept of outputevents",
        "2 of 2 rows kept of radiology",
    ]


def test_what_was_charted_or_stored_after_the_end_is_left_out(raw: Path) -> None:
    store(raw, "icu/chartevents", "2151-05-02 08:30:00", "2151-05-02 07:00:00")  # charted after death, stored before it
    row = "{},20000002,30000003,,{},{},220045,60,60,bpm,0\n"
    path = raw / "icu/chartevents.csv"
    lines = [
        ("2151-05-02 07:30:00", "2151-05-02 08:00:01"),  # stored a second after death
        ("2151-05-02 07:30:00", "2151-05-02 08:00:00"),
    ]
    path.write_text(path.read_text(encoding="utf-8") + "".join(row.format(10000002, *at) for at in lines), "utf-8")
    store(raw, "note/radiology", "2150-01-10 14:00:00", "2150-01-11 12:00:01")  # Anna had left a second before
    result = read(raw)
    assert reasons(result, "chartevents")[20] == "after death"
    assert reasons(result, "chartevents")[23] == "stored after death"
    assert values(result, BENS, "heart_rate") == [(32.0, 60.0)]
    assert "stored after the patient left the unit" in reasons(result, "radiology").values()


def test_what_is_charted_after_discharge_from_hospital_is_left_out(raw: Path) -> None:
    spoil(raw, "hosp/admissions", "2150-01-20 00:00:00", "2150-01-01 08:30:00")
    spoil(raw, "icu/icustays", "2150-01-10 12:00:00,2150-01-11", "2150-01-01 00:00:00,2150-01-01")
    result = read(raw)
    assert {h for h, _ in values(result, FIRST, "fraction_inspired_oxygen")} == {2.0}
    assert reasons(result, "chartevents")[10] == "after the patient left the unit"
    row = result.stays.row(by_predicate=pl.col("stay_id") == FIRST, named=True)
    assert (row["hours_in_unit"], row[LENGTH_OF_STAY]) == (2.5, 96.0)
    assert any("after discharge from hospital" in note for note in result.raw.notes)


def test_rows_shortly_before_admission_to_the_unit_stand_at_hour_0_where_asked_for(raw: Path) -> None:
    for before, expected in ((0.0, []), (0.01, []), (0.02, [(0.0, 70.0)])):  # the row is of a minute before
        result = read(raw, raw.parent / f"before{before}", before_admission_hours=before)
        assert values(result, FIRST, "heart_rate")[: len(expected)] == expected
        assert (reasons(result, "chartevents").get(4) == "before admission to the unit") == (not expected)
    spoil(raw, "hosp/labevents", "3,10000001,20000001,1,50912,2150-01-07", "3,10000001,20000001,1,50912,2150-01-10")
    spoil(raw, "hosp/labevents", "01-10 13:00:00,1.9", "01-10 10:00:00,1.9")  # between the stays, close to the second
    near = read(raw, raw.parent / "near", before_admission_hours=3)
    assert values(near, SECOND, "creatinine") == [(0.0, 1.9), (1.0, 1.7)]


def test_further_items_are_named_by_their_label_and_unit(raw: Path) -> None:
    path = raw / "icu/chartevents.csv"
    rows = [(224695, 22, "cmH2O"), (224695, 23, ""), (224695, 24, "mmHg"), (228096, -1, "")]
    stay = "10000001,20000001,30000001,,2150-01-01 10:00:00,"
    lines = "".join(f"{stay},{i},{v},{v},{unit},0\n" for i, v, unit in rows)
    path.write_text(path.read_text(encoding="utf-8") + lines, encoding="utf-8")
    path = raw / "hosp/labevents.csv"
    rows = [(51249, 33.1, "%"), (51249, 33.2, "g/dL"), (51249, 33.3, ""), (51249, 33.4, "G/DL "), (51250, 1.0, "")]
    stay = "10000001,20000001,1"
    lines = "".join(f"9,{stay},{i},2150-01-01 10:00:00,{v},{v},{unit},\n" for i, v, unit in rows)
    path.write_text(path.read_text(encoding="utf-8") + lines, encoding="utf-8")
    result = read(raw, items=[224695, 51249, 51250, 226588, 220045])
    assert values(result, FIRST, "Peak Insp. Pressure") == [(4.0, 22.0), (4.0, 23.0)]
    assert reasons(result, "chartevents")[25] == "unknown unit"
    assert values(result, FIRST, "MCHC (51249)") == [(4.0, 33.1), (4.0, 33.3)]
    assert values(result, FIRST, "MCHC (51249) [g/dL]") == [(4.0, 33.2), (4.0, 33.4)]
    assert values(result, FIRST, "Chest Tube #1") == [(2.0, 70.0)]
    units = {f.name: (f.unit, f.aggregate) for f in result.raw.features}
    assert units["Peak Insp. Pressure"] == ("cmH2O", "last")
    assert units["MCHC (51249)"] == ("%", "last")
    assert units["MCHC (51249) [g/dL]"] == ("g/dL", "last")
    assert units["Chest Tube #1"] == ("mL", "sum")
    assert set(result.measurements["feature"]) <= set(units)
    usual = read(raw, raw.parent / "usual").measurements
    assert result.measurements.join(usual, on=usual.columns, how="semi").height == usual.height
    assert result.account["d_items"]["kept"] == 2


@pytest.mark.parametrize(
    ("items", "told"), [([99], "99 is in neither"), ([221906], r"221906 \(Norepinephrine\) is an item of inputevents")]
)
def test_a_further_item_that_cannot_be_read_is_an_error(raw: Path, items: list[int], told: str) -> None:
    with pytest.raises(TrajlmError, match=told):
        read(raw, items=items)


def test_a_unit_that_contradicts_the_item_is_rejected(raw: Path) -> None:
    spoil(raw, "icu/chartevents", "98.6,98.6,°F", "37,37,°C")  # on the item of degrees Fahrenheit
    spoil(raw, "icu/chartevents", "70,70,Inch", "70,70, INCH")
    spoil(raw, "icu/chartevents", "226531,200,200,", "226531,200,200,kg")
    spoil(raw, "hosp/labevents", "1.5,1.5,mg/dL", "133,133,umol/L")
    spoil(raw, "icu/outputevents", "100,ml,yes", "0.1,L,yes")
    result = read(raw)
    assert reasons(result, "chartevents")[7] == reasons(result, "chartevents")[12] == "unknown unit"
    assert values(result, FIRST, "height") == [(2.0, pytest.approx(177.8))]
    assert reasons(result, "labevents")[2] == "unknown unit"
    assert reasons(result, "outputevents")[2] == "unknown unit"


def test_notes_are_cleaned_and_kept_within_their_stay(raw: Path) -> None:
    result = read(raw)
    documents = result.documents.select("stay_id", "hours_since_admission", "modality", "text").rows()
    assert sorted(documents) == [
        (FIRST, 6.0, "radiology_note", "examination: chest. the heart is large, not small."),
        (SECOND, 2.0, "radiology_note", "no admission named"),
    ]
    assert set(reasons(result, "radiology").values()) == {
        "after the patient left the unit",
        "nothing left after cleaning",
    }
    assert set(reasons(result, "discharge").values()) == {AFTER_OUTCOME}
    assert "discharge_note" not in held(result)
    assert not any("discharge summaries" in leak for leak in result.raw.open_leaks)


def test_discharge_summaries_are_opted_into_and_reported_as_a_leak(raw: Path) -> None:
    result = read(raw, paper_faithful=True)
    notes = result.documents.filter(pl.col("modality") == "discharge_note")
    assert notes.select("stay_id", "hours_since_admission", "text").rows() == [(BENS, 24.0, "disposition: expired")]
    assert set(reasons(result, "discharge").values()) == {"after the patient left the unit"}
    assert any("discharge summaries" in leak for leak in result.raw.open_leaks)


words = st.lists(st.text("abcXYZ019.,;()-'é", min_size=1), max_size=5)
headers = st.sampled_from(
    ["Name:  ___  Unit No: 7", "  unit no : 3", "Admission Date:  ___", "DATE OF BIRTH: ___ Sex: F"]
)
broken = st.text("\ufffd\x00\x07\u200b\ufeff", max_size=2)
endings = st.sampled_from(["\n", "\r\n", "\n \n", "\n\t"])


@given(st.lists(st.tuples(words, headers | st.none(), broken, endings), max_size=6))
def test_cleaning_a_note_keeps_every_word_and_no_header(lines: list[tuple]) -> None:
    text = "".join(" \t ".join(w) + b + end + (f"{header}{end}" if header else "") for w, header, b, end in lines)
    assert clean_note(text) == " ".join(word.lower() for w, *_ in lines for word in w)


def test_x_rays_are_ap_views_within_their_stay(raw: Path) -> None:
    result = read(raw, image_pixels=32)
    assert result.images.select("stay_id", "hours_since_admission").rows() == [(FIRST, pytest.approx(3.5))]
    assert reasons(result, "mimic-cxr-2.0.0-metadata") == {
        3: "not an antero-posterior (AP) view",
        4: "image cannot be read",
        5: "image file is missing",
        6: "after the patient left the unit",
    }
    assert [path for path in result.raw.inputs if path.endswith(".jpg")] == [
        str(raw / f"cxr/files/p10/p{ANNA}/s1/{name}.jpg") for name in ("wide", "torn")
    ]


moments = st.integers(0, 40).map(lambda hours: datetime(2150, 1, 1) + timedelta(hours=hours))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2]), st.sampled_from([10, 11, None]), moments, st.integers(1, 9)), max_size=6
    ),
    st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([10, 11, 12, None]), moments), max_size=10),
    st.sampled_from([0, 5]),
)
def test_linking_by_time_equals_a_plain_loop(stays: list[tuple], dated: list[tuple], before: int) -> None:
    windows = [(i, *stay[:3], stay[2] + timedelta(hours=stay[3]), None, True) for i, stay in enumerate(stays)]
    when = pl.Datetime("us")
    types = [pl.Int64, pl.Int64, pl.Int64, when, when, when, pl.Boolean]
    frame = pl.DataFrame(windows, schema=dict(zip(STAY_WINDOW, types, strict=True)), orient="row")
    schema = {"line": pl.Int64, "subject_id": pl.Int64, "hadm_id": pl.Int64, "time": when}
    rows = pl.DataFrame([(i, *row) for i, row in enumerate(dated)], schema=schema, orient="row")
    linked = link_by_time(rows, frame, "time", before)
    assert linked["line"].to_list() == list(range(len(dated)))
    for (subject, hadm, time), came in zip(dated, linked["stay_id"].to_list(), strict=True):
        mine = [
            (intime, number, left)
            for number, of_subject, of_hadm, intime, left, _, _ in windows
            if (of_subject == subject if hadm is None else of_hadm == hadm)
        ]
        begun = [stay for stay in mine if stay[0] <= time]
        soon = [stay for stay in mine if time <= stay[0] <= time + timedelta(hours=before)]
        expected = max(begun)[1] if begun else min(mine)[1] if mine else None
        if before and soon and not (begun and time <= max(begun)[2]):
            expected = min(soon)[1]
        assert came == expected


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "raw"
    synthesize(folder, 40, 3)
    return folder


def test_the_synthetic_release_holds_every_modality_within_each_stay(synthetic: Path, tmp_path: Path) -> None:
    result = read(synthetic, tmp_path, window_hours=24.0)
    assert held(result) == {"demographics", "series", "radiology_note", "chest_xray"}
    assert result.stays.height == 40
    at = ["stay_id", "hours_since_admission"]
    events = pl.concat([frame.select(at) for frame in (result.measurements, result.documents, result.images)])
    events = events.join(result.stays, on="stay_id", how="left", validate="m:1")
    latest = pl.min_horizontal(pl.lit(24.0), pl.col("hours_in_unit"))
    assert events.filter(~pl.col("hours_since_admission").is_between(0, latest + 1e-9)).is_empty()
    assert set(result.measurements["feature"]) <= {feature.name for feature in result.raw.features}
    assert not any("storetime" in leak for leak in result.raw.open_leaks)  # every row says when it was stored
    phenotypes = [c for c in result.stays.columns if c.startswith(PHENOTYPE_PREFIX)]
    assert len(phenotypes) == 25
    for table, path in [(Path(p).name.split(".csv")[0], p) for p in result.raw.inputs if ".csv" in p]:
        assert duckdb.sql(f"select count(*) from read_csv('{path}', all_varchar=true)").fetchall() == [
            (result.account[table]["read"],)
        ]


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.sort(frame.columns)


def test_a_shorter_window_keeps_a_prefix(synthetic: Path, tmp_path: Path) -> None:
    whole = read(synthetic, tmp_path / "whole", window_hours=None)
    short = read(synthetic, tmp_path / "short", window_hours=6.0)
    early = pl.col("hours_since_admission") <= 6.0
    for name in ("measurements", "documents", "images"):
        assert in_order(getattr(short, name)).equals(in_order(getattr(whole, name).filter(early)))
    assert short.measurements.height < whole.measurements.height


def test_lines_of_rejected_notes_are_lines_of_the_file(raw: Path) -> None:
    lines = (raw / "note/radiology.csv").read_text(encoding="utf-8").split("\n")
    rejected = read(raw).rejected("radiology")
    assert sorted(rejected["note_id"]) == ["b", "d"]
    for line, note in rejected.select("line", "note_id").iter_rows():
        assert lines[line - 1].startswith(f"{note},")
