from __future__ import annotations

import csv
import gzip
import io
import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from cohort_example import Read, read_cohort
from hypothesis import given, settings
from hypothesis import strategies as st
from physionet2012_example import (
    OUTCOMES_HEADER,
    REAL,
    needs_real,
    outcome,
    real_lines,
    record,
    write_release,
)

from trajlm.cohorts import physionet2012
from trajlm.cohorts.physionet2012 import DEFAULT_BIN_HOURS
from trajlm.cohorts.physionet2012_variables import BY_CUFF, CODES, FEATURES, MODALITIES, VARIABLES
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError, UnexpectedInput
from trajlm.schema import MEASUREMENT_COLUMNS

COHORT = "physionet2012"


def run(raw: Path, folder: Path | None = None, **options) -> tuple[Read, dict]:
    with tempfile.TemporaryDirectory() as spare:
        found = read_cohort(physionet2012, raw, PrepareConfig(cohort=COHORT, **options), folder or Path(spare))
        return found, found.account


def rows_of(timelines: Read) -> list[tuple]:
    return sorted(timelines.measurements.select(list(MEASUREMENT_COLUMNS)).iter_rows())


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Read, dict, pl.DataFrame]:
    timelines, account = run(REAL, tmp_path_factory.mktemp("read"))
    return timelines, account, timelines.rejected("set-a")


@pytest.fixture(scope="module")
def lines() -> list[tuple[int, int, str, str, str]]:
    return list(real_lines())


def expected_measurements(lines, keep) -> dict[tuple, float]:
    """What a plain loop makes of the rows of the stays that ``keep`` accepts: the last possible value of a minute.

    Urine is kept in full, as the total of the minute; a pressure by cuff is the pressure, unless the line told it too.
    """
    modality_of = {name: m for m, group in VARIABLES.items() if m != "demographics" for name in group}
    found: dict[tuple, float] = {}
    for stay_id, _, time, name, text in lines:
        if not keep(stay_id) or name == "RecordID":
            continue
        minute, value = int(time[:2]) * 60 + int(time[3:]), float(text)
        modality = "demographics" if minute == 0 and name in VARIABLES["demographics"] else modality_of[name]
        if modality == "demographics" and value == -1:
            continue
        if name in CODES:
            found[stay_id, minute, modality, f"{name}={CODES[name][int(value)]}"] = 1.0
            continue
        _, low, high = VARIABLES[modality][name]
        if low <= value <= high:
            key = (stay_id, minute, modality, name)
            found[key] = found.get(key, 0.0) + value if name == "Urine" else value
    by_cuff = {key: found.pop(key) for key in list(found) if key[3] in BY_CUFF}
    return {(*key[:3], BY_CUFF[key[3]]): value for key, value in by_cuff.items()} | found


@needs_real
def test_every_measurement_of_every_tenth_stay_is_what_a_plain_loop_finds(real, lines):
    timelines, _, _ = real
    wanted = expected_measurements(lines, lambda stay_id: stay_id % 10 == 0)
    mine = timelines.measurements.filter(pl.col("stay_id") % 10 == 0)
    found: dict[tuple, float] = {}
    for s, h, m, f, v, *_ in mine.iter_rows():
        key = (s, round(h * 60), m, f)
        assert f == "Urine" or key not in found
        found[key] = found.get(key, 0.0) + v
    assert mine.height > 100_000
    assert found == pytest.approx(wanted)


@needs_real
def test_rows_are_accounted_for_and_rejections_match_a_count_over_the_lines(real, lines):
    timelines, account, rejected = real
    table = account["set-a"]
    assert table["read"] == len(lines)
    stays = {stay_id for stay_id, *_ in lines}
    assert table["kept"] == timelines.measurements.height + len(stays)
    assert table["kept"] + rejected.height == len(lines)
    descriptors = set(VARIABLES["demographics"])
    missing = sum(t == "00:00" and p in descriptors and float(v) == -1 for _, _, t, p, v in lines)
    assert table["reasons"]["descriptor missing (-1)"] == missing > 2000
    impossible: Counter[str] = Counter()
    for _, _, time, name, text in lines:
        for modality, group in VARIABLES.items():
            if (
                name in group
                and name not in CODES
                and (modality == "demographics") == (time == "00:00" and name in descriptors)
            ):
                out = not group[name][1] <= float(text) <= group[name][2]
                impossible[name] += out and not (modality == "demographics" and float(text) == -1)
    reasons = {r.split()[2]: n for r, n in table["reasons"].items() if r.startswith("impossible")}
    assert reasons == {name: n for name, n in impossible.items() if n}


