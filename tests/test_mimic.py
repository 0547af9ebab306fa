"""The MIMIC-IV reader against a release written by hand, the synthetic release, and SQL over the open demo."""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trajlm.cohorts import mimic
from trajlm.cohorts.ledger import RowLedger
from trajlm.cohorts.mimic_images import small_picture
from trajlm.cohorts.mimic_links import STAY_WINDOW, link_by_time
from trajlm.cohorts.mimic_notes import AFTER_OUTCOME, clean_note
from trajlm.cohorts.mimic_series import ITEMS
from trajlm.cohorts.synthetic import synthesize
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError, UnexpectedInput
from trajlm.schema import LENGTH_OF_STAY, MORTALITY, RawTimelines

SHARED = Path(__file__).parents[1].parent / "shared/data"
DEMO = SHARED / "mimic-iv-demo"
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="the open demo of MIMIC-IV is not at ../shared/data")

ANNA, BEN, CARL, DORA = 10000001, 10000002, 10000003, 10000004
FIRST, SECOND, BENS, CARLS = 30000001, 30000002, 30000003, 30000004  # stays; Anna has the first two

PATIENTS = """subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod
10000001,F,60,2148,2011 - 2013,
10000002,M,71,2151,2011 - 2013,2151-05-02
10000003,M,17,2152,2011 - 2013,
10000004,F,50,2153,2011 - 2013,
"""
ADMISSIONS = """subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admission_location,insurance,language,\
marital_status,race,hospital_expire_flag
10000001,20000001,2150-01-01 00:00:00,2150-01-20 00:00:00,,URGENT,EMERGENCY ROOM,Medicare,ENGLISH,MARRIED,WHITE,0
10000001,20000009,2149-01-01 00:00:00,2149-01-20 00:00:00,,URGENT,EMERGENCY ROOM,Medicare,ENGLISH,MARRIED,WHITE,0
10000002,20000002,2151-04-30 23:00:00,2151-05-02 08:00:00,2151-05-02 08:00:00,EW EMER.,,Other,?,,UNKNOWN,1
10000003,20000003,2152-01-01 00:00:00,2152-01-20 00:00:00,,URGENT,EMERGENCY ROOM,Medicaid,ENGLISH,SINGLE,WHITE,0
"""
ICUSTAYS = """subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los
10000001,20000001,30000002,MICU,MICU,2150-01-10 12:00:00,2150-01-11 12:00:00,1
10000001,20000001,30000001,MICU,MICU,2150-01-01 06:00:00,2150-01-05 06:00:00,4
10000002,20000002,30000003,MICU,MICU,2151-05-01 00:00:00,2151-05-02 09:00:00,1.375
10000003,20000003,30000004,MICU,MICU,2152-01-01 06:00:00,2152-01-02 06:00:00,1
"""
CHARTEVENTS = """subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning
10000001,20000001,30000001,,2150-01-01 07:30:00,,220045,88,88,bpm,0
10000001,20000001,30000001,,2150-01-01 07:30:00,,220045,88,88,bpm,0
10000001,20000001,30000001,,2150-01-01 05:59:00,,220045,70,70,bpm,0
10000001,20000001,30000001,,2150-01-03 06:00:00,,220045,71,71,bpm,0
10000001,20000001,30000001,,2150-01-03 06:00:01,,220045,72,72,bpm,0
10000001,20000001,30000001,,2150-01-01 08:00:00,,223761,98.6,98.6,°F,0
10000001,20000001,30000001,,2150-01-01 08:00:00,,223762,98.6,98.6,°C,0
10000001,20000001,30000001,,2150-01-01 08:00:00,,223835,40,40,,0
10000001,20000001,30000001,,2150-01-01 09:00:00,,223835,0.5,0.5,,0
10000001,20000001,30000001,,2150-01-01 08:00:00,,226707,70,70,Inch,0
10000001,20000001,30000001,,2150-01-01 08:00:00,,226531,200,200,,0
10000001,20000001,30000001,,2150-01-01 08:00:00,,220739,To Speech,,,0
10000001,20000001,30000001,,2150-01-01 08:00:00,,223900,Confused,4,,0
10000001,20000001,30000001,,2150-01-01 08:00:00,,223901,Obeys Commands,,,0
10000001,20000001,30000001,,2150-01-01 09:00:00,,223901,Flex-withdraws,,,0
10000001,20000001,30000001,,2150-01-01 09:00:00,,223951,Abnormal >3 Seconds,,,0
10000001,20000001,30000001,,2150-01-01 09:00:00,,223951,pink,,,0
10000001,20000001,30000001,,2150-01-01 09:00:00,,228096,0,0,,0
10000002,20000002,30000003,,2151-05-02 08:30:00,,220045,0,0,bpm,0
10000003,20000003,30000004,,2152-01-01 07:00:00,,220045,90,90,bpm,0
10000003,20000003,39999999,,2152-01-01 07:00:00,,220045,90,90,bpm,0
"""
LABEVENTS = """labevent_id,subject_id,hadm_id,specimen_id,itemid,charttime,value,valuenum,valueuom,comments
1,10000001,20000001,1,50912,2150-01-01 10:00:00,1.5,1.5,mg/dL,
2,10000001,,1,50912,2150-01-10 13:00:00,1.7,1.7,mg/dL,"two
lines"
3,10000001,20000001,1,50912,2150-01-07 13:00:00,1.9,1.9,mg/dL,
4,10000001,20000009,1,50912,2150-01-10 13:00:00,1.8,1.8,mg/dL,
5,10000001,20000001,1,50971,2150-01-01 10:00:00,___,,mEq/L,hemolyzed
6,10000004,,1,50912,2150-01-01 10:00:00,1.5,1.5,mg/dL,
"""
OUTPUTEVENTS = """subject_id,hadm_id,stay_id,charttime,storetime,itemid,value,valueuom,kept
10000001,20000001,30000001,2150-01-01 08:00:00,,226559,100,ml,yes
10000001,20000001,30000001,2150-01-01 08:00:00,,226559,100,ml,yes
10000001,20000001,30000001,2150-01-01 08:00:00,,226588,70,ml,no
"""
HEADER = (
    "Name:  ___   Unit No:   ___\n \nAdmission Date:  ___   Discharge Date:   ___\n \nDate of Birth:  ___   Sex:   F\n"
)
NOTE_COLUMNS = ["note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "storetime", "text"]
RADIOLOGY = [
    [
        "a",
        ANNA,
        20000001,
        "RR",
        1,
        "2150-01-01 12:00:00",
        "",
        "EXAMINATION: Chest.\n\nThe heart   is\tLARGE, not \x07small\ufffd.",
    ],
    ["b", ANNA, 20000001, "RR", 2, "2150-01-08 12:00:00", "", "between the stays"],
    ["c", ANNA, "", "RR", 3, "2150-01-10 14:00:00", "", "no admission named"],
    ["d", ANNA, 20000001, "RR", 4, "2150-01-01 13:00:00", "", "Name: ___\n\n"],
]
DISCHARGE = [
    ["e", ANNA, 20000001, "DS", 1, "2150-01-20 00:00:00", "", HEADER + "Went home."],
    ["f", BEN, 20000002, "DS", 1, "2151-05-02 00:00:00", "", HEADER + "Disposition: Expired"],
]
XRAYS = [
    ["wide", ANNA, 1, "AP", "21500101", "93000.5"],
    ["side", ANNA, 1, "LATERAL", "21500101", "93000.5"],
    ["torn", ANNA, 1, "AP", "21500101", "100000"],
    ["gone", ANNA, 1, "AP", "21500101", "110000"],
    ["late", ANNA, 2, "AP", "21500107", "000000.000"],
]


def rows(header: list[str], lines: list[list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *lines])
    return text.getvalue()


def wide_picture() -> np.ndarray:
    """90 high, 180 wide: black, with the middle 90 columns grey."""
    pixels = np.zeros((90, 180), np.uint8)
    pixels[:, 45:135] = 200
    return pixels


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    tables = {
        "hosp/patients": PATIENTS, "hosp/admissions": ADMISSIONS, "icu/icustays": ICUSTAYS,
        "icu/chartevents": CHARTEVENTS, "hosp/labevents": LABEVENTS, "icu/outputevents": OUTPUTEVENTS,
        "note/radiology": rows(NOTE_COLUMNS, RADIOLOGY), "note/discharge": rows(NOTE_COLUMNS, DISCHARGE),
        "cxr/mimic-cxr-2.0.0-metadata": rows(
            ["dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"], XRAYS),
    }  # fmt: skip
    for place, text in tables.items():
        path = folder / f"{place}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    study = folder / f"cxr/files/p10/p{ANNA}/s1"
    study.mkdir(parents=True)
    Image.fromarray(wide_picture()).save(study / "wide.jpg", quality=95)
    (study / "torn.jpg").write_bytes((study / "wide.jpg").read_bytes()[:300])
    return folder


@dataclass
class Result:
    timelines: RawTimelines
    account: dict[str, dict]
    folder: Path

    def reasons(self, table: str) -> dict[int, str]:
        frame = pl.read_parquet(self.folder / f"{table}.parquet")
        return dict(frame.select("line", "reason").iter_rows())

    def values(self, stay: int, feature: str) -> list[tuple[float, float]]:
        frame = self.timelines.measurements.filter(pl.col("stay_id") == stay, pl.col("feature") == feature)
        return list(frame.select("hours_since_admission", "value").iter_rows())


def read(raw: Path, rejected: Path | None = None, **options) -> Result:
    folder = rejected or raw.parent / "rejected"
    ledger = RowLedger(folder)
    timelines = mimic.read(raw, PrepareConfig(cohort="mimic", **options), ledger)
    return Result(timelines, ledger.close(), folder)


def held(timelines: RawTimelines) -> set[str]:
    """Modalities that some event has; the release's list is the same whatever a site holds."""
    assert [modality.name for modality in timelines.modalities] == [
        "demographics", "series", "radiology_note", "chest_xray", "discharge_note",
    ]  # fmt: skip
    frames = (timelines.measurements, timelines.documents, timelines.images)
    return set(pl.concat([frame["modality"] for frame in frames]))


def test_stays_are_the_adults_with_their_targets(raw: Path) -> None:
    result = read(raw)
    stays = {row["stay_id"]: row for row in result.timelines.stays.iter_rows(named=True)}
    assert set(stays) == {FIRST, SECOND, BENS}
    assert [stays[i][MORTALITY] for i in (FIRST, SECOND, BENS)] == [0, 0, 1]
    assert [stays[i][LENGTH_OF_STAY] for i in (FIRST, SECOND, BENS)] == [96.0, 24.0, 33.0]
    assert stays[FIRST]["admission_rank"] < stays[SECOND]["admission_rank"]
    assert stays[FIRST]["subject_id"] == str(ANNA)
    assert result.reasons("icustays") == {5: "younger than 18 years"}
    assert result.reasons("patients") == {
        4: "every ICU stay of this patient is rejected",
        5: "no ICU stay of this patient",
    }
    assert result.reasons("admissions") == {
        3: "no ICU stay of this admission",
        5: "every ICU stay of this admission is rejected",
    }


def test_demographics_are_categories_at_hour_0_and_absent_where_empty(raw: Path) -> None:
    frame = read(raw).timelines.measurements.filter(pl.col("modality") == "demographics", pl.col("stay_id") == BENS)
    assert set(frame["hours_since_admission"]) == {0.0}
    assert dict(frame.select("feature", "value").iter_rows()) == {
        "age": 71.0, "gender=M": 1.0, "admission_type=EW EMER.": 1.0, "insurance=Other": 1.0, "language=?": 1.0,
        "race=UNKNOWN": 1.0,
    }  # fmt: skip
    assert read(raw).values(FIRST, "age") == [(0.0, 62.0)]


def test_chart_values_are_dated_converted_and_ranged(raw: Path) -> None:
    result = read(raw)
    assert result.values(FIRST, "heart_rate") == [(1.5, 88.0), (48.0, 71.0)]
    assert result.values(FIRST, "temperature") == [(2.0, pytest.approx(37.0))]
    assert result.values(FIRST, "fraction_inspired_oxygen") == [(2.0, pytest.approx(0.4)), (3.0, pytest.approx(0.5))]
    assert result.values(FIRST, "height") == [(2.0, pytest.approx(177.8))]
    assert result.values(FIRST, "weight") == [(2.0, pytest.approx(90.718474))]
    assert result.reasons("chartevents") == {
        3: "repeats an earlier row",
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
    assert result.values(FIRST, "glasgow_coma_scale_eye_opening") == [(2.0, 3.0)]
    assert result.values(FIRST, "glasgow_coma_scale_motor_response") == [(2.0, 6.0), (3.0, 4.0)]
    assert result.values(FIRST, "glasgow_coma_scale_total") == [(2.0, 3.0 + 4.0 + 6.0)]
    assert result.values(FIRST, "capillary_refill_rate") == [(3.0, 1.0)]


def test_laboratory_results_find_their_stay_by_admission_or_else_by_patient(raw: Path) -> None:
    result = read(raw)
    assert result.values(FIRST, "creatinine") == [(4.0, 1.5)]
    assert result.values(SECOND, "creatinine") == [(1.0, 1.7)]
    assert result.reasons("labevents") == {  # the second row takes two lines
        5: "after the patient left the unit",
        6: "no ICU stay of this admission",
        7: "no numeric value",
        8: "no ICU stay of this admission",
    }


def test_equal_amounts_of_urine_both_count_and_extra_columns_survive_in_rejected_rows(raw: Path) -> None:
    result = read(raw)
    assert result.values(FIRST, "urine_output") == [(2.0, 100.0), (2.0, 100.0)]
    rejected = pl.read_parquet(result.folder / "outputevents.parquet")
    assert rejected["kept"].to_list() == ["no"]


def test_notes_are_cleaned_and_kept_within_their_stay(raw: Path) -> None:
    result = read(raw)
    documents = result.timelines.documents.select("stay_id", "hours_since_admission", "modality", "text").rows()
    assert documents == [
        (FIRST, 6.0, "radiology_note", "examination: chest. the heart is large, not small."),
        (SECOND, 2.0, "radiology_note", "no admission named"),
    ]
    assert set(result.reasons("radiology").values()) == {
        "after the patient left the unit",
        "nothing left after cleaning",
    }
    assert set(result.reasons("discharge").values()) == {AFTER_OUTCOME}
    assert "discharge_note" not in held(result.timelines)
    assert not any("discharge summaries" in leak for leak in result.timelines.open_leaks)


def test_discharge_summaries_are_opted_into_and_reported_as_a_leak(raw: Path) -> None:
    result = read(raw, paper_faithful=True)
    notes = result.timelines.documents.filter(pl.col("modality") == "discharge_note")
    assert notes.select("stay_id", "hours_since_admission", "text").rows() == [(BENS, 24.0, "disposition: expired")]
    assert set(result.reasons("discharge").values()) == {"after the patient left the unit"}
    assert any("discharge summaries" in leak for leak in result.timelines.open_leaks)


def test_lines_of_rejected_notes_are_lines_of_the_file(raw: Path) -> None:
    result = read(raw)
    lines = (raw / "note/radiology.csv").read_text(encoding="utf-8").split("\n")
    rejected = pl.read_parquet(result.folder / "radiology.parquet")
    assert rejected["note_id"].to_list() == ["b", "d"]
    for line, note in rejected.select("line", "note_id").iter_rows():
        assert lines[line - 1].startswith(f"{note},")


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


def test_x_rays_are_ap_views_cropped_in_the_middle(raw: Path) -> None:
    result = read(raw, image_pixels=32)
    images = result.timelines.images
    assert images.select("stay_id", "hours_since_admission").rows() == [(FIRST, pytest.approx(3.5))]
    picture = Image.open(io.BytesIO(images["image"][0]))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (32, 32))
    assert np.asarray(picture)[:, 2:-2].min() > 180  # the black sides are cut off, not squeezed in
    assert result.reasons("mimic-cxr-2.0.0-metadata") == {
        3: "not an antero-posterior (AP) view",
        4: "image cannot be read",
        5: "image file is missing",
        6: "after the patient left the unit",
    }
    assert [path for path in result.timelines.inputs if path.endswith(".jpg")] == [
        str(raw / f"cxr/files/p10/p{ANNA}/s1/{name}.jpg") for name in ("wide", "torn")
    ]


@pytest.mark.parametrize("size", [(40, 40), (41, 97), (300, 20), (7, 9)])
def test_a_picture_of_any_shape_becomes_a_square(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (90, 90, 90)).save(tmp_path / "x.jpg")
    stored = small_picture(tmp_path / "x.jpg", 24)
    assert stored is not None
    pixels = np.asarray(Image.open(io.BytesIO(stored)))
    assert pixels.shape == (24, 24)
    assert abs(int(pixels.mean()) - 90) <= 2


def test_the_layout_of_1_0_and_compressed_tables_read_the_same(raw: Path) -> None:
    before = read(raw)
    (raw / "core").mkdir()
    (raw / "hosp/patients.csv").rename(raw / "core/patients.csv")
    text = (raw / "hosp/admissions.csv").read_text().replace(",race,", ",ethnicity,").replace("\n", "\r\n")
    (raw / "hosp/admissions.csv").unlink()
    (raw / "core/admissions.csv").write_bytes(("\ufeff" + text).encode())
    for path in [*raw.glob("icu/*.csv"), *raw.glob("note/*.csv")]:
        with gzip.open(f"{path}.gz", "wb") as packed:
            packed.write(path.read_bytes())
        path.unlink()
    after = read(raw, raw.parent / "rejected_after")
    assert after.account == before.account
    for name in ("stays", "measurements", "documents", "images", "features", "modalities"):
        one, other = getattr(before.timelines, name), getattr(after.timelines, name)
        assert one.equals(other) if isinstance(one, pl.DataFrame) else one == other


def test_absent_tables_are_absent_modalities(raw: Path) -> None:
    for place in ("note/radiology", "note/discharge", "cxr/mimic-cxr-2.0.0-metadata", "hosp/labevents"):
        (raw / f"{place}.csv").unlink()
    timelines = read(raw).timelines
    assert held(timelines) == {"demographics", "series"}
    assert "without any event: radiology_note, chest_xray, discharge_note" in timelines.notes
    for place in ("note/radiology", "note/discharge", "cxr/mimic-cxr-2.0.0-metadata", "hosp/labevents"):
        assert any(note.startswith(f"{place} is absent") for note in timelines.notes)


def test_tables_of_no_rows_are_read(raw: Path) -> None:
    for place in ("note/radiology", "cxr/mimic-cxr-2.0.0-metadata", "hosp/labevents", "icu/outputevents"):
        path = raw / f"{place}.csv"
        path.write_text(path.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    result = read(raw)
    assert held(result.timelines) == {"demographics", "series"}
    assert result.account["labevents"] == {"read": 0, "kept": 0, "rejected": 0, "reasons": {}}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("10000001,20000001,30000002", "10000001,20000001,30000001", "repeats an earlier stay_id"),  # on line 3
        ("10000001,20000001,30000001", "10000009,20000001,30000001", "patient is not in patients"),
        ("10000001,20000001,30000001", "10000002,20000001,30000001", "admission is not in admissions"),
        ("2150-01-01 06:00:00,2150-01-05", ",2150-01-05", "no intime"),
        ("2150-01-01 06:00:00,2150-01-05", "2150-01-05 06:00:00,2150-01-05", "left the unit before entering it"),
    ],
)
def test_a_stay_that_makes_no_sense_is_rejected_and_told(raw: Path, old: str, new: str, reason: str) -> None:
    spoil(raw, "icu/icustays", old, new)
    result = read(raw)
    assert result.reasons("icustays") == {3: reason, 5: "younger than 18 years"}
    assert result.timelines.stays.height == 2


