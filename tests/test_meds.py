from __future__ import annotations

import random
import tempfile
from pathlib import Path

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meds_example import DATA, DAY, MAPPING, expected, frame, items, labels, random_rows, read, splits, write

from trajlm.cohorts import meds_files
from trajlm.cohorts.meds_mapping import Prefixes, load_mapping
from trajlm.errors import TrajlmError, UnexpectedInput
from trajlm.schema import LENGTH_OF_STAY, MORTALITY

STAY = [(1, 0, "ICU_ADMISSION//a"), (1, 1, "LAB//1", 2.0), (1, 10, "ICU_DISCHARGE//a")]
TARGETS = "targets: {mortality: labels/m/*.parquet, length_of_stay: labels/los.parquet}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "dataset"


@given(st.sets(st.text("ab/", max_size=4)), st.lists(st.text("ab/", max_size=6)))
def test_the_longest_prefix_wins(prefixes: set[str], codes: list[str]) -> None:
    found = Prefixes({prefix: f"<{prefix}>" for prefix in prefixes})
    for code in codes:
        fitting = [prefix for prefix in prefixes if code.startswith(prefix)]
        longest = max(fitting, key=len, default=None)
        assert found.find(code) == (None if longest is None else (longest, f"<{longest}>"))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**9),
    st.sampled_from([None, 2.0, 5.5]),
    st.sampled_from([0.0, 1.0, 7.5]),
    st.sampled_from([4, 64]),
)
def test_every_row_goes_where_a_plain_loop_puts_it(seed: int, window: float | None, before: float, batch: int) -> None:
    rows = [(9, 1.0, "ICU_ADMISSION", None, None), *random_rows(seed)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(meds_files, "_BATCH_ROWS", batch)
        came = read(write(Path(folder) / "d", {"0": rows}), window_hours=window, before_admission_hours=before)
    wanted = expected(rows, window, before)
    stays = {row[0]: row[1:] for row in came.stays.select("stay_id", "subject_id", "hours_in_unit", MORTALITY).rows()}
    assert stays == {stay: (str(subject), *rest) for stay, (subject, *rest) in wanted.stays.items()}
    assert items(came) == wanted.items
    account = came.account["data"]
    assert (account["read"], account["kept"]) == (len(rows), wanted.kept)


def test_counts_agree_with_sql_over_the_shards(root: Path) -> None:
    for part in range(4):
        write(root, {f"train/{part}": random_rows(part, range(part * 20, part * 20 + 20))}, row_group_size=17)
    came = read(root, window_hours=None)
    sql = duckdb.connect()
    sql.execute(f"create view data as select * from read_parquet('{root}/data/**/*.parquet')")
    sql.execute("""
        create view starts as select distinct subject_id, time as start,
            lead(time) over (partition by subject_id order by time) as following
        from (select distinct subject_id, time from data where code like 'ICU\\_ADMISSION%' escape '\\');
        create view deaths as select subject_id, min(time) as died from data where code = 'MEDS_DEATH' group by 1;
        create view stays as select s.subject_id, start, died, following,
            (select min(time) from data d where d.subject_id = s.subject_id and d.time > start
             and code like 'ICU\\_DISCHARGE%' escape '\\' and (following is null or d.time <= following)) as left_at
        from starts s left join deaths using (subject_id) where died is null or died >= start;
    """)
    died = "count(*) filter (died <= coalesce(left_at, following, died))"
    stays, patients, deaths = sql.execute(f"select count(*), count(distinct subject_id), {died} from stays").fetchone()
    assert (came.stays.height, came.stays["subject_id"].n_unique()) == (stays, patients)
    assert (came.stays[MORTALITY] == 1).sum() == deaths > 0
    per_code = sql.execute("""
        select code, count(*) from data d join stays s on d.subject_id = s.subject_id and d.time >= start
            and (following is null or d.time < following)
            and d.time <= coalesce(left_at, d.time) and d.time <= coalesce(died, d.time)
        where code like 'DRUG%' or code = 'LAB//2' or (code = 'LAB//1' and isfinite(numeric_value)) group by code
    """).fetchall()
    dated = came.measurements.filter(pl.col("modality") != "person")
    undated = sql.execute(
        "select count(*) from data join stays using (subject_id) where time is null and code = 'LAB//2'"
    )
    assert dated.height == sum(n for _, n in per_code) + undated.fetchone()[0]
    unmapped = sql.execute("select count(*) from data where code in ('LABOR', 'XX')").fetchone()[0]
    assert came.account["data/train"]["reasons"]["code is mapped to no modality"] == unmapped
    assert came.account["data/train"]["read"] == sql.execute("select count(*) from data").fetchone()[0]
    assert came.raw.attrition[-1].stays == stays


def test_rejected_rows_name_their_file_line_and_content(root: Path) -> None:
    rows = [*STAY, (1, 11, "LAB//1", 3.0), (2, 0, "LAB//1", 4.0)]
    came = read(write(root, {"train/a": rows, "train/b": [(3, 1, "XX", None, "odd")]}))
    rejected = came.rejected("data/train").sort("shard", "line")
    assert rejected.select("shard", "line", "reason", "subject_id", "code", "text_value").rows() == [
        ("data/train/a.parquet", 5, "after the patient left the unit", "1", "LAB//1", None),
        ("data/train/a.parquet", 6, "subject has no stay", "2", "LAB//1", None),
        ("data/train/b.parquet", 2, "code is mapped to no modality", "3", "XX", "odd"),
    ]
    assert any("XX (1)" in note for note in came.raw.notes)
    assert any("2 of 3 subjects have no stay" in note for note in came.raw.notes)
    assert any("DRUG" in note and "no code starts with" in note for note in came.raw.notes)
    few = read(root, rejected_rows=0)
    assert few.account["data/train"]["reasons"] == came.account["data/train"]["reasons"]
    assert few.account["data/train"]["stored"] == 0


def test_codes_with_values_are_continuous_and_others_categories(root: Path) -> None:
    rows = [STAY[0], (1, 1, "LAB//1"), (1, 2, "LAB//1", 5.1), (1, 3, "LAB//2"), STAY[2]]
    write(root, {"0": rows})
    (root / "metadata").mkdir()
    codes = {"code": ["LAB//1", "LAB//9"], "unit": ["mmol/L", "g"], "aggregate": ["sum", "last"]}
    pl.DataFrame(codes).write_parquet(root / "metadata/codes.parquet")
    came = read(root, MAPPING.replace('["LAB//"]', '["LAB//"], strip_prefix: true, least_share: 0.25'))
    features = [(f.name, f.kind, f.unit, f.aggregate, f.least_share) for f in came.raw.features]
    assert features == [("1", "continuous", "mmol/L", "sum", 0.25), ("2", "category", "", "last", 0.25)]
    assert came.measurements["value"].to_list() == [pytest.approx(5.1, rel=1e-6), 1.0]
    assert came.account["metadata/codes"] == {"read": 2, "kept": 1, "rejected": 1, "stored": 1, "reasons": {
        "the data holds no such code, or the mapping does not use it": 1}}  # fmt: skip


def test_age_is_told_from_birth_and_static_rows_stand_at_hour_0(root: Path) -> None:
    rows = [(1, None, "GENDER//f"), (1, -20 * 365.2425 * 24, "MEDS_BIRTH"), (1, -400, "RACE//a"), (1, -3, "RACE//b"),
            *STAY[:2], (1, 2, "RACE//c"), STAY[2]]  # fmt: skip
    came = read(write(root, {"0": rows}), MAPPING + "age: person\n")
    held = came.measurements.filter(pl.col("modality") == "person")
    assert set(held["hours_since_admission"]) == {0.0}
    values = {feature: round(value, 6) for feature, value in held.select("feature", "value").rows()}
    assert values == {"age": 20.0, "GENDER//f": 1.0, "RACE//b": 1.0}
    assert set(came.rejected("data")["reason"]) == {
        "static, and a later row of its prefix stands", "static, but dated after admission to the unit",
    }  # fmt: skip


def test_a_subject_as_one_stay(root: Path) -> None:
    rows = [
        (7, 0, "LAB//1", 1.0),
        (7, 1, "ICU_ADMISSION"),
        (7, 2, "ICU_ADMISSION"),
        (7, 9, "LAB//1", 1.0),
        (8, 3, "ICU_ADMISSION"),
    ]
    whole = MAPPING.replace("ends: [ICU_DISCHARGE]", "stay: subject")
    came = read(write(root, {"0": rows}), whole)
    assert came.stays.select("stay_id", "hours_in_unit", MORTALITY).rows() == [(7, 8.0, 0), (8, None, None)]
    assert came.account["data"]["reasons"] == {
        "before admission to the unit": 1,
        "not the first start of its subject": 1,
    }


def test_nobody_is_in_the_unit_after_death(root: Path) -> None:
    rows = [
        (1, 0, "ICU_ADMISSION"), (1, 5, "MEDS_DEATH"), (1, 30, "ICU_DISCHARGE"),
        (2, 0, "ICU_ADMISSION"), (2, 5, "MEDS_DEATH"),
        (3, 0, "ICU_ADMISSION"), (3, 26280, "MEDS_DEATH"),
        (4, 0, "ICU_ADMISSION"), (4, 30, "ICU_DISCHARGE"), (4, 40, "MEDS_DEATH"),
    ]  # fmt: skip
    write(root, {"0": rows})
    came = read(root)
    columns = ("stay_id", "hours_in_unit", LENGTH_OF_STAY, MORTALITY)
    assert came.stays.select(columns).rows() == [
        (1001, 5.0, 30.0, 1), (2001, 5.0, 5.0, 1), (3001, None, None, None), (4001, 30.0, 30.0, 0)
    ]  # fmt: skip
    assert any(note.startswith("1 stays have no end and a death more than 30 days") for note in came.raw.notes)
    longer = read(root, MAPPING + "open_stay_days: 2000\n").stays
    assert longer.filter(pl.col("stay_id") == 3001).select(columns[1:]).row(0) == (26280.0, 26280.0, 1)


def test_a_stray_value_makes_no_quantity_of_a_code(root: Path) -> None:
    """One value in a hundred rows, in a stay or out of any, held out or not, costs the others nothing."""
    stays = [row for s in range(1, 31) for row in ((s, 0, "ICU_ADMISSION"), (s, 1, "DRUG//a"), (s, 9, "ICU_DISCHARGE"))]
    plain = read(write(root / "plain", {"0": stays}))
    stray = read(write(root / "stray", {"0": [*stays, (30, 99, "DRUG//a", 5.0)]}))
    assert stray.measurements.equals(plain.measurements)
    assert stray.measurements.height == 30
    assert [f.kind for f in stray.raw.features if f.name == "DRUG//a"] == ["category"]
    assert any("1 values are left out, most often of DRUG//a (1)" in note for note in stray.raw.notes)
    assert "values are left out" not in " ".join(plain.raw.notes)


def test_nan_is_no_value(root: Path) -> None:
    rows = [*STAY[:2], (1, 4, "LAB//2", float("nan")), (1, 5, "LAB//2", float("nan")), STAY[2]]
    came = read(write(root, {"0": rows})).measurements.filter(pl.col("feature") == "LAB//2")
    assert came.select("hours_since_admission", "value").rows() == [(4.0, 1.0), (5.0, 1.0)]


def test_ids_of_stays_depend_on_nothing_but_subject_and_ordinal(tmp_path: Path) -> None:
    many = [*random_rows(3, range(5)), *random_rows(4, [2**62, 2**62 + 1])]
    assert any(row[0] >= 2**62 and row[2].startswith("ICU_ADM") for row in many)
    came = read(write(tmp_path / "all", {"0": many})).stays
    assert not came["stay_id"].is_duplicated().any()
    for subject in came["subject_id"].unique():
        rows = [row for row in many if row[0] == int(subject)]
        alone = read(write(tmp_path / subject, {"0": rows})).stays
        assert alone["stay_id"].to_list() == came.filter(pl.col("subject_id") == subject)["stay_id"].to_list()
    crowded = [(1, hour, "ICU_ADMISSION") for hour in range(1001)]
    with pytest.raises(TrajlmError, match="subject 1 has 1001 starts"):
        read(write(tmp_path / "crowded", {"0": crowded}))


def test_the_earliest_label_stands_and_closes_the_timeline(root: Path) -> None:
    rows = [
        *STAY[:2],
        (1, 4, "LAB//1", 4.0),
        (1, 5, "LAB//1", 5.0),
        STAY[2],
        (2, 0, "ICU_ADMISSION"),
        (3, 0, "LAB//1", 1.0),
    ]
    write(root, {"0": rows})
    labels(root, "m/0", [(1, 6, False), (1, 4, True), (4, 1, True)], "boolean_value")
    labels(root, "m/1", [(1, -1, True), (3, 1, True), (1, 30, True), (1, None, True)], "integer_value")
    labels(root, "los", [(1, 9, 33.5)], "float_value")
    came = read(root, MAPPING + TARGETS)
    stays = came.stays.select("stay_id", "hours_in_unit", MORTALITY, LENGTH_OF_STAY).rows()
    assert stays == [(1001, 10.0, 1, 33.5), (2001, None, None, None)]
    assert came.measurements["hours_since_admission"].to_list() == [1.0, 4.0]
    assert came.account["data"]["reasons"] == {"after the prediction time": 1, "subject has no stay": 1}
    assert came.account["labels/los"]["kept"] == came.account["labels/m"]["kept"] == 1
    assert came.account["labels/m"]["reasons"] == {
        "a later label of a stay that has an earlier one": 2,
        "its prediction time is before admission to the unit": 1,
        "no prediction time": 1,
        "subject has no stay": 1,
        "subject is not in the data": 1,
    }
    assert "1 stays have no label for mortality" in came.raw.notes
    open_end = read(root, MAPPING + TARGETS + "prediction_time: ignored\n")
    assert open_end.measurements["hours_since_admission"].to_list() == [1.0, 4.0, 5.0]
    leak = "events after the prediction time of a stay's labels are read, as the mapping asks"
    assert leak in open_end.raw.open_leaks
    assert leak not in came.raw.open_leaks


def test_splits_of_the_dataset_are_those_of_the_subjects(root: Path) -> None:
    rows = random_rows(5, range(30))
    write(root, {"0": rows})
    rng = random.Random(0)
    of = {subject: rng.choice(["train", "tuning", "held_out"]) for subject in range(40)}
    splits(root, of)
    came = read(root, MAPPING + "splits: dataset\n")
    stays = came.stays.select("stay_id", "subject_id").rows()
    assert dict(came.raw.splits.rows()) == {stay: of[int(subject)] for stay, subject in stays}
    account = came.account["metadata/subject_splits"]
    assert (account["read"], account["kept"]) == (40, came.stays["subject_id"].n_unique())
    assert read(root).raw.splits is None
    file = root.parent / "splits.csv"
    file.write_text("stay_id,split\n")
    assert read(root, MAPPING + "splits: dataset\n", splits=str(file)).raw.splits is None


def test_a_patient_of_several_subjects_keeps_one_split(root: Path) -> None:
    rows = [*STAY, *[(2, *row[1:]) for row in STAY]]
    write(root, {"0": frame(rows).with_columns(patient=pl.lit("anna"))})
    mapping = MAPPING + "patient_column: patient\nsplits: dataset\n"
    splits(root, {1: "train", 2: "train"})
    came = read(root, mapping)
    assert set(came.stays["subject_id"]) == {"anna"}
    assert came.stays["admission_rank"].to_list() == [1, 2]
    splits(root, {1: "train", 2: "tuning"})
    with pytest.raises(UnexpectedInput, match="every patient in one split, came patient anna in two"):
        read(root, mapping)


def broken(root: Path, how: str) -> None:
    table = frame(STAY)
    if how == "cut":
        write(root, {"0": STAY})
        file = root / "data/0.parquet"
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "none":
        root.mkdir()
    else:
        tables = {
            "renamed": {"0": table.rename({"numeric_value": "value", "code": "codes"})},
            "old": {"0": table.rename({"subject_id": "patient_id"})},
            "text for ids": {"0": table.cast({"subject_id": pl.String})},
            "text for numbers": {"0": table.cast({"numeric_value": pl.String})},
            "days": {"0": table.cast({"time": pl.Date})},
            "zoned": {"0": table.with_columns(pl.col("time").dt.replace_time_zone("UTC"))},
            "unsorted": {"0": [STAY[0], STAY[2], STAY[1]]},
            "scattered": {"0": [*STAY, (2, 0, "LAB//1", 1.0), (1, 20, "LAB//1", 1.0)]},
            "in two": {"0": STAY, "1": STAY},
            "no subject": {"0": [*STAY, (None, 1, "LAB//1", 1.0)]},
            "no code": {"0": [*STAY, (2, 1, None, 1.0)]},
            "no stay": {"0": [(1, 1, "LAB//1", 1.0)]},
            "no row": {"0": table.clear()},
            "dead before": {"0": [(1, -1, "MEDS_DEATH"), *STAY]},
        }
        write(root, tables[how])


@pytest.mark.parametrize("batch", [1, 1000])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("cut", "0.parquet: expected a whole parquet file"),
        ("none", r"expected data/\*\*/\*.parquet, came no such file"),
        ("renamed", "column code: expected this column, .*the nearest is codes"),
        ("old", "column subject_id: .*MEDS before 0.3"),
        ("text for ids", "column subject_id: expected int64, came (large_)?string"),
        ("text for numbers", "column numeric_value: expected float32, came (large_)?string"),
        ("days", r"column time: expected timestamp\[us\] without a time zone, came date32"),
        ("zoned", "column time: expected timestamp.* without a time zone, came timestamp.*UTC"),
        ("unsorted", "line 4, column time: expected the rows of a subject in order of time, came 2020-02-01 01"),
        ("scattered", "line 6, column subject_id: expected the rows of a subject together, came 1"),
        ("in two", "1.parquet: expected every subject in one shard, came subject 1 also in data/0.parquet"),
        ("no subject", "line 5, column subject_id: expected one in every row, came nothing"),
        ("no code", "line 5, column code: expected one in every row, came nothing"),
        ("no stay", "no dated row starts a stay; .* ICU_ADMISSION, the most frequent codes are LAB//1"),
        ("no row", "the shards under data hold no row"),
        ("dead before", "none of the 1 stays is kept"),
    ],
)
def test_data_that_is_not_meds_is_one_clear_error(root: Path, how: str, told: str, batch: int, monkeypatch) -> None:
    monkeypatch.setattr(meds_files, "_BATCH_ROWS", batch)
    broken(root, how)
    with pytest.raises(TrajlmError, match=told):
        read(root)