@needs_real
def test_a_rejected_row_is_found_again_at_its_file_and_line(real, lines):
    _, _, rejected = real
    at = {(f"set-a.tar.gz/set-a/{stay_id}.txt", line): fields for stay_id, line, *fields in lines}
    for row in rejected.iter_rows(named=True):
        assert at[row["file"], row["line"]] == [row["Time"], row["Parameter"], row["Value"]]


@needs_real
def test_the_known_slips_of_the_release_are_gone_and_hard_cases_are_not(real):
    found = real[0].measurements
    value = pl.col("value")

    def of(name: str) -> pl.DataFrame:
        return found.filter(pl.col("feature") == name)

    assert of("Temp").filter(value < 20).is_empty()
    assert of("pH").filter(value > 10).is_empty()
    assert of("SysABP").filter(value == 0).is_empty()
    assert of("Height").filter(value < 0).is_empty()
    assert of("RespRate").filter(value == 0).height == 59  # an apnoea is possible
    assert of("Temp").filter(value < 30).height >= 3  # so is deep hypothermia


@needs_real
def test_the_variables_are_those_of_the_release(lines):
    known = {name for group in VARIABLES.values() for name in group}
    assert {name for _, _, _, name, _ in lines} == known | {"RecordID"}


@needs_real
def test_stays_and_targets_are_the_outcomes_file(real, lines):
    timelines, account, _ = real
    with (REAL / "Outcomes-a.txt").open() as stream:
        wanted = {int(row["RecordID"]): row for row in csv.DictReader(stream)}
    stays = timelines.stays
    assert stays["stay_id"].to_list() == sorted(wanted) == sorted({stay_id for stay_id, *_ in lines})
    assert stays.height == 4000
    for row in stays.iter_rows(named=True):
        truth = wanted[row["stay_id"]]
        days = int(truth["Length_of_stay"])
        assert row["target_mortality"] == int(truth["In-hospital_death"])
        assert row["target_length_of_stay_hours"] == (None if days == -1 else days * 24)
    assert stays["target_mortality"].sum() == 554
    assert (stays["hours_in_unit"] == 48).all()
    assert account["Outcomes-a"] == {"read": 4000, "kept": 4000, "rejected": 0, "stored": 0, "reasons": {}}
    assert any("60 stays have no known length of stay" in note for note in timelines.raw.notes)


@needs_real
def test_stays_without_any_series_stay_in_the_cohort(real, lines):
    timelines, _, _ = real
    descriptors = set(VARIABLES["demographics"]) | {"RecordID"}
    series = {stay_id for stay_id, _, t, p, _ in lines if p not in descriptors or t != "00:00"}
    bare = {stay_id for stay_id, *_ in lines} - series
    assert len(bare) == 3
    assert bare <= set(timelines.stays["stay_id"])
    held = timelines.measurements.filter(pl.col("stay_id").is_in(bare))
    assert set(held["modality"]) == {"demographics"}
    assert any("3 stays hold nothing beyond descriptors" in note for note in timelines.raw.notes)


def test_features_and_modalities_are_in_the_documented_order():
    assert [m.name for m in MODALITIES] == ["demographics", "vitals", "laboratory", "blood_gas", "support"]
    assert [m.static for m in MODALITIES] == [True, False, False, False, False]
    assert len({(f.modality, f.name) for f in FEATURES}) == len(FEATURES)
    assert DEFAULT_BIN_HOURS == 0