def test_a_stay_without_outtime_has_no_length_and_runs_to_discharge(raw: Path) -> None:
    spoil(raw, "icu/icustays", "2150-01-11 12:00:00", "")
    spoil(raw, "hosp/labevents", "2,10000001,,1,50912,2150-01-10", "2,10000001,,1,50912,2150-01-19")
    result = read(raw, window_hours=None)
    row = result.timelines.stays.row(by_predicate=pl.col("stay_id") == SECOND, named=True)
    assert row["hours_in_unit"] is None
    assert row[LENGTH_OF_STAY] is None
    assert result.values(SECOND, "creatinine") == [(217.0, 1.7)]
    assert any("no outtime" in note for note in result.timelines.notes)


def spoil(raw: Path, place: str, old: str, new: str) -> Path:
    path = raw / f"{place}.csv"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    return path


FAULTS = [
    ("icu/icustays", ",intime,", ",admitted,", 1, "intime"),
    ("hosp/admissions", ",race,", ",people,", 1, "race"),
    ("hosp/admissions", ",WHITE,0\n10000002", ",WHITE,2\n10000002", 3, "hospital_expire_flag"),
    ("hosp/patients", "subject_id,gender,", "gender,gender,", 1, "gender"),
    ("icu/chartevents", "226531,200,200,,0", "226531,200,200,,0,7", 12, None),
    ("icu/chartevents", "226531,200,200,,0", "226531,200,200", 12, None),
    ("icu/chartevents", "226531,200,200,,0", "226531,200,2oo,,0", 12, "valuenum"),
    ("icu/chartevents", "226531,200,200,,0", "226531,200,nan,,0", 12, "valuenum"),
    ("icu/chartevents", "226531,200,200,,0", "226531.5,200,200,,0", 12, "itemid"),
    ("icu/chartevents", "2150-01-01 05:59:00", "2150-13-01 05:59:00", 4, "charttime"),
    ("icu/chartevents", "°F", "\udcb0F", 7, "valueuom"),
    ("hosp/labevents", "3,10000001,20000001", "\n3,10000001,20000001", 5, None),
    ("hosp/labevents", "4,10000001,20000009,", "4,10000001,somewhere,", 6, "hadm_id"),
    ("hosp/labevents", "4,10000001,20000009,", "4,10000001,", 6, None),
    ("note/radiology", "2150-01-08 12:00:00", "2150-01-08", 5, "charttime"),
    ("cxr/mimic-cxr-2.0.0-metadata", "21500107,000000.000", "21500107,250000", 6, "StudyTime"),
    ("cxr/mimic-cxr-2.0.0-metadata", "21500107,", "215001,", 6, "StudyDate"),
    ("cxr/mimic-cxr-2.0.0-metadata", "gone,", "../../gone,", 5, "dicom_id"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "old", "new", "line", "column"), FAULTS)
