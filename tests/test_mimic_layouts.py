"""MIMIC-IV as it lies on disk: versions, formats, folders nested and apart, tables that are absent, torn or dirty."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import duckdb
import polars as pl
import pytest
from cohort_example import Read
from hypothesis import given, settings
from hypothesis import strategies as st
from mimic_example import FIRST, SECOND, held, read, reasons, spoil, values, write_release

from trajlm.errors import TrajlmError, UnexpectedInput
from trajlm.schema import LENGTH_OF_STAY

FRAMES = ("stays", "measurements", "documents", "images")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_release(tmp_path / "raw")


def assert_same(one: Read, other: Read) -> None:
    assert one.account == other.account
    for name in FRAMES:
        assert getattr(one, name).equals(getattr(other, name))
    assert one.raw.features == other.raw.features
    assert one.raw.attrition == other.raw.attrition
    assert one.raw.open_leaks == other.raw.open_leaks


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
    after = read(raw, raw.parent / "after")
    assert_same(before, after)
    assert after.raw.release == "MIMIC-IV (layout of 1.0)"


@pytest.mark.parametrize("kind", ["text", "typed", "integers with gaps as floats"])
def test_parquet_tables_read_the_same(raw: Path, kind: str) -> None:
    spoil(raw, "icu/chartevents", "07:30:00,,", "07:30:00,2150-01-01 08:10:00,")
    before = read(raw)
    for path in [*raw.glob("*/*.csv")]:
        source = f"read_csv('{path}', all_varchar={kind == 'text'})"
        floats = "* replace (hadm_id::double as hadm_id)" if "floats" in kind and "labevents" in path.name else "*"
        duckdb.sql(f"copy (select {floats} from {source}) to '{path.with_suffix('.parquet')}'")
        path.unlink()
    after = read(raw, raw.parent / "after")
    for name in FRAMES:
        assert getattr(before, name).equals(getattr(after, name))
    for table, account in before.account.items():
        assert {k: v for k, v in after.account[table].items() if k != "stored"} == {
            k: v for k, v in account.items() if k != "stored"
        }


def nested(raw: Path) -> Path:
    """The three projects as PhysioNet's own downloads leave them."""
    top = raw.parent / "download"
    for what, place in (("note", "mimic-iv-note/2.2/note"), ("cxr", "mimic-cxr-jpg/2.1.0")):
        (top / "physionet.org/files" / place).parent.mkdir(parents=True)
        (raw / what).rename(top / "physionet.org/files" / place)
    (top / "physionet.org/files/mimiciv").mkdir()
    raw.rename(top / "physionet.org/files/mimiciv/3.1")
    return top


def test_nested_downloads_are_found_and_told(raw: Path) -> None:
    before = read(raw)
    top = nested(raw)
    after = read(top, raw.parent / "after")
    for name in FRAMES:
        assert getattr(before, name).equals(getattr(after, name))
    assert after.raw.release == "MIMIC-IV 3.1"
    assert "the release was found in physionet.org/files/mimiciv/3.1" in after.raw.notes


def test_notes_and_pictures_that_lie_apart_are_named_by_the_settings(raw: Path) -> None:
    before = read(raw)
    files = nested(raw) / "physionet.org/files"
    alone = read(files / "mimiciv/3.1", raw.parent / "alone")
    assert held(alone) == {"demographics", "series"}
    for notes, images in (("mimic-iv-note/2.2/note", "mimic-cxr-jpg/2.1.0"), ("mimic-iv-note", "mimic-cxr-jpg")):
        folders = {"notes_folder": str(files / notes), "images_folder": str(files / images)}
        after = read(files / "mimiciv/3.1", raw.parent / notes.replace("/", "-"), **folders)
        for name in FRAMES:
            assert getattr(before, name).equals(getattr(after, name))