def test_weight_is_a_descriptor_at_midnight_and_a_vital_sign_later(tmp_path):
    write_release(tmp_path, {7: record(7, "00:30,Weight,81 01:00,Weight,82")})
    timelines, _ = run(tmp_path)
    weights = [row[1:] for row in rows_of(timelines) if row[3] == "Weight"]
    assert weights == [
        (0.0, "demographics", "Weight", 80.0),
        (0.5, "vitals", "Weight", 81.0),
        (1.0, "vitals", "Weight", 82.0),
    ]


def test_amounts_of_one_minute_both_count(tmp_path):
    write_release(tmp_path, {7: record(7, "01:00,Urine,400 01:00,Urine,0 01:00,Urine,50")})
    timelines, account = run(tmp_path)
    assert [row[4] for row in rows_of(timelines) if row[3] == "Urine"] == [0.0, 50.0, 400.0]
    assert account["set-a"]["reasons"] == {"descriptor missing (-1)": 1}


def test_of_one_minute_the_last_possible_value_stands(tmp_path):
    write_release(tmp_path, {7: record(7, "01:00,MAP,70 01:00,MAP,75 01:00,MAP,0 01:01,MAP,60")})
    timelines, account = run(tmp_path)
    assert [row[4] for row in rows_of(timelines) if row[3] == "MAP"] == [75.0, 60.0]
    assert account["set-a"]["reasons"] == {
        "descriptor missing (-1)": 1,
        "impossible value: MAP outside 5 to 330": 1,
        "same parameter and minute: a later row of the file stands": 1,
    }


def test_a_pressure_is_one_feature_by_cuff_or_by_line_and_of_one_minute_the_line_stands(tmp_path):
    rows = "01:00,SysABP,120 01:00,NISysABP,95 02:00,NISysABP,100 03:00,NIMAP,0 03:00,MAP,60 04:00,NIDiasABP,55"
    write_release(tmp_path / "raw", {7: record(7, rows)})
    timelines, account = run(tmp_path / "raw", tmp_path / "read")
    assert [row[1:] for row in rows_of(timelines) if row[2] == "vitals"] == [
        (1.0, "vitals", "SysABP", 120.0),
        (2.0, "vitals", "SysABP", 100.0),
        (3.0, "vitals", "MAP", 60.0),
        (4.0, "vitals", "DiasABP", 55.0),
    ]
    assert account["set-a"]["reasons"] == {
        "descriptor missing (-1)": 1,
        "impossible value: NIMAP outside 5 to 330": 1,
        "pressure by cuff in a minute that tells it by line too": 1,
    }
    assert any("NISysABP as SysABP" in note for note in timelines.raw.notes)
    (rejected,) = timelines.rejected("set-a").filter(pl.col("Parameter") == "NISysABP").to_dicts()
    assert rejected["Value"] == "95"


def test_rows_that_releases_are_known_to_hold_are_rejected_with_their_reason(tmp_path):
    rows = "01:00,,-1 02:00,Age,61 00:00,ICUType,9 03:00,MechVent,1 04:00,MechVent,0 05:00,MechVent,3"
    write_release(tmp_path / "raw", {7: record(7, rows)})
    timelines, account = run(tmp_path / "raw", tmp_path / "read")
    assert account["set-a"]["reasons"] == {
        "no parameter named": 1,
        "descriptor missing (-1)": 1,
        "descriptor dated after admission": 1,
        "code unknown to the release": 2,
    }
    held = {row[3]: row[4] for row in rows_of(timelines) if row[3].startswith("MechVent")}
    assert held == {"MechVent=yes": 1.0, "MechVent=no": 1.0}
    stored = timelines.rejected("set-a").filter(pl.col("reason") == "no parameter named")
    assert stored.select("line", "Time", "Parameter", "Value").row(0) == (8, "01:00", "", "-1")


def test_the_window_is_inclusive_and_what_lies_beyond_is_rejected(tmp_path):
    write_release(tmp_path, {7: record(7, "24:00,HR,70 24:01,HR,71 47:59,HR,72")})
    timelines, account = run(tmp_path, window_hours=24.0)
    assert [row[1] for row in rows_of(timelines) if row[3] == "HR"] == [24.0]
    assert account["set-a"]["reasons"]["later than the window of 24.0 h"] == 2
    whole, _ = run(tmp_path, window_hours=None)
    assert len([row for row in rows_of(whole) if row[3] == "HR"]) == 3