def test_a_fault_of_the_table_is_named_by_file_line_and_column(
    raw: Path, place: str, old: str, new: str, line: int, column: str | None
) -> None:
    path = spoil(raw, place, old, new)
    with pytest.raises(UnexpectedInput) as caught:
        read(raw)
    assert (caught.value.file, caught.value.line) == (str(path), line)
    if column is not None:
        assert caught.value.column == column


def test_a_torn_archive_and_a_folder_that_is_no_release_are_refused(raw: Path) -> None:
    packed = gzip.compress((raw / "icu/chartevents.csv").read_bytes())
    (raw / "icu/chartevents.csv.gz").write_bytes(packed[:-40])
    with pytest.raises(TrajlmError, match="both exist"):
        read(raw)
    (raw / "icu/chartevents.csv").unlink()
    with pytest.raises(UnexpectedInput, match=r"chartevents\.csv\.gz"):
        read(raw)
    with pytest.raises(TrajlmError, match=r"patients\.csv"):
        read(raw / "note")
    with pytest.raises(TrajlmError, match="folder"):
        read(raw / "nowhere")


moments = st.integers(0, 40).map(lambda hours: datetime(2150, 1, 1) + timedelta(hours=hours))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.sampled_from([10, 11, None]), moments), max_size=6),
    st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([10, 11, 12, None]), moments), max_size=10),
)
def test_linking_by_time_equals_a_plain_loop(stays: list[tuple], dated: list[tuple]) -> None:
    windows = [(i, *stay, None, None, None, True) for i, stay in enumerate(stays)]
    when = pl.Datetime("us")
    types = [pl.Int64, pl.Int64, pl.Int64, when, when, when, when, pl.Boolean]
    frame = pl.DataFrame(windows, schema=dict(zip(STAY_WINDOW, types, strict=True)), orient="row")
    schema = {"line": pl.Int64, "subject_id": pl.Int64, "hadm_id": pl.Int64, "time": when}
    rows = pl.DataFrame([(i, *row) for i, row in enumerate(dated)], schema=schema, orient="row")
    linked = link_by_time(rows, frame, "time")
    assert linked["line"].to_list() == list(range(len(dated)))
    for (subject, hadm, time), came in zip(dated, linked["stay_id"].to_list(), strict=True):
        mine = [
            (intime, number)
            for number, (of_subject, of_hadm, intime) in enumerate(stays)
            if (of_subject == subject if hadm is None else of_hadm == hadm)
        ]
        begun = [stay for stay in mine if stay[0] <= time]
        expected = max(begun) if begun else min(mine, default=(None, None))
        assert came == expected[1]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "raw"
    synthesize(folder, 40, 3)
    return folder


