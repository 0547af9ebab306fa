"""The 25 phenotypes: the definitions against their public source, and codes as releases write them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import yaml
from mimic_example import BENS, FIRST, SECOND, read, reasons, spoil, write_release

from trajlm.cohorts.mimic_phenotypes import load_definitions
from trajlm.errors import UnexpectedInput
from trajlm.schema import PHENOTYPE_PREFIX

HEADER = "phenotype,title,icd_version,code\n"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_release(tmp_path / "raw")


def test_the_definitions_are_the_public_ones(shared_data: Path) -> None:
    text = (shared_data / "phenotypes/icd_9_10_definitions_2.yaml").read_text()
    groups = {title: group for title, group in yaml.safe_load(text).items() if group["use_in_benchmark"]}
    ours = load_definitions()
    assert len(groups) == 25
    assert ours["title"].n_unique() == ours["phenotype"].n_unique() == 25
    for title, group in groups.items():
        assert set(ours.filter(pl.col("title") == title)["code"]) == {str(code) for code in group["codes"]}
    assert "MIT License" in (Path(__file__).parents[1] / "trajlm/cohorts/mimic_phenotypes.csv").read_text()[:400]


def test_versions_of_the_definitions_are_told_by_how_codes_begin() -> None:
    named = set(load_definitions()["code"])
    assert not named & {"J9601", "I480"}  # as the notes of a prepared folder say
    for version, code in load_definitions().select("icd_version", "code").iter_rows():
        assert version == (9 if code[0].isdigit() or code[0] == "V" else 10)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a,A,9,4280\nb,B,9,4280\n", "ICD-9 4280 in A and in B"),
        ("a,A,9,428.0\nb,B,9, 4280 \n", "ICD-9 4280 in A and in B"),
        ("a,A,10,i10\na,A,10,I10\n", "ICD-10 I10 in A and in A"),
        ("a,A,8,4280\n", "ICD 9 or 10"),
        ("a,A,,4280\n", "ICD 9 or 10"),
    ],
)
def test_a_code_in_two_groups_is_an_error_never_the_last_wins(tmp_path: Path, rows: str, told: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text(f"# a remark\n{HEADER}{rows}")
    with pytest.raises(UnexpectedInput, match=told):
        load_definitions(path)


def test_one_code_may_mean_two_things_in_two_versions(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(f"{HEADER}a,A,9,E8720\nb,B,10,E8720\n")
    assert load_definitions(path)["phenotype"].to_list() == ["a", "b"]


def positives(raw: Path, folder: Path) -> dict[int, set[str]]:
    stays = read(raw, folder).stays
    names = [c for c in stays.columns if c.startswith(PHENOTYPE_PREFIX)]
    return {
        row["stay_id"]: {n.removeprefix(PHENOTYPE_PREFIX) for n in names if row[n]}
        for row in stays.iter_rows(named=True)
    }


def test_codes_with_blanks_and_dots_count_for_every_stay_of_the_admission(raw: Path, tmp_path: Path) -> None:
    came = positives(raw, tmp_path / "a")
    assert came[FIRST] == came[SECOND] == {"pneumonia", "congestive_heart_failure_nonhypertensive"}
    assert came[BENS] == {"essential_hypertension"}
    result = read(raw, tmp_path / "b")
    assert reasons(result, "diagnoses_icd") == {
        4: "no stay of the cohort in this admission",
        6: "code is in no phenotype",
        7: "names no code",
        8: "neither ICD-9 nor ICD-10",
    }
    assert result.account["diagnoses_icd"]["kept"] == 3
    assert any("targets only" in note for note in result.raw.notes)
    assert not any(f.name in came[FIRST] | came[BENS] for f in result.raw.features)


def test_a_code_counts_within_its_own_version_only(raw: Path, tmp_path: Path) -> None:
    spoil(raw, "hosp/diagnoses_icd", "486    ,9", "486    ,10")
    spoil(raw, "hosp/diagnoses_icd", ",I10,10", ",I10,9")
    came = positives(raw, tmp_path / "a")
    assert came[FIRST] == {"congestive_heart_failure_nonhypertensive"}
    assert came[BENS] == set()


def test_phenotypes_are_unknown_where_nothing_is_coded_and_absent_where_the_table_is(raw: Path, tmp_path: Path) -> None:
    path = raw / "hosp/diagnoses_icd.csv"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if not line.startswith("10000002")))
    result = read(raw, tmp_path / "a")
    names = [c for c in result.stays.columns if c.startswith(PHENOTYPE_PREFIX)]
    ben = result.stays.filter(pl.col("stay_id") == BENS).select(names)
    assert ben.row(0) == (None,) * 25
    assert result.stays.filter(pl.col("stay_id") != BENS).select(names).null_count().row(0) == (0,) * 25
    assert any(note.startswith("1 stays have no coded diagnosis") for note in result.raw.notes)
    path.unlink()
    result = read(raw, tmp_path / "b")
    assert not any(c.startswith(PHENOTYPE_PREFIX) for c in result.stays.columns)
    assert any("hosp/diagnoses_icd is absent" in note for note in result.raw.notes)