def pack(folder: Path, form: str, into: Path) -> Path:
    """The release under ``folder`` in another form; returns what a user would give as ``raw``."""
    into.mkdir()
    shutil.copy(folder / "Outcomes-a.txt", into)
    files = sorted((folder / "set-a").iterdir())
    if form in ("tar.gz", "tgz"):
        with tarfile.open(into / f"set-a.{form}", "w:gz") as archive:
            archive.add(folder / "set-a", arcname="set-a")
    elif form == "zip":
        with zipfile.ZipFile(into / "set-a.zip", "w") as archive:
            for file in files:
                archive.write(file, f"set-a/{file.name}")
    else:
        shutil.copytree(folder / "set-a", into / "set-a")
    return into


@pytest.mark.parametrize("form", ["tar.gz", "tgz", "zip", "folder"])
@pytest.mark.parametrize("direct", [False, True])
def test_every_form_of_a_set_reads_the_same(tmp_path, form, direct):
    records = {i: record(i, f"0{i}:15,HR,{60 + i} 47:00,pH,7.{i}") for i in range(1, 8)}
    plain = write_release(tmp_path / "plain", records)
    raw = pack(plain, form, tmp_path / "packed")
    if direct:
        raw = raw / ("set-a" if form == "folder" else f"set-a.{form}")
    wanted, account = run(plain)
    found, other_account = run(raw)
    assert rows_of(found) == rows_of(wanted)
    assert found.stays.equals(wanted.stays)
    assert other_account == account
    assert found.stays["target_mortality"].null_count() == 0
    assert all(Path(name).is_file() for name in found.raw.inputs)
    assert len(found.raw.inputs) == (8 if form == "folder" else 2)


def test_line_ends_of_windows_and_a_missing_last_one_change_nothing(tmp_path):
    text = record(7, "01:00,HR,70 02:00,K,4.1")
    plain = write_release(tmp_path / "plain", {7: text})
    other = write_release(tmp_path / "other", {7: text.rstrip("\n").replace("\n", "\r\n")})
    assert rows_of(run(plain)[0]) == rows_of(run(other)[0])


def test_sets_are_chosen_by_name_and_all_are_read_without_one(tmp_path):
    write_release(tmp_path, {1: record(1), 2: record(2)}, letter="a")
    write_release(tmp_path, {3: record(3)}, letter="c")
    timelines, account = run(tmp_path)
    assert timelines.stays["stay_id"].to_list() == [1, 2, 3]
    assert set(account) == {"set-a", "set-c", "Outcomes-a", "Outcomes-c"}
    assert run(tmp_path, sets=["c"])[0].stays["stay_id"].to_list() == [3]
    with pytest.raises(UnexpectedInput, match=r"set-b\.tar\.gz or set-b\.tgz or set-b\.zip or set-b"):
        run(tmp_path, sets=["b"])
    with pytest.raises(TrajlmError, match="'d' is not a set"):
        run(tmp_path, sets=["d"])


def test_a_set_without_outcomes_has_null_targets_and_says_so(tmp_path):
    write_release(tmp_path, {1: record(1)})
    (tmp_path / "Outcomes-a.txt").unlink()
    timelines, account = run(tmp_path)
    assert timelines.stays.select("target_mortality", "target_length_of_stay_hours").row(0) == (None, None)
    assert any("no Outcomes-a.txt" in note for note in timelines.raw.notes)
    assert set(account) == {"set-a"}


def test_an_outcome_without_a_record_is_rejected_and_unknown_days_are_null(tmp_path):
    outcomes = "\n".join([OUTCOMES_HEADER, outcome(1, days=-1, death=1), outcome(2)]) + "\n"
    write_release(tmp_path, {1: record(1)}, outcomes)
    timelines, account = run(tmp_path)
    assert timelines.stays.select("target_mortality", "target_length_of_stay_hours").row(0) == (1, None)
    assert account["Outcomes-a"]["reasons"] == {"no record of this RecordID in the set": 1}


