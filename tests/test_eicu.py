"""The eICU reader against releases written by hand, one for each trap; see test_eicu_demo for the open demo."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from cohort_example import Read, read_cohort
from eicu_example import ANNA, BEN, FURTHER, ROW, read, reasons, values, write
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trajlm.cohorts import eicu
from trajlm.cohorts.eicu_lab import TESTS
from trajlm.cohorts.eicu_readings import APS_VARIABLES
from trajlm.cohorts.eicu_units import conversion_factor
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError, UnexpectedInput
from trajlm.grouping import Catalogue, group_measurements
from trajlm.schema import LENGTH_OF_STAY, MORTALITY


def test_the_study_cohort_is_18_to_89_years_and_12_to_720_hours_in_hospital_and_each_rule_says_what_it_costs(
    tmp_path: Path,
) -> None:
    def person(number: int, **changes) -> dict:
        return {"patientunitstayid": number, "uniquepid": f"002-{number}", **changes}

    raw = write(
        tmp_path / "raw",
        patient=[
            person(1, age=18),
            person(2, age=17),
            person(3, age=89),
            person(4, age="> 89"),
            person(5, age=""),
            person(6, hospitaladmitoffset=-1, hospitaldischargeoffset=718, unitdischargeoffset=100),
            person(7, hospitaladmitoffset=-1, hospitaldischargeoffset=719, unitdischargeoffset=100),
            person(8, hospitaladmitoffset=0, hospitaldischargeoffset=43200),
            person(9, hospitaladmitoffset=-1, hospitaldischargeoffset=43200),
            person(10, hospitaladmitoffset=100, hospitaldischargeoffset=50),
            person(11, hospitaldischargeoffset=""),
            person(12, unitdischargeoffset=-1),
            person(1, age=50),
            person(13, uniquepid=""),
            {"patientunitstayid": ""},
        ],
    )
    result = read(raw)
    assert result.stays["stay_id"].to_list() == [1, 3, 7, 8, 13]
    assert result.stays.filter(stay_id=13)["subject_id"].item() == "stay-13"
    assert reasons(result, "patient") == {
        3: "younger than 18 years",
        5: "older than 89 years, recorded as > 89",
        6: "age is unknown",
        7: "less than 12 hours in hospital",
        10: "more than 720 hours in hospital",
        11: "discharged from the hospital before admission to it",
        12: "length of the hospital stay is unknown",
        13: "left the unit or the hospital before entering the unit",
        14: "repeats an earlier patientunitstayid",
        16: "names no patientunitstayid",
    }
    # Two rows name no stay of their own, so 13 stays are in the release.
    assert [step.stays for step in result.raw.attrition] == [13, 12, 11, 10, 9, 8, 7, 6, 5]
    assert [step.patients for step in result.raw.attrition] == [step.stays for step in result.raw.attrition]


def test_targets_are_of_the_hospital_stay_and_an_unknown_status_stays_unknown(tmp_path: Path) -> None:
    statuses = ["Alive", "Expired", "", "Transferred", "EXPIRED"]
    raw = write(
        tmp_path / "raw",
        patient=[
            {"patientunitstayid": i, "hospitaldischargestatus": status, "hospitaladmitoffset": -60 * i}
            for i, status in enumerate(statuses)
        ],
    )
    result = read(raw)
    assert result.stays[MORTALITY].to_list() == [0, 1, None, None, 1]
    assert result.stays[LENGTH_OF_STAY].to_list() == [119 + i for i in range(5)]
    assert result.stays["hours_in_unit"].to_list() == [96.0] * 5
    assert any(note.startswith("2 stays have a hospital status other than") for note in result.raw.notes)


def test_stays_of_a_patient_are_ordered_by_year_hospital_stay_and_visit(tmp_path: Path) -> None:
    order = [(2014, 12, 1), (2015, 11, 2), (2015, 11, 1), (2014, 12, 2)]
    raw = write(
        tmp_path / "raw",
        patient=[
            {
                "patientunitstayid": i,
                "hospitaldischargeyear": year,
                "patienthealthsystemstayid": hospital,
                "unitvisitnumber": visit,
            }
            for i, (year, hospital, visit) in enumerate(order)
        ],
    )
    ranks = read(raw).stays["admission_rank"].to_list()
    assert sorted(range(4), key=ranks.__getitem__) == sorted(range(4), key=order.__getitem__)


def test_demographics_are_known_on_admission_and_impossible_numbers_are_absent(tmp_path: Path) -> None:
    discharge = {"hospitaldischargelocation": "Death", "unitdischargelocation": "Death", "dischargeweight": 44}
    raw = write(
        tmp_path / "raw",
        patient=[
            {"admissionheight": 170, "admissionweight": 70.5, "apacheadmissiondx": "Sepsis, renal", **discharge},
            {"patientunitstayid": BEN, "admissionheight": 66, "admissionweight": 0.5, "gender": ""},
        ],
    )
    result = read(raw)
    assert values(result, "demographics") == [
        (0.0, "age", 60.0),
        (0.0, "admissionheight", 170.0),
        (0.0, "admissionweight", 70.5),
        (0.0, "hours_in_hospital_before", 1.0),
        (0.0, "unitvisitnumber", 1.0),
        (0.0, "gender=Female", 1.0),
        (0.0, "unittype=MICU", 1.0),
        (0.0, "apacheadmissiondx=Sepsis, renal", 1.0),
    ]
    assert {feature for _, feature, _ in values(result, "demographics", BEN)} == {
        "age", "hours_in_hospital_before", "unitvisitnumber", "unittype=MICU",
    }  # fmt: skip
    notes = " ".join(result.raw.notes)
    assert "1 values of admissionheight outside 100 to 250 cm" in notes
    assert "1 values of admissionweight outside 20 to 400 kg" in notes


def test_rows_are_dated_in_hours_and_nothing_lies_outside_the_stay_or_the_window(tmp_path: Path) -> None:
    offsets = [-1441, -1440, -1, 0, 90, 2880, 2881, 4000, 4001, 5761, ""]
    raw = write(
        tmp_path / "raw",
        patient=[
            {"hospitaldischargeoffset": 4000},
            {"patientunitstayid": BEN, "age": 10},
        ],
        diagnosis=[{"diagnosisoffset": offset} for offset in offsets] + [{"patientunitstayid": BEN}],
    )
    result = read(raw)
    expected = {
        2: "before admission to the unit",
        3: "before admission to the unit",
        4: "before admission to the unit",
        8: "after the window",
        9: "after the window",
        10: "after discharge from the hospital or death",
        11: "after the patient left the unit",
        12: "no time",
        13: "its stay is not in the cohort",
    }
    assert reasons(result, "diagnosis") == expected
    assert {hours for hours, _, _ in values(result, "diagnosis")} == {0.0, 1.5, 48.0}

    early = read(raw, before_admission_hours=24)
    assert set(reasons(early, "diagnosis")) == set(expected) - {3, 4}
    assert {hours for hours, _, _ in values(early, "diagnosis")} == {0.0, 1.5, 48.0}

    whole = read(raw, window_hours=None)
    assert set(reasons(whole, "diagnosis")) == set(expected) - {8, 9}


@pytest.mark.parametrize("modality", ["diagnosis", "treatment"])
def test_a_hierarchical_string_gives_every_prefix_once(tmp_path: Path, modality: str) -> None:
    path, offset = f"{modality}string", f"{modality}offset"
    raw = write(
        tmp_path / "raw",
        **{
            modality: [
                {path: "a|b|c"},
                {path: "a|b|d"},
                {path: " a | |b|"},
                {path: "a", offset: 31},
                {path: ""},
                {path: "|"},
            ]
        },
    )
    result = read(raw, least_code_share=0.25)
    assert sorted(values(result, modality)) == [
        (0.5, "a", 1.0),
        (0.5, "a|b", 1.0),
        (0.5, "a|b|c", 1.0),
        (0.5, "a|b|d", 1.0),
        (pytest.approx(31 / 60), "a", 1.0),
    ]
    assert reasons(result, modality) == {6: f"names no {modality}", 7: f"names no {modality}"}
    features = [feature for feature in result.raw.features if feature.modality == modality]
    assert [feature.name for feature in features] == ["a", "a|b", "a|b|c", "a|b|d"]
    assert {(feature.kind, feature.least_share) for feature in features} == {("category", 0.25)}


def test_a_result_is_known_when_it_was_last_revised_and_charted_when_it_was_drawn(tmp_path: Path) -> None:
    def result_at(drawn, revised, value) -> dict:
        return {"labresultoffset": drawn, "labresultrevisedoffset": revised, "labresult": value}

    raw = write(
        tmp_path / "raw",
        lab=[
            result_at(90, 120, 142),
            result_at(30, 120, 141),
            result_at(-30, 60, 140),
            result_at(30, 6000, 139),
            result_at(180, 170, 143),
            result_at(240, "", 144),
        ],
    )
    known = read(raw)
    # At minute 120 both are known: the one drawn later comes last, so it stands.
    assert [(hours, value) for hours, _, value in values(known, "lab")] == [
        (1.0, 140.0), (2.0, 141.0), (2.0, 142.0), (3.0, 143.0), (4.0, 144.0),
    ]  # fmt: skip
    assert reasons(known, "lab") == {5: "after the patient left the unit"}
    charted = read(raw, result_times="charted")
    assert sorted((hours, value) for hours, _, value in values(charted, "lab")) == [
        (0.5, 139.0), (0.5, 141.0), (1.5, 142.0), (3.0, 143.0), (4.0, 144.0),
    ]  # fmt: skip
    assert reasons(charted, "lab") == {4: "before admission to the unit"}
    assert len(charted.raw.open_leaks) == len(known.raw.open_leaks) + 1


def stands(result: Read, modality: str) -> tuple[list[tuple[float, str, float]], int]:
    """(hours, feature, value) of the events of ANNA, and how many measurements a newer one superseded."""
    catalogue = Catalogue(result.raw.modalities, result.raw.features)
    mine = result.measurements.filter(pl.col("modality") == modality, pl.col("stay_id") == ANNA)
    cells, superseded = group_measurements(catalogue, mine, 0.0)
    names = [feature.name for feature in catalogue.features]
    rows = cells.select("hours", "feature_index", "value").rows()
    return [(hours, names[index], value) for hours, index, value in rows], superseded


def test_a_specimen_that_is_known_late_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    drawn = [(100, 300, 6.8), (180, 200, 3.9), (250, 310, 4.1)]
    rows = [{"labresultoffset": d, "labresultrevisedoffset": r, "labname": "potassium", "labresult": v,
             "labmeasurenamesystem": "mmol/L"} for d, r, v in drawn]  # fmt: skip
    unknown = {**rows[0], "labresultoffset": "", "labresultrevisedoffset": 330, "labresult": 4.4}
    found, superseded = stands(read(write(tmp_path / "raw", lab=rows)), "lab")
    assert found == [(200 / 60, "potassium", pytest.approx(3.9)), (310 / 60, "potassium", pytest.approx(4.1))]
    assert superseded == 1
    # Where a release does not say when it was drawn, a result is as new as the hour at which it was known.
    found, superseded = stands(read(write(tmp_path / "raw", lab=[*rows, unknown])), "lab")
    assert (found[-1], superseded) == ((5.5, "potassium", pytest.approx(4.4)), 1)


def test_of_what_was_measured_before_admission_the_newest_stands(tmp_path: Path) -> None:
    """The tables are in no order of time."""
    rows = [{"observationoffset": at, "noninvasivemean": mean} for at, mean in ((-2, 105), (-300, 70), (-90, 86))]
    result = read(write(tmp_path / "raw", vitalAperiodic=rows), further_modalities=["vital_aperiodic"],
                  before_admission_hours=6)  # fmt: skip
    found, superseded = stands(result, "vital_aperiodic")
    assert [row for row in found if row[1] == "noninvasivemean"] == [(0.0, "noninvasivemean", 105.0)]
    assert superseded == 2


def test_results_stand_in_one_unit_per_test_and_impossible_ones_are_rejected(tmp_path: Path) -> None:
    def result_of(name, value, unit="") -> dict:
        return {"labname": name, "labresult": value, "labmeasurenamesystem": unit}

    raw = write(
        tmp_path / "raw",
        lab=[
            result_of("Hgb", 12, "g/dL"),
            result_of("Hgb", 120, "g/L"),
            result_of("Hgb", 7.4, "mmol/L"),
            result_of("Hgb", 11),
            result_of("Hgb", -1, "g/dL"),
            result_of("FiO2", 0.4, "%"),
            result_of("FiO2", 4000, "%"),
            result_of("Temperature", 98.6, "&#176;C"),
            result_of("ionized calcium", 1.0, "mg/dL"),
            result_of("Base Excess", -12, "mEq/L"),
            result_of("sodium", "<110", "mmol/L"),
            result_of("sodium", "", "mmol/L"),
            result_of("sodium", "inf", "mmol/L"),
            result_of("", 1, "mmol/L"),
            result_of("unheard of", 3, "ng/mL"),
            result_of("unheard of", 4, "mcg/L"),
            result_of("unheard of", 5, "Units/L"),
            result_of("unheard of", -5, "ng/mL"),
        ],
    )
    result = read(raw)
    assert sorted((feature, value) for _, feature, value in values(result, "lab")) == [
        ("Base Excess", -12.0),
        ("FiO2", 40.0),
        ("Hgb", 11.0),
        ("Hgb", 12.0),
        ("Hgb", 12.0),
        ("Temperature", pytest.approx(37.0)),
        ("ionized calcium", pytest.approx(4.008)),
        ("unheard of", 3.0),
        ("unheard of", 4.0),
    ]
    strange, outside = "its unit is not that of the test, conversion unknown", "value outside the possible range"
    assert reasons(result, "lab") == {
        4: strange,
        6: outside,
        8: outside,
        12: "no numeric result",
        13: "no numeric result",
        14: "no numeric result",
        15: "names no test",
        18: strange,
        19: outside,
    }
    units = {feature.name: feature.unit for feature in result.raw.features if feature.modality == "lab"}
    assert units["Hgb"] == "g/dL"
    assert units["unheard of"] == "ng/mL"


_PREFIXES = {"": 1.0, "m": 1e-3, "mc": 1e-6, "n": 1e-9, "p": 1e-12}
_VOLUMES = {"L": 1.0, "dL": 1e-1, "mL": 1e-3}


@given(*(st.sampled_from(sorted(_PREFIXES)) for _ in range(2)), *(st.sampled_from(sorted(_VOLUMES)) for _ in range(2)))
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_conversion_keeps_the_amount_and_inverts(one: str, other: str, volume: str, another: str) -> None:
    here, there = f"{one}g/{volume}", f"{other}g/{another}"
    factor, back = conversion_factor(here, there), conversion_factor(there, here)
    assert factor is not None
    assert back is not None
    amount = _PREFIXES[one] / _VOLUMES[volume]
    assert math.isclose(factor * _PREFIXES[other] / _VOLUMES[another], amount, rel_tol=1e-9)
    assert math.isclose(factor * back, 1, rel_tol=1e-9)


def test_units_of_another_dimension_are_not_converted() -> None:
    assert conversion_factor("mmol/L", "mg/dL") is None
    assert conversion_factor("%", "g/dL") is None
    assert conversion_factor("", "g/dL") is None
    assert conversion_factor("MG/DL", "mg/dL") == conversion_factor("&#176;C", "°C") == 1.0
    assert TESTS["labname"].is_unique().all()
    assert (TESTS["low"].fill_null(0) < TESTS["high"].fill_null(math.inf)).all()


def test_minus_one_is_missing_and_the_score_is_known_after_24_hours(tmp_path: Path) -> None:
    raw = write(
        tmp_path / "raw",
        patient=[{}, {"patientunitstayid": BEN, "unitdischargeoffset": 1439}],
        apacheApsVar=[{"vent": 0, "wbc": 10.2, "ph": 99}, {"patientunitstayid": BEN, "vent": 1}],
    )
    result = read(raw)
    assert values(result, "aps") == [(24.0, "vent", 0.0), (24.0, "wbc", 10.2)]
    assert reasons(result, "apacheApsVar") == {3: "after the patient left the unit"}
    notes = " ".join(result.raw.notes)
    absent = 2 * len(APS_VARIABLES) - 4
    assert f"{absent} values of apacheApsVar are -1" in notes
    assert "1 values of apacheApsVar outside the possible range" in notes
    assert reasons(read(raw, window_hours=12), "apacheApsVar") == {
        2: "after the window",
        3: "after the patient left the unit",
    }
    early = read(raw, window_hours=12, aps_at_admission=True)
    assert values(early, "aps", BEN) == [(0.0, "vent", 1.0)]
    assert any("severity score" in leak for leak in early.raw.open_leaks)
    assert not any("severity score" in leak for leak in result.raw.open_leaks)

    nothing = write(tmp_path / "raw", apacheApsVar=[{}, {"ph": 99}])
    assert reasons(read(nothing), "apacheApsVar") == {
        2: "no value is recorded",
        3: "no value within the possible range",
    }


def test_further_modalities_are_read_where_they_are_named_only(tmp_path: Path) -> None:
    raw = write(
        tmp_path / "raw",
        vitalPeriodic=[{"temperature": 98.6, "heartrate": 900}, {}, {"heartrate": 900}],
        vitalAperiodic=[{"noninvasivemean": 70, "svr": -5}],
        infusiondrug=[
            {},
            {"drugname": " propofol  (ML/HR) ", "drugrate": 0},
            {"drugname": "Propofol ()", "drugrate": "1e1"},
            {"drugname": "Propofol (Unknown)"},
            {"drugrate": "ERROR"},
            {"drugrate": ""},
            {"drugrate": -1},
            {"drugname": ""},
        ],
    )
    assert [modality.name for modality in read(raw).raw.modalities] == [
        "demographics", "diagnosis", "treatment", "medication", "lab", "aps",
    ]  # fmt: skip
    assert "infusiondrug" not in read(raw).account
    result = read(raw, further_modalities=["infusion", "vital_periodic", "vital_aperiodic"])
    assert [modality.name for modality in result.raw.modalities][6:] == FURTHER
    assert values(result, "vital_periodic") == [(0.5, "temperature", pytest.approx(37.0))]
    assert reasons(result, "vitalPeriodic") == {3: "no value is recorded", 4: "no value within the possible range"}
    assert values(result, "vital_aperiodic") == [(0.5, "noninvasivemean", 70.0)]
    assert values(result, "infusion") == [
        (0.5, "propofol (ml/hr)", 5.0),
        (0.5, "propofol (ml/hr)", 0.0),
        (0.5, "propofol", 10.0),
        (0.5, "propofol", 5.0),
    ]
    shares = {f.modality: f.least_share for f in result.raw.features}
    assert (shares["infusion"], shares["vital_periodic"], shares["demographics"]) == (0.01, 0, 0)
    assert reasons(result, "infusiondrug") == {
        6: "no numeric rate",
        7: "no numeric rate",
        8: "value outside the possible range",
        9: "names no drug",
    }
    with pytest.raises(TrajlmError, match="'vital_peroidic' is not one of eICU's; the nearest is 'vital_periodic'"):
        read(raw, further_modalities=["vital_peroidic"])


def test_the_paper_drops_stays_without_a_laboratory_result_and_puts_the_score_at_hour_0(tmp_path: Path) -> None:
    raw = write(
        tmp_path / "raw",
        patient=[{"admissionheight": 170}, {"patientunitstayid": BEN, "uniquepid": "002-2"}],
        lab=[{"labresultoffset": -30}, {"patientunitstayid": BEN, "labresult": ""}],
        apacheApsVar=[{"vent": 1}],
        diagnosis=[{}, {"patientunitstayid": BEN}],
    )
    ours, paper = read(raw), read(raw, paper_faithful=True)
    assert ours.stays["stay_id"].to_list() == [ANNA, BEN]
    assert paper.stays["stay_id"].to_list() == [ANNA]
    assert reasons(paper, "patient") == {3: "no laboratory result, as in the paper"}
    assert [step.stays for step in paper.raw.attrition][-2:] == [2, 1]
    assert values(paper, "aps") == [(0.0, "vent", 1.0)]
    assert {feature for _, feature, _ in values(paper, "demographics")} == {"age", "gender=Female"}
    assert set(paper.measurements["stay_id"]) == {ANNA}
    assert len(paper.raw.open_leaks) > len(ours.raw.open_leaks)


def full(folder: Path) -> Path:
    return write(folder, **{table: [{}, {"patientunitstayid": BEN}] for table in ROW if table != "apacheApsVar"},
                 apacheApsVar=[{"vent": 1}])  # fmt: skip


@pytest.mark.parametrize("how", ["lower case", "parquet"])
def test_a_release_reads_the_same_in_lower_case_and_as_parquet(tmp_path: Path, how: str) -> None:
    raw = full(tmp_path / "raw")
    expected = read(raw, further_modalities=FURTHER)
    for path in sorted(raw.iterdir()):
        if how == "lower case":
            path.rename(raw / path.name.lower())
        else:
            pl.read_csv(path).write_parquet(path.with_suffix(".parquet"))
            path.unlink()
    again = read(raw, further_modalities=FURTHER)
    assert again.measurements.equals(expected.measurements)
    assert again.stays.equals(expected.stays)
    assert again.raw.features == expected.raw.features
    assert {name.lower(): rows for name, rows in again.account.items()} == {
        name.lower(): rows for name, rows in expected.account.items()
    }
    assert len(again.raw.inputs) == len(expected.raw.inputs) == 9


def test_a_table_that_is_absent_is_noted_and_a_patient_table_must_be_there(tmp_path: Path) -> None:
    result = read(write(tmp_path / "raw"))
    for table in ("diagnosis", "treatment", "medication", "lab", "apacheApsVar"):
        assert f"{table} is absent: its events are missing" in result.raw.notes
    assert set(result.measurements["modality"]) == {"demographics"}
    (tmp_path / "raw/patient.csv").unlink()
    with pytest.raises(TrajlmError, match=r"expected patient\.csv"):
        read(tmp_path / "raw")
    with pytest.raises(TrajlmError, match="expected the folder of an eICU release"):
        read_cohort(eicu, tmp_path / "nowhere", PrepareConfig(cohort="eicu"), tmp_path / "none")


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        (
            "patient",
            {"age": "old"},
            "patient.csv, line 2, column age: expected whole years, '> 89' or nothing, came 'old'",
        ),
        ("patient", {"unitdischargeoffset": "soon"}, "column unitdischargeoffset: expected a number or nothing"),
        ("diagnosis", {"diagnosisoffset": "now"}, "diagnosis.csv, line 2, column diagnosisoffset: expected a number"),
        ("lab", {"patientunitstayid": "x"}, "lab.csv, line 2, column patientunitstayid: expected an integer"),
    ],
)
def test_a_cell_that_is_no_number_is_one_clear_error(tmp_path: Path, table: str, change: dict, message: str) -> None:
    raw = write(tmp_path / "raw", **{table: [change]})
    with pytest.raises(UnexpectedInput) as error:
        read(raw)
    assert message in str(error.value)


def test_a_release_without_any_stay_of_the_cohort_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrajlmError, match="none of its 1 unit stays is one of the study cohort"):
        read(write(tmp_path / "raw", patient=[{"age": 5}]))


def spoil(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def compress_half(path: Path) -> None:
    whole = gzip.compress(path.read_bytes())
    path.with_name(path.name + ".gz").write_bytes(whole[: len(whole) // 2])
    path.unlink()


HARMLESS = {
    "marked as UTF-8": spoil(lambda data: b"\xef\xbb\xbf" + data),
    "with carriage returns": spoil(lambda data: data.replace(b"\n", b"\r\n")),
    "with a header in capitals": spoil(lambda data: data.replace(data.split(b"\n")[0], data.split(b"\n")[0].upper())),
}
HARMFUL = {
    "empty": spoil(lambda _: b""),
    "cut within gzip": compress_half,
    "separated by semicolons": spoil(lambda data: data.replace(b",", b";")),
    "without the column of the stay": spoil(lambda data: data.replace(b"patientunitstayid", b"unitstay")),
    "with a line cut short": spoil(lambda data: data.rstrip().rsplit(b",", 2)[0] + b"\n"),
    "in another encoding": spoil(lambda data: data.replace(b"101", b"101\xe9")),
    "with text for a stay": spoil(lambda data: data.replace(b"101", b"one")),
}


@pytest.mark.parametrize("table", ["patient", "medication", "apacheApsVar", "infusiondrug"])
def test_a_spoilt_table_reads_the_same_or_is_one_clear_error(tmp_path: Path, table: str) -> None:
    expected = read(full(tmp_path / "whole"), further_modalities=FURTHER)
    for number, change in enumerate([*HARMLESS.values(), *HARMFUL.values()]):
        raw = full(tmp_path / f"spoilt-{number}")
        change(raw / f"{table}.csv")
        if number < len(HARMLESS):
            again = read(raw, further_modalities=FURTHER)
            assert again.measurements.equals(expected.measurements)
            assert again.account == expected.account
            continue
        with pytest.raises(UnexpectedInput) as error:
            read(raw, further_modalities=FURTHER)
        assert f"{table}.csv" in str(error.value)
        assert "\n" not in str(error.value)