def test_the_synthetic_release_holds_every_modality_within_each_stay(synthetic: Path) -> None:
    result = read(synthetic, window_hours=24.0)
    timelines = result.timelines
    assert held(timelines) == {"demographics", "series", "radiology_note", "chest_xray"}
    assert timelines.stays.height == 40
    at = ["stay_id", "hours_since_admission"]
    events = pl.concat([timelines.measurements.select(at), timelines.documents.select(at), timelines.images.select(at)])
    events = events.join(timelines.stays, on="stay_id", how="left", validate="m:1")
    latest = pl.min_horizontal(pl.lit(24.0), pl.col("hours_in_unit"))
    assert events.filter(~pl.col("hours_since_admission").is_between(0, latest + 1e-9)).is_empty()
    assert set(timelines.measurements["feature"]) <= {feature.name for feature in timelines.features}
    for table, path in [(Path(p).name.split(".csv")[0], p) for p in timelines.inputs if ".csv" in p]:
        assert duckdb.sql(f"select count(*) from read_csv('{path}', all_varchar=true)").fetchall() == [
            (result.account[table]["read"],)
        ]


def test_a_shorter_window_keeps_a_prefix(synthetic: Path, tmp_path: Path) -> None:
    whole = read(synthetic, tmp_path / "whole", window_hours=None).timelines
    short = read(synthetic, tmp_path / "short", window_hours=6.0).timelines
    early = pl.col("hours_since_admission") <= 6.0
    assert short.measurements.equals(whole.measurements.filter(early))
    assert short.documents.equals(whole.documents.filter(early))
    assert short.images.equals(whole.images.filter(early))
    assert short.measurements.height < whole.measurements.height