def test_files_of_other_names_are_noted_and_not_read(tmp_path):
    write_release(tmp_path, {1: record(1)})
    (tmp_path / "set-a" / "._1.txt").write_bytes(b"\x00\x05")
    timelines, _ = run(tmp_path)
    assert any("1 files are not named NNNNNN.txt" in note for note in timelines.raw.notes)


FAULTS = {
    "other record": (record(8), r"7\.txt, line 2, column Value: expected the RecordID .* came '8'"),
    "no record": (record(7).replace("00:00,RecordID,7\n", ""), r"7\.txt: expected a row RecordID"),
    "header": ("Time,Value\n00:00,7\n", r"7\.txt, line 1: expected the header Time,Parameter,Value, came 'Time,Value'"),
    "two fields": (record(7, "01:00,HR"), r"7\.txt, line 8: expected 3 fields, came '01:00,HR'"),
    "four fields": (record(7, "01:00,HR,7,0"), r"7\.txt, line 8: expected 3 fields, came '01:00,HR,7,0'"),
    "blank line": (record(7) + "\n", r"7\.txt, line 8: expected 3 fields, came ''"),
    "time": (record(7, "01:00,HR,70 1:30,HR,70"), r"7\.txt, line 9, column Time: expected a time HH:MM, came '1:30'"),
    "minutes": (record(7, "01:75,HR,70"), r"7\.txt, line 8, column Time"),
    "value": (record(7, "01:00,HR,70 02:00,HR,high"), r"7\.txt, line 9, column Value: expected a number, came 'high'"),
    "no value": (record(7, "01:00,HR,"), r"7\.txt, line 8, column Value: expected a number, came ''"),
    "not finite": (record(7, "01:00,HR,nan"), r"7\.txt, line 8, column Value: expected a number, came 'nan'"),
    "parameter": (record(7, "01:00,Latcate,2"), r"line 8, column Parameter: .* came 'Latcate'; the nearest is Lactate"),
    "empty": ("", r"7\.txt, line 1: expected a header, came an empty file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_built_otherwise_is_one_line_with_file_line_and_column(tmp_path, fault):
    text, message = FAULTS[fault]
    write_release(tmp_path, {6: record(6, "05:00,HR,70"), 7: text})
    with pytest.raises(UnexpectedInput, match=message) as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "set-a" / "7.txt") == caught.value.file


OUTCOME_FAULTS = {
    "column": ("RecordID,Length_of_stay\n7,5\n", r"line 1, column In-hospital_death: expected a column"),
    "absent": (f"{OUTCOMES_HEADER}\n{outcome(6)}\n", r"none for 1 of 2 records, the first being 7"),
    "twice": (f"{OUTCOMES_HEADER}\n{outcome(6)}\n{outcome(7)}\n{outcome(7)}\n", r"line 3, column RecordID"),
    "death": (f"{OUTCOMES_HEADER}\n{outcome(6)}\n{outcome(7, death=2)}\n", r"line 3, column In-hospital_death: .*'2'"),
    "days": (f"{OUTCOMES_HEADER}\n{outcome(6, days='x')}\n{outcome(7)}\n", r"line 2, column Length_of_stay: .*'x'"),
    "fields": (f"{OUTCOMES_HEADER}\n6,1\n", r"line 2: expected 6 fields"),
}


def test_severity_scores_stand_beside_the_targets(tmp_path):
    lines = ["1,6,1,5,-1,0", "2,-1,8,8,-1,0", "3,19,-1,8,3,1"]
    release = write_release(tmp_path, {n: record(n) for n in (1, 2, 3)}, "\n".join([OUTCOMES_HEADER, *lines]) + "\n")
    stays = read_cohort(physionet2012, release, PrepareConfig(), tmp_path / "work").stays.sort("stay_id")
    assert stays["score_saps_i"].to_list() == [6.0, None, 19.0]
    assert stays["score_sofa"].to_list() == [1.0, 8.0, None]


@pytest.mark.parametrize("fault", OUTCOME_FAULTS)
def test_outcomes_built_otherwise_are_one_line_with_file_line_and_column(tmp_path, fault):
    text, message = OUTCOME_FAULTS[fault]
    write_release(tmp_path, {6: record(6), 7: record(7)}, text)
    with pytest.raises(UnexpectedInput, match=message) as caught:
        run(tmp_path)
    assert caught.value.file == str(tmp_path / "Outcomes-a.txt")


def test_bytes_that_are_no_text_are_named(tmp_path):
    write_release(tmp_path, {7: record(7, "01:00,HR,70")})
    file = tmp_path / "set-a" / "7.txt"
    file.write_bytes(file.read_bytes().replace(b"HR", b"\xff\xfe"))
    with pytest.raises(UnexpectedInput, match=r"7\.txt, line 8: expected UTF-8 text, came byte 0xff"):
        run(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flip", "inside"])
def test_a_damaged_archive_is_refused_rather_than_read_in_part(tmp_path, damage):
    plain = write_release(tmp_path / "plain", {i: record(i, "01:00,HR,70") for i in range(1, 30)})
    raw = pack(plain, "tar.gz", tmp_path / "packed")
    archive = raw / "set-a.tar.gz"
    data = archive.read_bytes()
    if damage == "inside":  # whole as gzip, its tar cut in the middle of a member
        archive.write_bytes(gzip.compress(gzip.decompress(data)[: 1024 * 10 + 600]))
    else:
        middle = len(data) // 2
        archive.write_bytes(data[:middle] if damage == "cut" else data[:middle] + b"\xff\x00\xff" + data[middle + 3 :])
    with pytest.raises(UnexpectedInput, match=r"set-a\.tar\.gz"):
        run(raw)


def test_a_record_that_comes_twice_is_refused(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "set-a.tar.gz", "w:gz") as archive:
        for name in ("set-a/7.txt", "set-a/more/7.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(record(7))
            archive.addfile(member, io.BytesIO(record(7).encode()))
    with pytest.raises(UnexpectedInput, match="one file for record 7"):
        run(raw)
    write_release(tmp_path / "two", {7: record(7)}, letter="a")
    write_release(tmp_path / "two", {7: record(7)}, letter="b")
    with pytest.raises(UnexpectedInput, match="record 7 in two sets"):
        run(tmp_path / "two")


@pytest.mark.parametrize("raw", ["nowhere", "", "plain.csv", "set-a"])
def test_a_place_without_sets_says_what_was_looked_for(tmp_path, raw):
    (tmp_path / "plain.csv").write_text("x")
    (tmp_path / "set-a").mkdir()
    target = tmp_path / raw if raw else tmp_path / "set-a" / ".."
    if raw == "":
        (tmp_path / "set-a").rmdir()
        target = tmp_path
    with pytest.raises(UnexpectedInput, match="expected"):
        run(target)


NAMES = ["HR", "Temp", "MAP", "Weight", "pH", "MechVent", "K", ""]
rows = st.lists(
    st.tuples(
        st.integers(0, 3000),
        st.sampled_from(NAMES),
        st.one_of(st.integers(-2, 400), st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3))),
    ),
    max_size=40,
)


@settings(max_examples=30, deadline=None)
@given(rows)
def test_any_rows_are_kept_possible_and_unique_or_rejected(drawn):
    text = " ".join(f"{minute // 60:02d}:{minute % 60:02d},{name},{value}" for minute, name, value in drawn)
    with tempfile.TemporaryDirectory() as folder:
        write_release(Path(folder), {7: record(7, text)})
        timelines, account = run(Path(folder))
    assert account["set-a"]["read"] == 6 + len(drawn)
    found = timelines.measurements
    assert account["set-a"]["kept"] == found.height + 1
    assert not found.select("hours_since_admission", "modality", "feature").is_duplicated().any()
    assert found["hours_since_admission"].is_between(0, 48).all()
    for _, _, modality, feature, value, *_ in found.iter_rows():
        if "=" in feature:
            assert value == 1
        else:
            _, low, high = VARIABLES[modality][feature]
            assert low <= value <= high
