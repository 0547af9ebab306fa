"""Which items of MIMIC-IV make up the series, how each is named, in which unit it comes and which values are possible.

The 17 variables, their items and possible ranges are those of the public MIMIC benchmarks, taken over for the items
that MIMIC-IV uses; ``mimic_items.csv`` holds them, with common laboratory tests and urine output beside. Items of other
body fluids (urine glucose, urine pH) are left out, and so is a height or weight of zero. ``prepare.items`` adds any
other item of chartevents, labevents or outputevents under its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from trajlm.cohorts.tables import Format, Release
from trajlm.errors import TrajlmError
from trajlm.schema import Feature

SERIES = "series"
ITEMS = pl.read_csv(
    Path(__file__).with_name("mimic_items.csv"),
    schema_overrides={"unit": pl.String, "low": pl.Float64, "high": pl.Float64, "accepted": pl.String},
).with_columns(pl.col("unit", "conversion", "accepted").fill_null(""))

_CHART_ITEMS: dict[str, Format] = {"itemid": "integer", "label": "string", "linksto": "string", "unitname": "string"}
_LAB_ITEMS: dict[str, Format] = {"itemid": "integer", "label": "string"}
_TABLES = ("chartevents", "labevents", "outputevents")
_READ = ["itemid", "variable", "conversion", "low", "high", "checked", "open"]


def plain_unit(unit: pl.Expr) -> pl.Expr:
    """A unit in lower case, without blanks and degree signs, also those that lost their encoding; null becomes ""."""
    return unit.fill_null("").str.to_lowercase().str.replace_all(r"[\s°º?\u{fffd}]", "")


class Items:
    """The items that are read, and the units met so far.

    An item whose unit is known beforehand is rejected in any other; rows without a unit are taken to be in it. Where no
    table tells the unit of a further item, the first one met names the feature's, and another one makes a feature of
    its own, ``label [unit]``: two units are never mixed.

    Args:
        rows: ``table, itemid, variable, unit, conversion, low, high, accepted``; ``accepted`` lists plain units between
            ``|``, none where any will do; null where the unit is not known beforehand.
    """

    def __init__(self, rows: pl.DataFrame) -> None:
        accepted = pl.col("accepted")
        self._rows = rows.with_columns(
            checked=(accepted != "").fill_null(False), open=accepted.is_null(), unit=pl.col("unit").fill_null("")
        )
        pairs = self._rows.filter("checked").select("itemid", said=accepted.str.split("|")).explode("said")
        self._accepted = pairs.with_columns(fits=True)
        self._met: dict[tuple[int, str], tuple[str, str]] = {}

    def ids(self, table: str) -> frozenset[int]:
        """The item ids read from a table."""
        return frozenset(self._rows.filter(pl.col("table") == table)["itemid"])

    def describe(self, table: str, frame: pl.DataFrame) -> pl.DataFrame:
        """Add ``variable``, ``conversion``, ``low``, ``high`` and ``unknown_unit`` to rows of the items of a table."""
        rows = self._rows.filter(pl.col("table") == table)
        frame = frame.join(rows.select(_READ), on="itemid", how="left", maintain_order="left")
        frame = frame.with_columns(said=plain_unit(pl.col("valueuom")))
        frame = frame.join(self._accepted, on=["itemid", "said"], how="left", maintain_order="left")
        unknown = pl.col("checked") & (pl.col("said") != "") & pl.col("fits").is_null()
        frame = frame.with_columns(unknown_unit=unknown)
        if rows["open"].any():
            frame = self._name_by_unit(frame)
        return frame.drop("said", "fits", "checked", "open")

    def _name_by_unit(self, frame: pl.DataFrame) -> pl.DataFrame:
        told = frame.filter(pl.col("open") & (pl.col("said") != ""))
        met = told.unique(["itemid", "said"], keep="first", maintain_order=True)
        for itemid, said, variable, unit in met.select("itemid", "said", "variable", "valueuom").iter_rows():
            if (itemid, said) not in self._met:
                first = all(other != itemid for other, _ in self._met)
                name = variable if first else f"{variable} [{unit.strip()}]"
                self._met[itemid, said] = (name, unit.strip())
        names = pl.DataFrame(
            [(itemid, said, name) for (itemid, said), (name, _) in self._met.items()],
            schema={"itemid": pl.Int64, "said": pl.String, "name": pl.String},
            orient="row",
        )
        frame = frame.join(names, on=["itemid", "said"], how="left", maintain_order="left")
        return frame.with_columns(variable=pl.coalesce("name", "variable")).drop("name")

    def features(self) -> tuple[Feature, ...]:
        """Every variable of the series, in the order of the items; complete once all tables are read."""
        units = dict(self._met.values())
        features = []
        for name, unit, table, itemid in (
            self._rows.unique("variable", keep="first", maintain_order=True)
            .select("variable", "unit", "table", "itemid")
            .iter_rows()
        ):
            aggregate: Literal["sum", "last"] = "sum" if table == "outputevents" else "last"
            names = [name, *(n for (other, _), (n, _) in self._met.items() if other == itemid and n != name)]
            features += [Feature(SERIES, n, units.get(n, unit), aggregate=aggregate) for n in names]
        return tuple(features)


def read_items(release: Release, further: Sequence[int]) -> Items:
    """The default items and ``further`` ones, which the release's own tables of items describe.

    Raises:
        TrajlmError: a further item is unknown, or of a table that holds no series.
        UnexpectedInput: a table of items is not what a release holds.
    """
    asked = sorted(set(further) - set(ITEMS["itemid"]))
    if not asked:
        return Items(ITEMS)
    known = pl.concat([_chart_items(release, asked), _lab_items(release, asked)])
    for itemid in asked:
        mine = known.filter(pl.col("itemid") == itemid)
        if mine.is_empty():
            raise TrajlmError(
                f"prepare.items: {itemid} is in neither icu/d_items nor hosp/d_labitems of {release.raw}; see there "
                "which items the release has"
            )
        label, table = mine.select("label", "table").row(0)
        if table not in _TABLES:
            raise TrajlmError(
                f"prepare.items: {itemid} ({label}) is an item of {table}; items of {', '.join(_TABLES)} can be read"
            )
    return Items(pl.concat([ITEMS, _named(known)], how="diagonal"))


def _chart_items(release: Release, asked: Sequence[int]) -> pl.DataFrame:
    frame = _asked(release, "icu/d_items", _CHART_ITEMS, asked)
    unit = pl.when(pl.col("unitname") != "None").then(pl.col("unitname"))
    return frame.select("itemid", "label", table="linksto", unit=unit)


def _lab_items(release: Release, asked: Sequence[int]) -> pl.DataFrame:
    frame = _asked(release, "hosp/d_labitems", _LAB_ITEMS, asked)
    return frame.select("itemid", "label", table=pl.lit("labevents"), unit=pl.lit(None, pl.String))


def _asked(release: Release, place: str, columns: dict[str, Format], asked: Sequence[int]) -> pl.DataFrame:
    table = release.table(place, columns=columns)
    if table is None:
        return pl.DataFrame(schema={column: pl.Int64 if column == "itemid" else pl.String for column in columns})
    rules = [
        ("not an item that prepare.items names", ~pl.col("itemid").is_in(pl.Series(asked).implode()).fill_null(False)),
        ("repeats an earlier itemid", ~pl.col("itemid").is_first_distinct()),
    ]
    frame = release.screen(table, table.frame, rules)
    release.ledger.keep(table.name, frame.height)
    return frame


def _named(known: pl.DataFrame) -> pl.DataFrame:
    """Rows like those of ITEMS; a label that is not the only one of its kind is followed by its item id."""
    label = pl.coalesce("label", pl.format("item {}", "itemid"))
    taken = label.is_duplicated() | label.is_in(ITEMS["variable"].unique().implode())
    name = pl.when(taken).then(pl.format("{} ({})", label, "itemid")).otherwise(label)
    return known.sort("itemid").select(
        "table", "itemid", "unit", "label", variable=name, conversion=pl.lit(""), accepted=plain_or_null(pl.col("unit"))
    )


def plain_or_null(unit: pl.Expr) -> pl.Expr:
    """As :func:`plain_unit`, null staying null."""
    return pl.when(unit.is_not_null()).then(plain_unit(unit))