def test_ranges_and_items_are_those_of_the_public_benchmark() -> None:
    if not (SHARED / "phenotypes").is_dir():
        pytest.skip("the public item map is not at ../shared/data")
    ranges = {}
    for row in csv.DictReader((SHARED / "phenotypes/variable_ranges.csv").open()):
        if row["OUTLIER LOW"]:
            name = row["LEVEL2"].lower().replace("glascow", "glasgow").replace(" ", "_")
            ranges[name] = (float(row["OUTLIER LOW"]), float(row["OUTLIER HIGH"]))
    stricter = {"height", "weight"}
    for name, low, high in ITEMS.select("variable", "low", "high").unique().iter_rows():
        if name in ranges:
            assert high == ranges[name][1]
            assert low == ranges[name][0] or (name in stricter and low > 0)
    ready = {}
    for row in csv.DictReader((SHARED / "phenotypes/itemid_to_variable_map.csv").open()):
        if row["STATUS"].strip() == "ready" and int(row["ITEMID"]) >= 220000:
            ready[int(row["ITEMID"])] = row["LEVEL2"].lower().replace("glascow", "glasgow").replace(" ", "_")
    ours = dict(ITEMS.select("itemid", "variable").iter_rows())
    assert len(ready) > 30
    assert {item: ours.get(item) for item in ready} == ready


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return read(DEMO, tmp_path_factory.mktemp("demo"))


