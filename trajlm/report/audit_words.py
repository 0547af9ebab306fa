"""An audit in words and tables: the sections that the page, the Markdown file and the terminal all show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from trajlm.audit.build import Audit
from trajlm.audit.folder import ALL, Folder
from trajlm.report.figures import SPLIT_TITLES
from trajlm.report.tables import NOT_DEFINED, Block, Table, count, name_label, percent
from trajlm.schema import PHENOTYPE_PREFIX

_COLUMNS = SPLIT_TITLES | {ALL: "all"}
_PLACES = {"raw", "splits", "notes_folder", "images_folder", "mapping"}  # where files lie is nobody else's business


@dataclass(frozen=True)
class Section:
    """One part of an audit.

    Attributes:
        key: id in the page.
        title: what it answers.
        text: paragraphs.
        items: a list of sentences after them.
        tables: what the figures are drawn from.
        files: CSV files that hold these tables whole.
    """

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def modality_titles(folder: Folder) -> dict[str, str]:
    """How a reader would write each modality, in the folder's order."""
    return {m["name"]: m.get("title") or name_label(m["name"]) for m in folder.manifest["modalities"]}


def target_title(target: str) -> str:
    """How a reader would write a target or a quantity in hours."""
    name = target.removeprefix(PHENOTYPE_PREFIX).removeprefix("target_")
    return {"mortality": "in-hospital mortality", "hours_in_unit": "known time in the unit"}.get(name) or name_label(
        name.removesuffix("_hours")
    )


def headline(audit: Audit) -> str:
    """What the folder is, in one line."""
    whole = audit.splits.row(by_predicate=pl.col("split") == ALL, named=True)
    sizes = f"{count(whole['stays'])} stays of {count(whole['patients'])} patients, {count(whole['events'])} events"
    return f"{audit.folder.manifest.get('release', 'unknown release')}: {sizes}"


def warnings(audit: Audit) -> list[str]:
    """What a reader must know before believing a figure."""
    said = [f"This folder contradicts itself: {fault}." for fault in audit.faults]
    if audit.folder.manifest.get("invented"):
        said.append("These patients are invented: the figures say that the pipeline works, nothing about medicine.")
    leaks = len(audit.leaks)
    if leaks:
        said.append(f"{leaks} {'leak is' if leaks == 1 else 'leaks are'} open: see the first section.")
    return said


def facts(audit: Audit) -> list[tuple[str, str]]:
    """Label and value of what the folder is."""
    manifest, settings = audit.folder.manifest, audit.folder.manifest.get("settings", {})
    window = settings.get("window_hours", "unknown")
    own = {"own": "our own, by patient", "published": "published"}
    dated = {"available": "when they could be known", "charted": "when they were taken"}
    return [
        ("Cohort", str(manifest.get("cohort", "unknown"))),
        ("Window", "whole stay" if window is None else window if isinstance(window, str) else f"{window:g} hours"),
        ("Results dated by", dated.get(settings.get("result_times", ""), "not recorded")),
        ("Splits", own.get(manifest.get("split_source", ""), "unknown")),
        ("Superseded values", "not recorded" if audit.superseded is None else count(audit.superseded)),
        ("Prepared by", f"trajlm {manifest.get('trajlm_version', 'of unknown version')}"),
    ]


def settings(audit: Audit) -> list[tuple[str, str]]:
    """Every setting it was prepared with, but for places on the machine."""
    told: dict[str, Any] = audit.folder.manifest.get("settings", {})
    return [(name_label(name), str(value)) for name, value in told.items() if name not in _PLACES]


def sections(audit: Audit) -> list[Section]:
    """All parts of an audit, in order."""
    return [_leaks(audit), _attrition(audit), _outcomes(audit), _presence(audit), _rows(audit)]


def _leaks(audit: Audit) -> Section:
    text = ["A leak lets a model read what could not be known at the time of its belief. The cohort names these:"]
    if not audit.leaks:
        text = ["The cohort names no open leak, and none was found." if "open_leaks" in audit.folder.manifest
                else "No open leak was recorded when this folder was prepared."]  # fmt: skip
    checked = [[check, count(found), "sound" if not found else "leak" if leak else "damage"]
               for check, found, leak in audit.checks.iter_rows()]  # fmt: skip
    table = _table("Looked for in the files", ["What must not be", "found", "verdict"], checked)
    return Section("leaks", "Which leaks are open", text, audit.leaks, [table])


def _attrition(audit: Audit) -> Section:
    title = "What each rule cost"
    if audit.attrition is None:
        return Section("attrition", title, ["This folder was prepared before the cost of each rule was recorded."])
    first = audit.attrition["stays"][0]
    rows = [
        [row["rule"], count(row["stays"]), _lost(row["stays_lost"]), count(row["patients"]),
         _lost(row["patients_lost"]), percent(row["stays"] / first if first else None)]
        for row in audit.attrition.iter_rows(named=True)
    ]  # fmt: skip
    columns = ["Rule", "stays left", "lost", "patients left", "lost", "of the release"]
    text = ["From the release as it is to the stays in this folder, rule by rule."]
    return Section("attrition", title, text, [], [_table("Stays and patients left", columns, rows)], ["attrition.csv"])