def test_folders_that_hold_nothing_or_too_much_are_refused(raw: Path) -> None:
    with pytest.raises(TrajlmError, match=r"prepare\.notes_folder .*icu: expected a folder with discharge\.csv"):
        read(raw, notes_folder=str(raw / "icu"))
    with pytest.raises(TrajlmError, match=r"prepare\.images_folder .*nowhere: .* came no folder"):
        read(raw, images_folder=str(raw / "nowhere"))
    with pytest.raises(TrajlmError, match=r"name the folder above it, .*raw"):
        read(raw / "icu")
    with pytest.raises(TrajlmError, match="came a file"):
        read(raw / "icu/icustays.csv")
    with pytest.raises(TrajlmError, match="came no folder"):
        read(raw / "nowhere")
    top = raw.parent / "both"
    for version in ("2.2", "3.1"):
        shutil.copytree(raw, top / version)
    with pytest.raises(TrajlmError, match=r"holds 2 releases of MIMIC-IV: .*2\.2, .*3\.1; name the one to read"):
        read(top)
    shutil.rmtree(top / "2.2/cxr")
    (raw / "cxr/mimic-cxr-2.0.0-metadata.csv").rename(raw / "cxr/mimic-cxr-2.1.0-metadata.csv")
    assert read(raw).images.height == 1
    (raw / "cxr/mimic-cxr-2.0.0-metadata.csv").write_text("dicom_id\n")
    with pytest.raises(TrajlmError, match="keep the one that is to be read"):
        read(raw)


def test_absent_tables_are_absent_modalities(raw: Path) -> None:
    for place in ("note/radiology", "note/discharge", "cxr/mimic-cxr-2.0.0-metadata", "hosp/labevents"):
        (raw / f"{place}.csv").unlink()
    result = read(raw)
    assert held(result) == {"demographics", "series"}
    notes = result.raw.notes
    assert "without any event: radiology_note, chest_xray, discharge_note" in notes
    for absent in ("MIMIC-IV-Note", "MIMIC-CXR-JPG", "hosp/labevents"):
        assert any(note.startswith(f"{absent} is absent") for note in notes)
    shutil.rmtree(raw / "note")
    (raw / "note").mkdir()
    (raw / "note/discharge.csv").write_text("subject_id,hadm_id,charttime,text\n")
    assert any(note.startswith("radiology of MIMIC-IV-Note is absent") for note in read(raw).raw.notes)