# The stays as SQL sees them; all patients of the demo are adults.
STAYS_SQL = f"""
    select i.subject_id, i.hadm_id, stay_id, intime, outtime, hospital_expire_flag,
        least(intime + interval 48 hour, outtime, coalesce(deathtime, outtime)) as until,
        anchor_age + year(admittime) - anchor_year as age
    from '{DEMO}/icu/icustays.csv.gz' i
    join '{DEMO}/hosp/admissions.csv.gz' a on a.hadm_id = i.hadm_id
    join '{DEMO}/hosp/patients.csv.gz' p on p.subject_id = i.subject_id
"""


def sql(query: str) -> list[tuple]:
    return duckdb.sql(f"with stays as ({STAYS_SQL}) {query}").fetchall()


@needs_demo
def test_demo_stays_equal_sql(demo: Result) -> None:
    expected = sql("select stay_id, hospital_expire_flag, epoch(outtime - intime) / 3600, age from stays order by 1")
    age = demo.timelines.measurements.filter(pl.col("feature") == "age").select("stay_id", age="value")
    came = demo.timelines.stays.join(age, on="stay_id").sort("stay_id")
    assert came.select("stay_id", MORTALITY, LENGTH_OF_STAY, "age").rows() == [
        (stay, died, pytest.approx(hours), years) for stay, died, hours, years in expected
    ]
    assert sum(died for _, died, _, _ in expected) > 0


