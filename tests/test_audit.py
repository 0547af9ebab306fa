"""An audit counts what is on disk: against SQL over the same files, against the manifest, and against damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from conftest import TRAJLM, command, last_line
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from trajlm.audit.build import Audit, audit_folder
from trajlm.audit.tables import wilson
from trajlm.cohorts.synthetic import synthesize
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError
from trajlm.prepare import prepare
from trajlm.report.audit import audit, markdown, render_audit

STAYS = 160
FILES = ("attrition", "rejected", "combinations", "modalities", "prevalence", "length_of_stay")
HOSTILE = "<script>alert(1)</script> | a\nb \x1b[31m <a href='https://example.org/'>x</a>"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented stays, prepared by the pipeline itself."""
    place = tmp_path_factory.mktemp("audit")
    synthesize(place / "raw", STAYS, 4, "eicu")
    prepare(PrepareConfig(cohort="synthetic", raw=str(place / "raw")), place / "prepared")
    return place / "prepared"


@pytest.fixture(scope="module")
def found(prepared: Path) -> Audit:
    return audit_folder(prepared)


@pytest.fixture(scope="module")
def db(prepared: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The same files, read by a program that shares no code with the audit."""
    connection = duckdb.connect()
    connection.execute(f"create view stays as from '{prepared}/stays.parquet'")
    connection.execute(f"create view events as from '{prepared}/events/*.parquet'")
    connection.execute(
        "create view everyone as select split, * exclude split from stays union all "
        "select 'all', * exclude split from stays"
    )
    yield connection
    connection.close()


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A prepared folder to do damage to."""
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_table(file: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    change(pl.read_parquet(file)).write_parquet(file)


def events_file(folder: Path) -> Path:
    return sorted((folder / "events").glob("*.parquet"))[0]


def rows_of(frame: pl.DataFrame, *columns: str) -> set[tuple]:
    return set(frame.select(columns).iter_rows())


def test_a_sound_folder_is_found_sound_and_its_manifest_true(found: Audit) -> None:
    manifest = found.folder.manifest
    assert found.faults == []
    assert found.leaks == manifest["open_leaks"]
    assert found.superseded == manifest["superseded_measurements"]
    assert found.checks["found"].to_list() == [0] * 8
    assert {row["split"]: row["stays"] for row in found.splits.iter_rows(named=True) if row["split"] != "all"} == (
        manifest["stays"]
    )
    assert (
        dict(found.combinations.select("combination", "train").filter(pl.col("train") > 0).iter_rows())
        == (manifest["combinations"]["train"])
    )
    assert found.attrition is not None
    assert found.attrition["stays"].to_list() == [step["stays"] for step in manifest["attrition"]]
    assert found.attrition["stays"][-1] == found.folder.stays.height < STAYS
    assert STAYS - found.attrition["stays_lost"].sum() == found.folder.stays.height


def test_splits_and_combinations_are_those_sql_counts(found: Audit, db: duckdb.DuckDBPyConnection) -> None:
    splits = db.execute(
        "select split, count(*), count(distinct subject_id), sum(n)::bigint from everyone left join "
        "(select stay_id, count(*) as n from events group by 1) using (stay_id) group by 1"
    ).fetchall()
    assert rows_of(found.splits, "split", "stays", "patients", "events") == set(splits)
    held = " ".join(f"|| case when present_{name} then '+{name}' else '' end" for name in found.folder.modalities)
    combinations = db.execute(
        f"select coalesce(nullif(substr('' {held}, 2), ''), 'nothing') as c, count(*) filter (split = 'train'), "
        "count(*) filter (split = 'tuning'), count(*) filter (split = 'held_out'), count(*), "
        "count(*) / (select count(*) from stays) from stays group by 1"
    ).fetchall()
    assert len(combinations) > 8
    assert rows_of(found.combinations, "combination", "train", "tuning", "held_out", "all", "share") == set(
        combinations
    )
    assert found.combinations["all"].to_list() == sorted((row[4] for row in combinations), reverse=True)
    assert found.combinations.filter(pl.col("modalities") != pl.col("combination").str.split("+").list.len()).is_empty()


def test_modalities_are_those_sql_counts(found: Audit, db: duckdb.DuckDBPyConnection) -> None:
    quantiles = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
    wanted = ", ".join(
        f"quantile_cont({column}, {q}) as {name}_{label}"
        for name, column in (("events", "n"), ("first_hour", "first"))
        for label, q in quantiles.items()
    )
    answer = db.execute(
        f"select modality, split, count(*) as present, sum(n)::bigint as events, {wanted} from everyone join (select "
        "stay_id, modality, count(*)::double as n, min(hours_since_admission) as first from events group by all) "
        "using (stay_id) group by all"
    )
    names = [column[0] for column in answer.description]
    counted = pl.DataFrame(answer.fetchall(), schema=names, orient="row", infer_schema_length=None)
    ours = found.modalities.filter(pl.col("present") > 0).select(counted.columns)
    assert ours.height == counted.height >= 4 * 5
    key = ["modality", "split"]
    both = ours.sort(key), counted.sort(key)
    assert both[0].select(key).equals(both[1].select(key))
    for column in counted.columns[2:]:
        assert both[0][column].to_list() == pytest.approx(both[1][column].to_list()), column
    absent = found.modalities.filter(pl.col("present") == 0)
    assert absent.select(pl.col("events_median").is_null().all()).item()


def test_prevalence_and_hours_are_those_sql_counts(found: Audit, db: duckdb.DuckDBPyConnection) -> None:
    counted = db.execute(
        "select 'target_mortality', split, count(target_mortality), count(*) - count(target_mortality), "
        "count(*) filter (target_mortality = 1) from everyone group by 2"
    ).fetchall()
    assert rows_of(found.prevalence, "target", "split", "known", "unknown", "positive") == set(counted)
    for row in found.prevalence.iter_rows(named=True):
        assert row["prevalence"] == pytest.approx(row["positive"] / row["known"])
        interval = binomtest(row["positive"], row["known"]).proportion_ci(method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    for quantity in ("target_length_of_stay_hours", "hours_in_unit"):
        of = f"count({quantity}), avg({quantity}), quantile_cont({quantity}, [0.05, 0.5, 0.95])"
        for split, known, mean, quantiles in db.execute(f"select split, {of} from everyone group by 1").fetchall():
            row = found.hours.row(
                by_predicate=(pl.col("quantity") == quantity) & (pl.col("split") == split), named=True
            )
            ours = [row["known"], row["mean"], row["q05"], row["median"], row["q95"]]
            assert ours == pytest.approx([known, mean, *quantiles])


def test_rejected_rows_are_those_on_disk(found: Audit, prepared: Path, db: duckdb.DuckDBPyConnection) -> None:
    counted = set()
    for file in (prepared / "rejected").glob("*.parquet"):
        counted |= set(db.execute(f"select \"table\", reason, count(*) from '{file}' group by all").fetchall())
    assert len(counted) > 10
    assert rows_of(found.rejected, "table", "reason", "stored") == counted
    assert found.rejected["rows"].equals(found.rejected["stored"].alias("rows"))
    read = dict(found.tables.select("table", "read").iter_rows())
    for table, rows, share in found.rejected.select("table", "rows", "share").iter_rows():
        assert share == pytest.approx(rows / read[table])


@given(known=st.integers(1, 10_000_000), share=st.floats(0, 1))
def test_wilson_is_that_of_scipy(known: int, share: float) -> None:
    positive = round(known * share)
    interval = binomtest(positive, known).proportion_ci(method="wilson") if known < 100_000 else None
    low, high = wilson(positive, known) or (-1, -1)
    assert 0 <= low <= positive / known + 1e-12
    assert positive / known - 1e-12 <= high <= 1
    if interval is not None:
        assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_wilson_at_known_values() -> None:
    assert wilson(0, 0) is None
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1), abs=1e-5)
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


def _other_split(stays: pl.DataFrame) -> pl.DataFrame:
    several = stays.filter(pl.len().over("subject_id") > 1)["stay_id"][0]
    other = pl.when(pl.col("split") == "train").then(pl.lit("tuning")).otherwise(pl.lit("train"))
    return stays.with_columns(split=pl.when(pl.col("stay_id") == several).then(other).otherwise("split"))


def _moved(hours: pl.Expr) -> Callable[[pl.DataFrame], pl.DataFrame]:
    last = pl.int_range(pl.len()) == pl.len() - 1
    return lambda e: e.with_columns(hours_since_admission=pl.when(last).then(hours).otherwise("hours_since_admission"))


STAYS_CHANGES = {
    "1 patients in more than one split": _other_split,
    "1 stays in no split": lambda s: s.with_columns(
        split=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("test")).otherwise("split")
    ),
    "1 stay ids that stand twice": lambda s: pl.concat([s, s.tail(1)]),
    "1 stays with events that stays.parquet lacks": lambda s: s.tail(-1),
    "1 stays whose presence flags contradict their events": lambda s: s.with_columns(
        present_demographics=pl.int_range(pl.len()) != 0
    ),
}
EVENTS_CHANGES = {
    "1 stays with events after they left the unit": _moved(pl.lit(47.999)),
    "1 stays with events after the window of 48 hours": _moved(pl.lit(48.01)),
    "1 stays with events before admission to the unit": _moved(pl.lit(-0.5)),
}


