"""Drugs of the eICU reader: when they count as given, and what they are called."""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
from eicu_example import read, reasons, values, write
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trajlm.cohorts.eicu_medication import DRUGS, drug_feature, plain_drug_name


def test_a_drug_is_given_when_it_is_ordered_and_begun_and_not_when_the_order_is_cancelled(tmp_path: Path) -> None:
    def order(ordered, start, stop, **changes) -> dict:
        return {"drugorderoffset": ordered, "drugstartoffset": start, "drugstopoffset": stop, **changes}

    raw = write(
        tmp_path / "raw",
        medication=[
            order(10, 30, 90),
            order(60, 30, 90),
            order(-50, -30, 90),  # still runs on admission
            order(60, -30, 90),  # the same, entered later
            order(60, -30, -5),  # had ended, entered later
            order(-50, -30, -5),
            order(-50, -30, 0),  # when it stopped is not recorded: it had not by then
            order(10, 30, 90, drugordercancelled="Yes"),
            order(10, 30, 90, drugordercancelled="yes "),
            order("", 30, ""),
            order("", "", 90),
        ],
    )
    result = read(raw)
    assert [round(hours * 60) for hours, _, _ in values(result, "medication")] == [0, 30, 60]
    assert reasons(result, "medication") == {
        6: "before admission to the unit",
        7: "before admission to the unit",
        9: "cancelled order is not an administration",
        10: "cancelled order is not an administration",
        12: "no time",
    }
    paper = read(write(tmp_path / "raw", medication=[order(60, 30, 90)], lab=[{}]), paper_faithful=True)
    assert values(paper, "medication") == [(0.5, "drugname=aspirin", 1.0)]
    early = read(
        write(tmp_path / "raw", medication=[order(60, -30, -5), order(-50, -30, -5)]), before_admission_hours=1
    )
    assert values(early, "medication") == [(0.0, "drugname=aspirin", 1.0), (1.0, "drugname=aspirin", 1.0)]


def test_a_drug_is_named_by_its_code_and_else_by_its_name(tmp_path: Path) -> None:
    raw = write(
        tmp_path / "raw",
        medication=[
            {"drugname": "TYLENOL", "drughiclseqno": 1866, "drugstartoffset": 1, "drugorderoffset": 1},
            {"drugname": "", "drughiclseqno": 1866, "drugstartoffset": 2, "drugorderoffset": 2},
            {
                "drugname": "ACETAMINOPHEN 650 MG RE SUPP",
                "drughiclseqno": "",
                "drugstartoffset": 3,
                "drugorderoffset": 3,
            },
            {"drugname": "Unheard Of", "drughiclseqno": 999999, "drugstartoffset": 4, "drugorderoffset": 4},
            {"drugname": "", "drughiclseqno": "", "drugstartoffset": 5, "drugorderoffset": 5},
        ],
    )
    result = read(raw)
    assert [feature for _, feature, _ in values(result, "medication")] == [
        "drugname=acetaminophen", "drugname=acetaminophen", "drugname=acetaminophen", "drughiclseqno=999999",
    ]  # fmt: skip
    assert reasons(result, "medication") == {6: "names no drug"}


def plain(*names: str | None) -> list[str | None]:
    return (
        pl.DataFrame({"name": names}, schema={"name": pl.String})
        .select(plain_drug_name(pl.col("name")))["name"]
        .to_list()
    )


_WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=9)


_UNITS, _FORMS = ["MG", "mcg", "ML", "units"], ["PO TABS", "IV SOLN", "inj", "CAP"]
_PACKAGES = ["", "5 ML VIAL : ", "1 ML  -  ", ".5 ml syr: "]


@given(_WORD, st.integers(1, 5000), st.sampled_from(_UNITS), st.sampled_from(_FORMS), st.sampled_from(_PACKAGES))
@hypothesis_settings(max_examples=60, deadline=None)
def test_case_package_strength_and_form_do_not_make_another_drug(
    name: str, strength: int, unit: str, form: str, package: str
) -> None:
    spelled = f"{package}{name.upper()} {strength} {unit} {form}"
    assert plain(spelled) == plain(spelled.lower()) == plain(name)


def test_names_of_drugs_that_hold_no_letter_name_nothing_and_listed_ones_are_plain_already() -> None:
    assert plain(None, "", "   ", "12 : ", "***") == [None] * 5
    assert plain(*DRUGS["drug"].to_list()) == DRUGS["drug"].to_list()
    assert DRUGS["drughiclseqno"].is_unique().all()
    zero = pl.DataFrame({"drugname": ["aspirin", None], "drughiclseqno": [0.0, 0.0]})
    assert zero.select(drug_feature())["drugname"].to_list() == ["drugname=aspirin", None]


_MINUTES = st.one_of(st.none(), st.integers(-3000, 6000))


@given(st.lists(st.tuples(_MINUTES, _MINUTES, _MINUTES, st.sampled_from(["Yes", "No", ""])), max_size=12))
@hypothesis_settings(max_examples=15, deadline=None)
def test_drug_orders_are_dated_as_a_plain_loop_dates_them(orders: list[tuple]) -> None:
    expected: list[int] = []
    for ordered, start, stop, cancelled in orders:
        times = [minutes for minutes in (ordered, start) if minutes is not None]
        if cancelled == "Yes" or not times:
            continue
        known = max(times)
        begun_before = start is not None and start < 0
        if begun_before and stop is not None and stop < 0:
            continue
        if begun_before:
            known = max(known, 0)
        if 0 <= known <= 2880:
            expected.append(known)
    cells = ["drugorderoffset", "drugstartoffset", "drugstopoffset", "drugordercancelled"]
    rows = [dict(zip(cells, ("" if cell is None else cell for cell in order), strict=True)) for order in orders]
    with tempfile.TemporaryDirectory() as folder:
        result = read(write(Path(folder) / "raw", medication=rows))
    assert sorted(round(hours * 60) for hours, _, _ in values(result, "medication")) == sorted(set(expected))
    assert result.account["medication"]["kept"] == len(expected)
    assert result.account["medication"]["read"] == len(orders)