@needs_demo
@pytest.mark.parametrize(
    ("table", "place"),
    [("patients", "hosp"), ("admissions", "hosp"), ("icustays", "icu"), ("chartevents", "icu"), ("labevents", "hosp"),
     ("outputevents", "icu")],
)  # fmt: skip
def test_demo_rows_read_equal_sql(demo: Result, table: str, place: str) -> None:
    account = demo.account[table]
    assert sql(f"select count(*) from read_csv('{DEMO}/{place}/{table}.csv.gz', all_varchar=true)") == [
        (account["read"],)
    ]
    assert account["kept"] + account["rejected"] == account["read"]
    assert account["kept"] > 0


@needs_demo
def test_demo_reasons_equal_sql(demo: Result) -> None:
    items = ",".join(str(item) for item in ITEMS.filter(pl.col("table") == "chartevents")["itemid"])
    chart = f"'{DEMO}/icu/chartevents.csv.gz' c left join stays s on s.stay_id = c.stay_id"
    counts = {
        "not an item of the series": f"itemid not in ({items})",
        "before admission to the unit": f"itemid in ({items}) and charttime < intime",
        "no numeric value": f"itemid in ({items}) and charttime between intime and until and valuenum is null",
    }
    for reason, condition in counts.items():
        assert sql(f"select count(*) from {chart} where {condition}") == [
            (demo.account["chartevents"]["reasons"][reason],)
        ]
    (unlinked,) = sql(f"""
        select count(*) from '{DEMO}/hosp/labevents.csv.gz' l
        where itemid in ({",".join(str(item) for item in ITEMS.filter(pl.col("table") == "labevents")["itemid"])})
        and case when hadm_id is null then subject_id not in (select subject_id from stays)
            else hadm_id not in (select hadm_id from stays) end""")
    assert unlinked == (demo.account["labevents"]["reasons"]["no ICU stay of this admission"],)
    assert unlinked[0] > 1000


