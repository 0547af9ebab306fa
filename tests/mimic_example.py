"""A release of MIMIC-IV written by hand: four patients, five stays' worth of faults, notes and X-rays."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import polars as pl
from cohort_example import Read, read_cohort
from PIL import Image

from trajlm.cohorts import mimic
from trajlm.config import PrepareConfig

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
D_ITEMS = """itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,highnormalvalue
220045,Heart Rate,HR,chartevents,Routine Vital Signs,bpm,Numeric,,
228096,Richmond-RAS Scale,RAS,chartevents,Pain/Sedation,None,Text,,
224695,Peak Insp. Pressure,PIP,chartevents,Respiratory,cmH2O,Numeric,,
226588,Chest Tube #1,CT,outputevents,Drains,mL,Numeric,,
221906,Norepinephrine,Levo,inputevents,Medications,mg,Solution,,
"""
D_LABITEMS = """itemid,label,fluid,category
50912,Creatinine,Blood,Chemistry
51249,MCHC,Blood,Hematology
51250,MCHC,Blood,Hematology
"""
DIAGNOSES = """subject_id,hadm_id,seq_num,icd_code,icd_version
10000001,20000001,1,486    ,9
10000001,20000001,2,428.0,9
10000001,20000009,1,5849,9
10000002,20000002,1,I10,10
10000002,20000002,2,J9601,10
10000002,20000002,3,,10
10000002,20000002,4,4019,8
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


def write_release(folder: Path) -> Path:
    """Write all of it under ``folder``."""
    tables = {
        "hosp/patients": PATIENTS, "hosp/admissions": ADMISSIONS, "icu/icustays": ICUSTAYS,
        "icu/chartevents": CHARTEVENTS, "hosp/labevents": LABEVENTS, "icu/outputevents": OUTPUTEVENTS,
        "icu/d_items": D_ITEMS, "hosp/d_labitems": D_LABITEMS, "hosp/diagnoses_icd": DIAGNOSES,
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


def read(raw: Path, folder: Path | None = None, **options: object) -> Read:
    """Read a release in the layout of MIMIC-IV; ``folder`` takes what is spooled and rejected."""
    folder = folder or raw.parent / "read"
    return read_cohort(mimic, raw, PrepareConfig(cohort="mimic", **options), folder)  # type: ignore[arg-type]


def reasons(result: Read, table: str) -> dict[int, str]:
    """Line to reason of the rejected rows of a table."""
    rejected = result.rejected(table)
    return dict(rejected.select("line", "reason").iter_rows()) if rejected.height else {}


def values(result: Read, stay: int, feature: str) -> list[tuple[float, float]]:
    """Hours and values of a feature of a stay in the order of measuring."""
    mine = result.measurements.filter(pl.col("stay_id") == stay, pl.col("feature") == feature)
    mine = mine.sort("measured", maintain_order=True)
    return list(mine.select("hours_since_admission", "value").iter_rows())


def held(result: Read) -> set[str]:
    """Modalities that some event has; the release's list is the same whatever a site holds."""
    assert [modality.name for modality in result.raw.modalities] == [
        "demographics", "series", "radiology_note", "chest_xray", "discharge_note",
    ]  # fmt: skip
    frames = (result.measurements, result.documents, result.images)
    return set(pl.concat([frame["modality"] for frame in frames]))


def spoil(raw: Path, place: str, old: str, new: str) -> Path:
    """Replace the first occurrence of a text in a table."""
    path = raw / f"{place}.csv"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    return path