def _lost(stays: int) -> str:
    return f"−{count(stays)}" if stays else ""


def _outcomes(audit: Audit) -> Section:
    sizes = [[_COLUMNS[split], *map(count, numbers)] for split, *numbers in audit.splits.iter_rows()]
    tables = [_table("Splits", ["Split", "stays", "patients", "events"], sizes)]
    if audit.prevalence.height:
        rows = []
        for (target,), own in audit.prevalence.group_by("target", maintain_order=True):
            by_split = {row["split"]: row for row in own.iter_rows(named=True)}
            whole = by_split[ALL]
            cells = [_interval(by_split[split]) for split in _COLUMNS]
            rows.append([target_title(str(target)), f"{count(whole['positive'])} / {count(whole['known'])}", *cells])
        columns = ["Target", "positive / known", *_COLUMNS.values()]
        tables.append(_table("Prevalence in % [95% interval]", columns, rows))
    quantiles = ["mean", "q05", "q25", "median", "q75", "q95"]
    blocks = []
    for (quantity,), own in audit.hours.group_by("quantity", maintain_order=True):
        lines = [
            [_COLUMNS[row["split"]], count(row["known"]), count(row["unknown"]), *(_tenths(row[q]) for q in quantiles)]
            for row in own.iter_rows(named=True)
        ]
        blocks.append(Block(target_title(str(quantity)), "hours", lines))
    columns = ["Split", "known", "unknown", "mean", "5%", "25%", "median", "75%", "95%"]
    tables.append(Table("Length of stay, in hours", columns, blocks))
    text = [
        "Intervals are Wilson's; they take stays as independent, and are a little narrow where patients have several."
    ]
    return Section("outcomes", "What is to be predicted", text, [], tables, ["prevalence.csv", "length_of_stay.csv"])


def _interval(row: dict[str, Any]) -> str:
    if not row["known"]:
        return NOT_DEFINED
    return f"{100 * row['prevalence']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _tenths(value: float | None) -> str:
    return NOT_DEFINED if value is None else f"{value:,.1f}"


def _presence(audit: Audit) -> Section:
    titles = modality_titles(audit.folder)
    combinations = [
        [" + ".join(titles.get(part, part) for part in row["combination"].split("+")), str(row["modalities"]),
         *(count(row[split]) for split in _COLUMNS), percent(row["share"])]
        for row in audit.combinations.iter_rows(named=True)
    ]  # fmt: skip
    held = []
    for (name,), own in audit.modalities.group_by("modality", maintain_order=True):
        by_split = {row["split"]: row for row in own.iter_rows(named=True)}
        whole, shares = by_split[ALL], [percent(by_split[split]["share"]) for split in _COLUMNS]
        spans = [_span(whole, prefix) for prefix in ("events_", "first_hour_")]
        held.append([titles[str(name)], count(whole["present"]), *shares, count(whole["events"]), *spans])
    tables = [
        _table("Stays that hold each modality, and what they hold", ["Modality", "stays", *_COLUMNS.values(), "events",
               "events per stay: median [25%, 75%]", "first hour: median [25%, 75%]"], held),
        _table("Stays by combination of modalities",
               ["Combination", "modalities", *_COLUMNS.values(), "share"], combinations),
    ]  # fmt: skip
    text = ["Few stays hold every modality. What is absent is marked as missing; no value is made up for it."]
    return Section("presence", "Who has what", text, [], tables, ["modalities.csv", "combinations.csv"])


def _span(row: dict[str, Any], prefix: str) -> str:
    middle, low, high = (row[prefix + name] for name in ("median", "q25", "q75"))
    return NOT_DEFINED if middle is None else f"{_tenths(middle)} [{_tenths(low)}, {_tenths(high)}]"


def _rows(audit: Audit) -> Section:
    read = [[name, *map(count, numbers)] for name, *numbers in audit.tables.iter_rows()]
    blocks = []
    for (name,), own in audit.rejected.group_by("table", maintain_order=True):
        lines = [[row["reason"], count(row["rows"]), percent(row["share"]), count(row["stored"])]
                 for row in own.iter_rows(named=True)]  # fmt: skip
        blocks.append(Block(str(name), "", lines))
    tables = [_table("Rows of the raw tables", ["Table", "rows read", "kept", "rejected"], read)]
    if blocks:
        columns = ["Reason", "rows", "of those read", "stored"]
        tables.append(Table("Rows rejected, by table and reason", columns, blocks))
    text = [
        "Every row that was read was either kept or rejected with a reason; rejected rows lie in the folder rejected "
        "as they came. Superseded values, counted above, were kept and then replaced by a later one of the same "
        "feature in the same event."
    ]
    notes = [str(note) for note in audit.folder.manifest.get("notes", [])]
    return Section("rows", "What was left out", text, notes, tables, ["rejected.csv"])


def _table(caption: str, columns: Sequence[str], rows: list[list[str]]) -> Table:
    return Table(caption, list(columns), [Block("", "", rows)])