def measured(demo: Result, feature: str) -> list[tuple]:
    frame = demo.timelines.measurements.filter(pl.col("feature") == feature)
    return sorted(
        frame.select("stay_id", pl.col("hours_since_admission").round(6), pl.col("value").round(6)).iter_rows()
    )


@needs_demo
@pytest.mark.parametrize(
    ("feature", "items", "value", "low", "high"),
    [
        ("heart_rate", "220045", "valuenum", 0, 390),
        (
            "temperature",
            "223761, 223762",
            "case itemid when 223761 then (valuenum - 32) * 5 / 9 else valuenum end",
            14.2,
            47,
        ),
    ],
)
def test_demo_chart_values_equal_sql(
    demo: Result, feature: str, items: str, value: str, low: float, high: float
) -> None:
    expected = sql(f"""
        select distinct stay_id, round(epoch(charttime - intime) / 3600, 6), round({value}, 6), itemid
        from '{DEMO}/icu/chartevents.csv.gz' c join stays using (stay_id)
        where itemid in ({items}) and charttime between intime and until and {value} between {low} and {high}""")
    assert len(expected) > 1000
    ordered = sorted((stay, hour, number) for stay, hour, number, _ in expected)
    assert np.allclose(measured(demo, feature), ordered, rtol=0, atol=2e-6)


@needs_demo
def test_demo_laboratory_values_equal_sql(demo: Result) -> None:
    expected = sql(f"""
        select distinct s.stay_id, round(epoch(charttime - intime) / 3600, 6), round(valuenum, 6), itemid
        from '{DEMO}/hosp/labevents.csv.gz' l join stays s
            on s.subject_id = l.subject_id and coalesce(l.hadm_id, s.hadm_id) = s.hadm_id
        where itemid in (50912, 52024, 52546) and charttime between intime and until and valuenum between 0 and 66""")
    assert len(expected) > 300
    assert measured(demo, "creatinine") == sorted((stay, hour, number) for stay, hour, number, _ in expected)


@needs_demo
def test_demo_rejected_rows_are_the_lines_of_the_file(demo: Result) -> None:
    with gzip.open(DEMO / "hosp/labevents.csv.gz", "rt", encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines)
        header = next(reader)
        raw, start = {}, reader.line_num + 1
        for cells in reader:
            raw[start] = cells
            start = reader.line_num + 1
    rejected = pl.read_parquet(demo.folder / "labevents.parquet")
    assert rejected.height + demo.account["labevents"]["kept"] == len(raw)
    for line, *cells in rejected.select("line", *header).sample(500, seed=1).iter_rows():
        assert cells == raw[line]