def test_any_other_label_becomes_a_target_of_its_own(root: Path) -> None:
    rows = [(n, 0, "ICU_ADMISSION") for n in (1, 2, 3)] + [(n, 40, "ICU_DISCHARGE") for n in (1, 2, 3)]
    write(root, {"train/0": sorted(rows)})
    labels(root, "readmission", [(1, 9, True), (2, 9, False)], "boolean_value")
    labels(root, "organs", [(1, 9, 3), (2, 9, 0)], "integer_value")
    labels(root, "lactate", [(1, 9, 1.0), (3, 9, 0.0)], "float_value")
    names = "targets: {" + ", ".join(f"{n}: labels/{n}.parquet" for n in ("readmission", "organs", "lactate")) + "}\n"
    stays = read(root, MAPPING + names).stays.sort("stay_id")
    assert stays["target_readmission"].to_list() == [1, 0, None]
    assert stays["target_readmission"].dtype == pl.Int8
    assert stays["target_organs"].to_list() == [3.0, 0.0, None]
    assert stays["target_lactate"].to_list() == [1.0, None, 0.0]
    assert stays["target_organs"].dtype == stays["target_lactate"].dtype == pl.Float64
    labels(root, "lactate", [(1, 9, float("nan"))], "float_value")
    with pytest.raises(UnexpectedInput, match="a finite number"):
        read(root, MAPPING + names)


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("integer_value", 2, "line 2, column integer_value: expected 0 or 1, came 2"),
        (
            "categorical_value",
            "yes",
            "expected boolean_value, came only subject_id, prediction_time, categorical_value",
        ),
    ],
)
def test_labels_that_mean_nothing_are_errors(root: Path, column: str, value: object, told: str) -> None:
    write(root, {"0": STAY})
    labels(root, "m", [(1, 2, value)], column)
    with pytest.raises(UnexpectedInput, match=told):
        read(root, MAPPING + "targets: {mortality: labels/m.parquet}\n")
    labels(root, "m", [(1, 2, -3.0)], "float_value")
    with pytest.raises(UnexpectedInput, match=r"column float_value: expected hours, 0 or more, came -3.0"):
        read(root, MAPPING + "targets: {length_of_stay: labels/m.parquet}\n")
    with pytest.raises(TrajlmError, match=r"labels/none\*.parquet: expected parquet files of labels, came none"):
        read(root, MAPPING + "targets: {phenotype_x: labels/none*.parquet}\n")


