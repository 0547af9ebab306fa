"""Who is in which split: drawn by patient and stratum, or published in a file."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trajlm.errors import UnexpectedInput
from trajlm.schema import ADMISSION_RANK, SPLITS
from trajlm.splits import RARE, assign_splits, read_splits

PATIENTS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 7)), min_size=1, max_size=300)


def stays_of(patients: list[tuple[int, int]]) -> pl.DataFrame:
    """Patients of some stays each; the first stay of each holds the modalities of its bits, later ones others."""
    rows: list[tuple] = []
    for patient, (count, pattern) in enumerate(patients):
        for rank in range(count):
            bits = (pattern + rank * 3) % 8
            rows.append((10_000 - len(rows), f"p{patient}", rank, bool(bits & 1), bool(bits & 2), bool(bits & 4)))
    schema = ["stay_id", "subject_id", ADMISSION_RANK, "present_x", "present_y", "present_z"]
    return pl.DataFrame(rows, schema=schema, orient="row")


@settings(max_examples=60, deadline=None)
@given(PATIENTS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_splits_keep_patients_whole_and_every_stratum_in_proportion(patients, seed, shuffler):
    stays = stays_of(patients)
    splits = assign_splits(stays, seed)
    rows = list(range(stays.height))
    shuffler.shuffle(rows)
    assert assign_splits(stays[rows], seed).equals(splits)
    assert splits["stay_id"].to_list() == sorted(stays["stay_id"])
    joined = stays.join(splits, on="stay_id")
    split_of = dict(joined.select("subject_id", "split").unique().iter_rows())
    assert joined.select("subject_id", "split").unique().height == len(split_of) == len(patients)
    strata = defaultdict(list)
    for patient, (_, pattern) in enumerate(patients):
        strata[pattern].append(split_of[f"p{patient}"])
    pooled = [s for members in strata.values() if len(members) < RARE for s in members]
    for members in [*(m for m in strata.values() if len(m) >= RARE), pooled, list(split_of.values())]:
        for split, share in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
            assert abs(members.count(split) - share * len(members)) <= 2
        if len(members) >= RARE:
            assert set(members) == set(SPLITS)


def test_a_patient_belongs_to_the_stratum_of_the_first_stay():
    # Later stays, of lower stay ids, are all alike: only the first ones can give every stratum its 14, 3 and 3 of 20.
    rows = [(1000 - i, f"p{i}", 0, bool(i & 1), bool(i & 2), bool(i & 4)) for i in range(160)]
    rows += [(500 - i, f"p{i}", 1, True, True, True) for i in range(160)]
    schema = ["stay_id", "subject_id", ADMISSION_RANK, "present_x", "present_y", "present_z"]
    splits = dict(assign_splits(pl.DataFrame(rows, schema=schema, orient="row"), seed=0).iter_rows())
    for stratum in range(8):
        found = [splits[1000 - i] for i in range(160) if i % 8 == stratum]
        assert [found.count(split) for split in SPLITS] == [14, 3, 3]
        assert found == [splits[500 - i] for i in range(160) if i % 8 == stratum]


def test_the_seed_changes_who_is_where_and_nothing_else():
    stays = stays_of([(1, i % 4) for i in range(400)])
    one, other = assign_splits(stays, 0), assign_splits(stays, 1)
    assert one.equals(assign_splits(stays, 0))
    assert not one.equals(other)
    assert sorted(one["split"]) == sorted(other["split"])


SPLIT_STAYS = pl.DataFrame({"stay_id": [1, 2, 3], "subject_id": ["p", "p", "q"]})
SPLIT_FAULTS = {
    "header": ("stay,split\n1,train\n", r"line 1: expected the header stay_id,split, came 'stay,split'"),
    "number": ("stay_id,split\nx,train\n", r"line 2, column stay_id: expected a whole number, came 'x'"),
    "fields": ("stay_id,split\n1,train\n2\n", r"line 3: expected 2 fields"),
    "unknown split": ("stay_id,split\n1,trian\n", r"line 2, column split: .* came 'trian'; the nearest is train"),
    "test": ("stay_id,split\n1,test\n", r"line 2, column split: .* came 'test'; the nearest is held_out"),
    "val": ("stay_id,split\n1,val\n", r"came 'val'; the nearest is tuning"),
    "stranger": (
        "stay_id,split\n1,train\n9,train\n",
        r"line 3, column stay_id: expected a stay of the cohort, came 9; "
        "these records lack 1 of the 2 stays it lists: read the release",
    ),
    "twice": ("stay_id,split\n1,train\n1,train\n", r"line 3, column stay_id: expected every stay once"),
    "patient": (
        "stay_id,split\n3,train\n1,train\n2,tuning\n",
        r"line 4, column split: .* patient p, .* train on line 3",
    ),
    "absent": ("stay_id,split\n1,train\n", r"none for 2 of 3 stays, the first being 2"),
}


@pytest.mark.parametrize("fault", SPLIT_FAULTS)
def test_published_splits_built_otherwise_are_one_line(tmp_path, fault):
    text, message = SPLIT_FAULTS[fault]
    (tmp_path / "splits.csv").write_text(text)
    with pytest.raises(UnexpectedInput, match=message):
        read_splits(tmp_path / "splits.csv", SPLIT_STAYS)


def test_an_order_of_rows_in_the_files_of_splits_is_free():
    with tempfile.TemporaryDirectory() as folder:
        for text in ("stay_id,split\n1,train\n2,train\n3,tuning\n", "split,stay_id\ntuning,3\ntrain,2\ntrain,1\n"):
            (Path(folder) / "s.csv").write_text(text)
            assert read_splits(Path(folder) / "s.csv", SPLIT_STAYS)["split"].to_list() == ["train", "train", "tuning"]