@pytest.mark.parametrize("said", [*STAYS_CHANGES, *EVENTS_CHANGES])
def test_damage_to_the_files_is_found(copy: Path, said: str) -> None:
    if said in STAYS_CHANGES:
        change_table(copy / "stays.parquet", STAYS_CHANGES[said])
    else:
        if "left" in said:  # the last stay left early
            change_table(copy / "stays.parquet", lambda s: s.with_columns(hours_in_unit=pl.lit(40.0)))
        change_table(events_file(copy), lambda e: EVENTS_CHANGES[said](e.filter(pl.col("hours_since_admission") < 40)))
    found = audit_folder(copy)
    assert said in [*found.leaks, *found.faults]
    text = markdown(found)
    assert said in text
    assert ("leak" if said in found.leaks else "damage") in re.findall(rf"{said[2:]} +\| +1 \| +(\w+)", text)[0]


def test_a_manifest_of_another_folder_is_contradicted(copy: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["stays"]["train"] += 1
        manifest["events"]["tuning"]["lab"] = 7
        manifest["combinations"]["held_out"]["lab+aps"] = 3
        manifest["prevalence"]["train"]["target_mortality"]["positive"] = 0
        manifest["attrition"][-1]["stays"] += 5
        manifest["tables"]["lab"]["kept"] -= 1
        manifest["tables"]["patient"]["reasons"] = {"a reason of its own": manifest["tables"]["patient"]["rejected"]}

    change_manifest(copy, change)
    (copy / "rejected" / "diagnosis.parquet").unlink()
    faults = "\n".join(audit_folder(copy).faults)
    for what in ("stays of train", "lab events of tuning", "stays of held_out with lab+aps", "positive of train",
                 "stays left after the last rule", "rows of lab read", "rejected rows of diagnosis to be stored",
                 "a reason of its own"):  # fmt: skip
        assert what in faults, what
    assert "This folder contradicts itself" in markdown(audit_folder(copy))


def test_stored_rows_may_be_fewer_than_rejected_ones_where_the_settings_say_so(copy: Path) -> None:
    change_manifest(copy, lambda m: m["settings"].update(rejected_rows=3))
    for file in (copy / "rejected").glob("*.parquet"):
        change_table(file, lambda rows: rows.group_by("reason", maintain_order=True).head(3).select(rows.columns))
    found = audit_folder(copy)
    assert found.faults == []
    assert found.rejected["stored"].max() == 3
    assert found.rejected["rows"].sum() == found.tables["rejected"].sum()


def test_an_older_folder_says_what_it_does_not_record(copy: Path, tmp_path: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        for key in ("attrition", "superseded_measurements", "open_leaks", "combinations", "prevalence", "settings"):
            del manifest[key]

    audit(copy, tmp_path / "out")
    assert (tmp_path / "out/attrition.csv").is_file()
    change_manifest(copy, older)
    audit(copy, tmp_path / "out")
    text = (tmp_path / "out/audit.md").read_text()
    assert "prepared before the cost of each rule was recorded" in text
    assert "No open leak was recorded" in text
    assert "Superseded values: not recorded" in text
    assert {p.stem for p in (tmp_path / "out").glob("*.csv")} == {*FILES} - {"attrition"}


def test_saved_tables_are_the_audits_and_the_same_every_time(prepared: Path, found: Audit, tmp_path: Path) -> None:
    printed = audit(prepared, tmp_path / "a")
    audit(prepared, tmp_path / "b")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {*(f"{f}.csv" for f in FILES), "audit.md", "audit.html"}
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert found.attrition is not None
    for name, frame in (("rejected", found.rejected), ("attrition", found.attrition), ("prevalence", found.prevalence)):
        assert pl.read_csv(tmp_path / f"a/{name}.csv").rows() == frame.rows()
    text = (tmp_path / "a/audit.md").read_text()
    for said in (*found.leaks, *found.folder.manifest["notes"], *found.rejected["reason"], *found.attrition["rule"]):
        assert said.replace("|", "\\|") in text or said in text
    assert printed.splitlines()[0] == text.splitlines()[0]
    assert printed.splitlines()[-1].startswith(str(tmp_path / "a/audit.html"))
    settings = found.folder.manifest["settings"]
    assert settings["raw"] not in text
    assert settings["raw"] not in (tmp_path / "a/audit.html").read_text()


def test_markdown_tables_are_square_whatever_the_records_say(copy: Path) -> None:
    def hostile(manifest: dict[str, Any]) -> None:
        manifest["release"] = manifest["notes"][0] = manifest["open_leaks"][0] = HOSTILE
        manifest["attrition"][1]["rule"] = manifest["modalities"][1]["title"] = HOSTILE
        reasons = manifest["tables"]["lab"]["reasons"]
        reasons[HOSTILE] = reasons.pop("after the window")

    change_manifest(copy, hostile)
    found = audit_folder(copy)
    text = markdown(found)
    assert "\x1b" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)
    assert len(tables) >= 9
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    page = render_audit(found)
    assert "<script>alert(1)" not in page
    assert "<a href='https" not in page


def test_long_tables_are_cut_in_the_terminal_alone(found: Audit) -> None:
    short, whole = markdown(found, most_rows=5), markdown(found)
    rows = found.combinations.height
    assert f"... and {rows - 5} more rows, in audit.md" in short
    assert "more row" not in whole
    assert len(whole) > len(short)


def test_what_is_no_prepared_folder_is_refused_in_one_line(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(TrajlmError, match="is not a prepared folder"):
        audit(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajlmError, match="cannot write the audit"):
        audit(copy, tmp_path / "file")
    assert not (copy / "audit").exists()
    manifest = (copy / "manifest.json").read_text()
    for damaged in ("{", "[]", '{"modalities": [], "tables": 3}'):
        (copy / "manifest.json").write_text(damaged)
        with pytest.raises(TrajlmError, match="expected the manifest of a prepared folder"):
            audit(copy)
    (copy / "manifest.json").write_text(manifest)
    change_table(copy / "stays.parquet", lambda s: s.drop("present_lab"))
    with pytest.raises(TrajlmError, match="present_lab"):
        audit(copy)
    events_file(copy).write_bytes(b"PAR1 not a table")
    with pytest.raises(TrajlmError, match="cannot be read"):
        audit(copy)


def test_the_command_prints_and_saves_beside_the_folder(copy: Path, tmp_path: Path) -> None:
    done = command(*TRAJLM, "audit", copy)
    assert "## Which leaks are open" in done.stdout
    assert (copy / "audit/audit.html").is_file()
    assert audit_folder(copy).faults == []
    refused = command(*TRAJLM, "audit", tmp_path / "nowhere", check=False)
    assert refused.returncode == 2
    assert "is not a prepared folder" in last_line(refused)


@pytest.fixture(scope="module")
def page_file(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    audit(prepared, out)
    return out / "audit.html"


def _open(browser: Any, page_file: Path, width: int) -> tuple[Any, list[str]]:
    page, said = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto(page_file.as_uri())
    for figure in page.query_selector_all("[data-figure]"):  # those further down come when nothing else is to do
        figure.wait_for_selector(".main-svg", state="attached")
    return page, said


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_draws_every_figure_and_says_nothing(browser: Any, page_file: Path, width: int) -> None:
    page, said = _open(browser, page_file, width)
    plots = page.query_selector_all("[data-figure]")
    keys = [plot.get_attribute("data-figure") for plot in plots]
    assert keys == ["attrition", "prevalence", "hours", "combinations", "shares", "events", "first", "rows"]
    for plot in plots:
        assert plot.query_selector(".cartesianlayer .trace path"), plot.get_attribute("data-figure")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.query_selector("nav a[href='#leaks']")
    assert said == []
    page.close()


def test_figures_show_what_the_tables_hold(browser: Any, page_file: Path, found: Audit) -> None:
    page, _ = _open(browser, page_file, 1280)
    traces = "document.querySelector('[data-figure={}]').data.map(t => [t.name, Array.from(t.x || []), t.customdata])"
    bars = {name: (x, counts) for name, x, counts in page.evaluate(traces.format("combinations")) if counts}
    for split, name in (("train", "train"), ("held_out", "held out")):
        column = found.combinations[split]
        counts = [*column.head(20).to_list(), *([column.slice(20).sum()] if len(column) > 20 else [])]
        assert bars[name][1] == counts
        assert bars[name][0] == pytest.approx([n / column.sum() for n in counts])
    whole = found.modalities.filter((pl.col("split") == "all") & (pl.col("present") > 0))
    medians = page.evaluate("document.querySelector('[data-figure=events]').data.map(t => t.median[0])")
    assert medians == whole["events_median"].to_list()
    page.close()


def test_hostile_text_is_shown_and_never_run(browser: Any, copy: Path, tmp_path: Path) -> None:
    def hostile(manifest: dict[str, Any]) -> None:
        manifest["release"] = manifest["open_leaks"][0] = manifest["attrition"][1]["rule"] = HOSTILE
        manifest["modalities"][1]["title"] = HOSTILE

    change_manifest(copy, hostile)
    audit(copy, tmp_path / "out")
    page, said = _open(browser, tmp_path / "out/audit.html", 1280)
    assert "<script>alert(1)</script>" in page.text_content(".subtitle")
    assert "<script>alert(1)</script>" in page.text_content("#leaks ul")
    assert page.query_selector("svg a, main a, img") is None
    assert said == []
    page.close()