def test_tables_of_no_rows_are_read(raw: Path) -> None:
    for place in ("note/radiology", "cxr/mimic-cxr-2.0.0-metadata", "hosp/labevents", "icu/outputevents"):
        path = raw / f"{place}.csv"
        path.write_text(path.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    result = read(raw)
    assert held(result) == {"demographics", "series"}
    assert result.account["labevents"] == {"read": 0, "kept": 0, "rejected": 0, "stored": 0, "reasons": {}}


DISCHARGED = "2150-01-01 00:00:00,2150-01-20 00:00:00"


@pytest.mark.parametrize(
    ("place", "old", "new", "reason"),
    [
        # on line 3 of icustays stands Anna's first stay
        ("icu/icustays", "10000001,20000001,30000002", "10000001,20000001,30000001", "repeats an earlier stay_id"),
        ("icu/icustays", "10000001,20000001,30000001", "10000001,20000001,", "names no stay_id"),
        ("icu/icustays", "10000001,20000001,30000001", "10000009,20000001,30000001", "patient is not in patients"),
        ("icu/icustays", "10000001,20000001,30000001", "10000002,20000001,30000001", "admission is not in admissions"),
        ("icu/icustays", "2150-01-01 06:00:00,2150-01-05", ",2150-01-05", "no intime"),
        ("icu/icustays", "2150-01-01 06:00:00,2150-01-05", "2150-01-05 06:00:00,2150-01-05",
         "left the unit before entering it"),
        ("icu/icustays", "2150-01-01 06:00:00,2150-01-05", "2150-01-20 00:00:00,2150-01-25",
         "entered the unit after discharge from hospital"),
    ],
)  # fmt: skip
def test_a_stay_that_makes_no_sense_is_rejected_and_told(
    raw: Path, place: str, old: str, new: str, reason: str
) -> None:
    spoil(raw, place, old, new)
    result = read(raw)
    assert reasons(result, "icustays") == {3: reason, 5: "younger than 18 years"}
    assert result.stays.height == 2
    steps = {step.rule: step.stays for step in result.raw.attrition}
    before = list(steps).index(reason) - 1
    assert list(steps.values())[before] - steps[reason] == 1


def test_a_discharge_before_admission_rejects_the_stays_of_that_admission(raw: Path) -> None:
    spoil(raw, "hosp/admissions", DISCHARGED, "2150-01-01 00:00:00,2149-12-20 00:00:00")
    result = read(raw)
    why = "discharged from hospital before admission to it"
    assert reasons(result, "icustays") == {2: why, 3: why, 5: "younger than 18 years"}
    assert reasons(result, "admissions")[2] == "every ICU stay of this admission is rejected"
    assert set(result.rejected("chartevents")["reason"]) >= {"its ICU stay is rejected"}


def test_a_death_before_the_stay_and_contradictions_of_the_flag_are_told(raw: Path) -> None:
    spoil(raw, "hosp/admissions", "2151-05-02 08:00:00,2151-05-02 08:00:00", "2151-05-02 08:00:00,2151-04-30 23:30:00")
    spoil(raw, "hosp/admissions", f"{DISCHARGED},", f"{DISCHARGED},2150-01-20 00:00:00")
    result = read(raw)
    assert reasons(result, "icustays")[4] == "died before entering the unit"
    assert "2 of 2 stays are flagged as survivors of the admission and have a time of death" in result.raw.notes


def test_repeated_keys_are_rejected_and_the_first_row_stands(raw: Path) -> None:
    for place, line in (("hosp/patients", 2), ("hosp/admissions", 3)):
        path = raw / f"{place}.csv"
        text = path.read_text().splitlines()
        path.write_text("\n".join([*text, text[line - 1].replace("10000001,F,60", "10000001,M,30")]) + "\n")
    result = read(raw)
    assert reasons(result, "patients")[6] == "repeats an earlier subject_id"
    assert reasons(result, "admissions")[6] == "repeats an earlier hadm_id"
    assert values(result, FIRST, "age") == [(0.0, 62.0)]


def test_a_stay_without_outtime_has_no_length_and_runs_to_discharge(raw: Path) -> None:
    spoil(raw, "icu/icustays", "2150-01-11 12:00:00", "")
    spoil(raw, "hosp/labevents", "2,10000001,,1,50912,2150-01-10", "2,10000001,,1,50912,2150-01-19")
    result = read(raw, window_hours=None)
    row = result.stays.row(by_predicate=pl.col("stay_id") == SECOND, named=True)
    assert row["hours_in_unit"] is None
    assert row[LENGTH_OF_STAY] is None
    assert values(result, SECOND, "creatinine") == [(217.0, 1.7)]
    assert any("no outtime" in note for note in result.raw.notes)


def test_a_note_of_2_mb_is_read_whole(raw: Path) -> None:
    text = " ".join(f"finding {n}" for n in range(150_000))
    assert len(text) > 2_000_000
    spoil(raw, "note/radiology", "no admission named", f'"{text}"')
    assert text in read(raw).documents["text"].to_list()


FAULTS = [
    ("icu/icustays", ",intime,", ",admitted,", 1, "intime"),
    ("hosp/admissions", ",race,", ",people,", 1, "race"),
    ("hosp/admissions", ",WHITE,0\n10000002", ",WHITE,2\n10000002", 3, "hospital_expire_flag"),
    ("hosp/patients", "subject_id,gender,", "gender,gender,", 1, "gender"),
    ("hosp/diagnoses_icd", "I10,10", "I10,ten", 5, "icd_version"),
    ("icu/chartevents", "226531,200,200,,0", "226531,200,200,,0,7", 12, None),
    ("icu/chartevents", "226531,200,200,,0", "226531,200,200", 12, None),
    ("icu/chartevents", "226531,200,200,,0", "226531,200,2oo,,0", 12, "valuenum"),
    ("icu/chartevents", "226531,200,200,,0", "226531,200,nan,,0", 12, "valuenum"),
    ("icu/chartevents", "226531,200,200,,0", "226531.5,200,200,,0", 12, "itemid"),
    ("icu/chartevents", "2150-01-01 05:59:00", "2150-13-01 05:59:00", 4, "charttime"),
    ("icu/chartevents", "05:59:00,,", "05:59:00,later,", 4, "storetime"),
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


def test_a_torn_archive_and_a_table_twice_are_refused(raw: Path) -> None:
    packed = gzip.compress((raw / "icu/chartevents.csv").read_bytes())
    (raw / "icu/chartevents.csv.gz").write_bytes(packed[:-40])
    with pytest.raises(TrajlmError, match="both exist"):
        read(raw)
    (raw / "icu/chartevents.csv").unlink()
    with pytest.raises(UnexpectedInput, match=r"chartevents\.csv\.gz"):
        read(raw)
    (raw / "icu/icustays.csv").unlink()
    with pytest.raises(TrajlmError, match=r"icu/icustays\.csv"):
        read(raw)


cells = st.one_of(
    st.sampled_from(["", "88", "-1", "9999", "nan", "x", "1e400", "°C", "bpm", "2150-01-01 08:00:00", "3000000"]),
    st.text("0123456789.-: ", max_size=8),
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stays alone."""
    folder = write_release(tmp_path_factory.mktemp("bare") / "raw")
    for place in ("note", "cxr", "hosp/labevents.csv", "icu/outputevents.csv", "hosp/diagnoses_icd.csv"):
        shutil.rmtree(folder / place) if (folder / place).is_dir() else (folder / place).unlink()
    return folder


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["30000001", "30000003", "39999999", ""]),
            st.sampled_from(["2150-01-01 08:00:00", "2150-01-09 08:00:00", "2151-05-01 01:00:00", ""]),
            st.sampled_from(["2150-01-01 09:00:00", "2149-01-01 09:00:00", ""]),
            st.sampled_from(["220045", "223761", "220739", "226531", "1", ""]),
            cells,
            st.sampled_from(["", "bpm", "°F", "F", "kg", "lbs", "furlongs"]),
        ),
        max_size=8,
    )
)
def test_any_chart_is_accounted_for_or_refused_in_one_line(bare: Path, lines: list[tuple]) -> None:
    header = "subject_id,hadm_id,stay_id,charttime,storetime,itemid,value,valuenum,valueuom\n"
    body = "".join(
        f"10000001,20000001,{s},{c},{t},{i},{n.replace(',', '')},{n.replace(',', '')},{u}\n"
        for s, c, t, i, n, u in lines
    )
    (bare / "icu/chartevents.csv").write_text(header + body, encoding="utf-8")
    folder = bare / "read"
    shutil.rmtree(folder, ignore_errors=True)
    refused = None
    try:
        result = read(bare, folder)
    except UnexpectedInput as error:
        refused = error
    if refused is not None:
        assert refused.file.endswith("chartevents.csv")
        assert refused.line is not None
        assert "\n" not in str(refused)
        return
    account = result.account["chartevents"]
    assert account["read"] == len(lines) == account["kept"] + account["rejected"]
    assert len(reasons(result, "chartevents")) == account["rejected"]
    series = result.measurements.filter(pl.col("modality") == "series")
    assert series["hours_since_admission"].is_between(0, 48).all()
    assert series["value"].is_finite().all()