def test_splits_that_do_not_fit_are_errors(root: Path) -> None:
    write(root, {"0": STAY})
    mapping = MAPPING + "splits: dataset\n"
    with pytest.raises(TrajlmError, match=r"expected metadata/subject_splits.parquet"):
        read(root, mapping)
    for of, told in (({1: "test"}, "line 2, column split: .*came test"), ({2: "train"}, "none for subject 1")):
        splits(root, of)
        with pytest.raises(UnexpectedInput, match=told):
            read(root, mapping)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("ends", "end"), "end is not a key of a mapping; the nearest is ends"),
        (
            ("static: true", "statick: true"),
            "modalities.person.statick is not a key .*nearest is modalities.person.static",
        ),
        (("static: true", "static: 1"), "modalities.person.static: expected true or false, came 1"),
        (("kind: text", "kind: image"), "modalities.note.kind: expected numeric or text, came 'image'"),
        (("[DRUG]", "DRUG"), "modalities.drug.codes: expected a list, came 'DRUG'"),
        (("[DRUG]", "[RACE]"), "the code 'RACE' is in modalities.person and in modalities.drug"),
        (("[DRUG]", "[MEDS_DEATH]"), "the code 'MEDS_DEATH' is in modalities.drug and in deaths"),
        (("[DRUG]", "[]"), "modalities.drug.codes names no code"),
        (("drug:", "Drug:"), "modalities.Drug: expected a name of lower-case letters"),
        (
            ("ends: [ICU_DISCHARGE]", "ends: [ICU_DISCHARGE]\nopen_stay_days: -5"),
            "open_stay_days: expected days from 0 to 100,000",
        ),
        (
            ("ends: [ICU_DISCHARGE]", "ends: [ICU_DISCHARGE]\nopen_stay_days: .inf"),
            "open_stay_days: expected .*came inf",
        ),
        (("ends: [ICU_DISCHARGE]", ""), "ends names no code"),
        (("starts: [ICU_ADMISSION]", ""), "starts is missing"),
        (
            ("left_out:", "targets: {mortallity: x}\nleft_out:"),
            "targets.mortallity is nearly the target mortality",
        ),
        (("left_out:", "ends: [X]\nleft_out:"), "the key 'ends' twice"),
        (("left_out:", "age: note\nleft_out:"), "age: expected a numeric modality, came 'note'"),
        (("left_out:", "patient_column: code\nleft_out:"), "patient_column: expected a column beside the standard's"),
        (("modalities:", "modalities: ["), "expected YAML"),
    ],
)
def test_a_wrong_mapping_is_one_line_that_names_the_nearest(tmp_path: Path, change: tuple, told: str) -> None:
    file = tmp_path / "mapping.yaml"
    file.write_text(MAPPING)
    assert load_mapping(file).modality_codes.find("LAB//SPECIMEN//2") == ("LAB//SPECIMEN", None)
    file.write_text(MAPPING.replace(*change))
    with pytest.raises(TrajlmError, match=told) as caught:
        load_mapping(file)
    assert "\n" not in str(caught.value)


def test_codes_that_would_be_one_feature_are_an_error(root: Path) -> None:
    write(root, {"0": [*STAY[:2], (1, 2, "OTHER//1", 1.0)]})
    mapping = MAPPING.replace('["LAB//"]', '["LAB//", "OTHER//"], strip_prefix: true')
    with pytest.raises(TrajlmError, match="the codes LAB//1 and OTHER//1 would both be the feature '1'"):
        read(root, mapping)


def test_columns_may_be_narrow_categorical_or_absent(root: Path) -> None:
    table = frame(STAY)
    first = read(write(root, {"0": table}))
    other = {"code": pl.Categorical, "subject_id": pl.Int32, "time": pl.Datetime("ns"), "numeric_value": pl.Float64}
    second = read(write(root, {"0": table.cast(other).drop("text_value").with_columns(extra=pl.lit(1))}))
    assert items(first) == items(second)
    assert first.stays.equals(second.stays)
    assert DAY in table["time"].to_list()
    assert list(DATA) == table.columns
